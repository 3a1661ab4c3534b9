"""What a detector adds to a forward: CPU time of the guarded net over that of the bare one, interleaved.

    python -m benchmarks.detection --out benchmarks/results/detection.json

Each detector is fitted to the CIFAR-10 ResNet-8 of the zoo; then batches of 256 test images pass through the bare and
the guarded net in turn, without gradients, on one thread. Needs MAODUN_DATA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from maodun.arena.detectors import pgd_adversary
from maodun.arena.recipe import ThreatSpec
from maodun.core.modes import conv_weights_channels_last, evaluation_mode
from maodun.defenses.detection import DETECTORS, fit_detector
from maodun.zoo import load_data, load_model


def seconds(model: nn.Module, x: Tensor) -> float:
    """Return the CPU seconds of one forward."""
    started = time.process_time()
    model(x)
    return time.process_time() - started


def measure(repeats: int, samples: int) -> dict[str, dict[str, float]]:
    """Return, per detector, the median cost ratio and its quartiles over `repeats` pairs of forwards."""
    model = load_model("zoo:cifar10-resnet8").model
    train, test = load_data("cifar10", split="train", limit=samples), load_data("cifar10", limit=756)
    x, validation, found = test.x[:256], test.x[256:], {}
    for kind in DETECTORS:
        detector = kind()
        few = 200 if detector.needs_adversary else samples
        adversary = pgd_adversary(ThreatSpec(norm="linf", eps=8 / 255), 0)
        rejecting = fit_detector(model, detector, (train.x[:few], train.y[:few]), validation, adversary=adversary)
        with torch.no_grad(), evaluation_mode(rejecting), conv_weights_channels_last(rejecting):
            ratios = [seconds(rejecting, x) / seconds(model, x) for _ in range(repeats + 2)][2:]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[detector.name] = {"ratio": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}
        sys.stdout.write(f"{detector.name:18s} {middle:.3f} [{low:.3f}, {high:.3f}]\n")
        sys.stdout.flush()
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detection.json"))
    words = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(words.repeats, words.samples)
    about = {"torch": torch.__version__, "threads": 1, "batch": 256, "repeats": words.repeats, "samples": words.samples}
    words.out.write_text(json.dumps({"about": about, "forward over bare forward": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
