"""`python -m benchmarks.calls`: what one forward and one input gradient cost, by batch size and memory layout.

The numbers behind the automatic batch size and the channels-last weights of the core.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rounds import rotation
from benchmarks.subjects import load

Call = Callable[[nn.Module, Tensor], None]


def forward(model: nn.Module, x: Tensor) -> None:
    """One inference pass."""
    with torch.inference_mode():
        model(x)


def gradient(model: nn.Module, x: Tensor) -> None:
    """One input gradient; parameters are frozen by the caller."""
    leaf = x.detach().requires_grad_(True)
    torch.autograd.grad(model(leaf).float().logsumexp(1).sum(), leaf)


def layouts(model: nn.Module) -> dict[str, tuple[nn.Module, bool, bool]]:
    """Variants as (model, input channels-last, bf16 autocast)."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return {
        "NCHW": (model, False, False), "input last": (model, True, False), "weights last": (last, False, False),
        "both last": (last, True, False), "weights last, bf16": (last, False, True),
    }  # fmt: skip


def per_sample(call: Call, model: nn.Module, x: Tensor, *, last: bool, bf16: bool, seconds: float) -> float:
    """CPU microseconds per sample, over at least two calls and about `seconds`."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    with autocast:
        calls, start = 0, time.process_time()
        while calls < 2 or time.process_time() - start < seconds:
            call(model, x.contiguous(memory_format=torch.channels_last) if last else x)
            calls += 1
        return (time.process_time() - start) / calls / len(x) * 1e6


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--model", default="digits-cnn-at,cifar10-resnet8-at")
    parser.add_argument("--batches", default="16,32,64,128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    grid = Table("model", "batch", "layout", "forward us", "/ NCHW", "gradient us", "/ NCHW", box=None, pad_edge=False)
    for name in options.model.split(","):
        for batch in (int(b) for b in options.batches.split(",")):
            subject = load(name, batch)
            for parameter in subject.model.parameters():
                parameter.requires_grad_(False)
            variants = layouts(subject.model)
            found: dict[str, list[tuple[float, float]]] = {label: [] for label in variants}
            for index in range(options.repeats):
                for label in rotation(list(variants), index):
                    model, last, bf16 = variants[label]
                    pair = [
                        per_sample(c, model, subject.x, last=last, bf16=bf16, seconds=options.seconds)
                        for c in (forward, gradient)
                    ]
                    found[label].append((pair[0], pair[1]))
            medians = {k: [statistics.median(p[i] for p in v) for i in (0, 1)] for k, v in found.items()}
            for label, (f, g) in medians.items():
                base = medians["NCHW"]
                ratios = f"{f / base[0]:.2f}", f"{g / base[1]:.2f}"
                grid.add_row(name, str(batch), label, f"{f:.0f}", ratios[0], f"{g:.0f}", ratios[1])
    Console(width=None if sys.stdout.isatty() else 120).print(grid)


if __name__ == "__main__":
    main()
