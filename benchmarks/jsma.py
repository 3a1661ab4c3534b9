"""`python -m benchmarks.jsma`: JSMA beside ART's and torchattacks', each towards class y + 1 with the same pairs.

Everyone raises entries to 1 (theta 1), two at a time, `--pairs` times at most, on the first `--n` test images that the
model answers rightly. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.subjects import load
from maodun.attacks.minimum.jsma import JSMA
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat

Search = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def ours(outputs: str) -> Search:
    """Return our search on logits or probabilities."""

    def search(model: nn.Module, x: Tensor, targets: Tensor, pairs: int) -> Tensor:
        attack, threat = JSMA(steps=pairs, outputs=outputs), Threat("l0", targeted=True)
        return attack.run(Oracle(model), x, (targets - 1) % 10, threat, targets=targets).x_adv

    return search


def art(outputs: str) -> Search:
    """Return ART's search, which takes the two steepest entries and leaves the other classes alone."""
    import numpy as np
    from art.attacks.evasion import SaliencyMapMethod
    from art.estimators.classification import PyTorchClassifier

    def search(model: nn.Module, x: Tensor, targets: Tensor, pairs: int) -> Tensor:
        net = nn.Sequential(model, nn.Softmax(1)) if outputs == "probabilities" else model
        classifier = PyTorchClassifier(
            net, nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0.0, 1.0),
            device_type="cpu",
        )  # fmt: skip
        attack = SaliencyMapMethod(classifier, gamma=2 * pairs / x[0].numel(), batch_size=len(x), verbose=False)
        return torch.from_numpy(attack.generate(x.numpy(), np.eye(10, dtype=np.float32)[targets.numpy()])).float()

    return search


def torchattacks(_: str) -> Search:
    """Return torchattacks' search on logits; untargeted, its target is the class after the label."""
    import torchattacks as peer

    def search(model: nn.Module, x: Tensor, targets: Tensor, pairs: int) -> Tensor:
        attacked: Tensor = peer.JSMA(model, gamma=2 * pairs / x[0].numel())(x, (targets - 1) % 10)
        return attacked

    return search


CONTENDERS: dict[str, tuple[Callable[[str], Search], str]] = {
    "maodun, logits": (ours, "logits"),
    "maodun, probabilities": (ours, "probabilities"),
    "ART, logits": (art, "logits"),
    "ART, probabilities": (art, "probabilities"),
    "torchattacks, logits": (torchattacks, "logits"),
}


def main() -> None:
    """Print a line per contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=30)
    words = parser.parse_args()
    torch.set_num_threads(1)
    batch = load(words.model, words.n)
    with torch.no_grad():
        right = batch.model(batch.x).argmax(1) == batch.y
    x, targets = batch.x[right], (batch.y[right] + 1) % 10
    print(f"{words.model}, n = {len(x)}, {words.pairs} pairs")
    for label, (make, outputs) in CONTENDERS.items():
        try:
            search = make(outputs)
        except ImportError as error:
            print(f"{label}: {error}")
            continue
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = search(batch.model, x, targets, words.pairs)
        seconds = time.process_time() - started
        with torch.no_grad():
            hit = batch.model(made).argmax(1) == targets
        changed = ((made - x).abs() > 1e-6).flatten(1).sum(1).float()[hit]
        median = float(changed.median()) if len(changed) else float("nan")
        rate, found = float(hit.float().mean()), f"median changed {median:g}, CPU {seconds:.2f} s"
        print(f"{label}: success {rate:.3f} ({int(hit.sum())}), {found}")


if __name__ == "__main__":
    main()
