"""`python -m benchmarks.training`: an epoch of adversarial training beside its bare calls and beside a plain loop.

Three contenders take the same optimiser steps on the same samples in the same order and batches, float32, one thread:

* maodun: `maodun.defenses.training.fit`, one epoch, nothing to validate;
* bare: the forwards and backwards that the objective cannot do without, and the optimiser's step; each in the cheaper
  of the two memory layouts as it comes (weights as they are, or channels-last), with frozen parameters in the attack;
* reference: a loop of the structure of the TRADES authors' training code, in our words. Before every batch the model
  goes to evaluation mode, each inner step asks the model for the adversarial answer and, under TRADES, once more for
  the clean one, parameters stay trainable throughout; then train mode, both passes, one backward, one step.

Times are CPU seconds per image; ratios are medians over interleaved rounds of ours / theirs within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rounds import rotation
from maodun.attacks.registry import build_attack
from maodun.core.threat import Threat
from maodun.defenses.training import TRADES, AdversarialTraining, FitSettings, Inner, Objective, fit
from maodun.zoo.architectures import build_architecture

EPS, STEP = 8 / 255, 2 / 255
NETS: dict[str, tuple[str, dict[str, object], tuple[int, ...]]] = {
    "preact-resnet8": ("preact-resnet8", {}, (3, 32, 32)),
    "vgg-small": ("vgg-small", {"widths": (16, 32, 64, 64)}, (3, 32, 32)),
    "mnist-cnn": ("vgg-small", {"widths": (8, 16, 32, 32), "channels": 1, "mean": None, "std": None}, (1, 28, 28)),
}


class Work:
    """One epoch to do: a net, `n` random images in batches of `batch`, `steps` inner steps of an objective."""

    def __init__(self, net: str, kind: str, n: int, batch: int, steps: int) -> None:
        self.net, self.kind, self.batch, self.steps = net, kind, batch, steps
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(n, *NETS[net][2], generator=generator)
        self.y = torch.randint(0, 10, (n,), generator=generator)
        self.settings = FitSettings(epochs=1, batch_size=batch)

    def model(self) -> nn.Module:
        """The untrained net, in train mode."""
        name, options, _ = NETS[self.net]
        return build_architecture(name, options)

    def objective(self) -> Objective:
        """The objective under test, with the published inner attack."""
        loss = "kl" if self.kind == "trades" else "ce"
        attack = Inner(build_attack("pgd", steps=self.steps, step_size=STEP, loss=loss), Threat("linf", EPS))
        return TRADES(attack) if self.kind == "trades" else AdversarialTraining(attack)

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of the two plain loops."""
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def maodun(work: Work) -> float:
    """CPU seconds of an epoch of ours."""
    model = work.model()
    began = time.process_time()
    fit(model, work.x, work.y, work.objective(), work.settings, validate=lambda _: 0.0)
    return time.process_time() - began


def _clean_and_adversarial(work: Work, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    if work.kind != "trades":
        return F.cross_entropy(model(x_adv), y)
    clean = model(x)
    gap = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(clean, 1), reduction="batchmean")
    return F.cross_entropy(clean, y) + 6.0 * gap


def reference(work: Work) -> float:
    """CPU seconds of an epoch of the plain loop."""
    model = work.model()
    optimiser = work.optimiser(model)
    began = time.process_time()
    for rows in torch.split(torch.randperm(len(work.x)), work.batch):
        x, y = work.x[rows], work.y[rows]
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(work.steps):
            x_adv.requires_grad_()
            if work.kind == "trades":
                rise = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")
            else:
                rise = F.cross_entropy(model(x_adv), y)
            (gradient,) = torch.autograd.grad(rise, x_adv)
            x_adv = x_adv.detach() + STEP * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0.0, 1.0)
        model.train()
        optimiser.zero_grad()
        _clean_and_adversarial(work, model, x, x_adv, y).backward()
        optimiser.step()
    return time.process_time() - began


def bare(work: Work, layout: torch.memory_format) -> float:
    """CPU seconds of the calls that the epoch needs, the weights of both passes in `layout`."""
    model, asked = (work.model().to(memory_format=layout) for _ in range(2))  # type: ignore[call-overload]
    asked.eval().requires_grad_(False)
    optimiser = work.optimiser(model)
    began = time.process_time()
    for x, y in zip(torch.split(work.x, work.batch), torch.split(work.y, work.batch), strict=True):
        if work.kind == "trades":
            with torch.no_grad():
                asked(x)
        leaf = x.detach().requires_grad_(True)
        for _ in range(work.steps):
            torch.autograd.grad(F.cross_entropy(asked(leaf), y), leaf)
        optimiser.zero_grad()
        _clean_and_adversarial(work, model, x, x, y).backward()
        optimiser.step()
    return time.process_time() - began


CONTENDERS: dict[str, Callable[[Work], float]] = {
    "maodun": maodun,
    "reference": reference,
    "bare": lambda work: bare(work, torch.contiguous_format),
    "bare, channels last": lambda work: bare(work, torch.channels_last),
}


def measure(work: Work, repeats: int) -> dict[str, list[float]]:
    """Seconds per contender and round; the order of the contenders rotates, and a first short round is thrown away."""
    warm = Work(work.net, work.kind, work.batch, work.batch, 1)
    for run in CONTENDERS.values():
        run(warm)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for index in range(repeats):
        for name in rotation(list(CONTENDERS), index):
            times[name].append(CONTENDERS[name](work))
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> None:
    """Measure, print and, with --out, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="preact-resnet8")
    parser.add_argument("--objective", default="adversarial,trades")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    grid = Table("net", "objective", "ms / image", "/ bare", "/ bare NCHW", "/ reference", box=None, pad_edge=False)
    rows = []
    for net in options.model.split(","):
        for kind in options.objective.split(","):
            times = measure(Work(net, kind, options.n, options.batch, options.steps), options.repeats)
            pairs = zip(times["bare"], times["bare, channels last"], strict=True)
            cheapest = [min(pair) for pair in pairs]
            row = {
                "net": net, "objective": kind, "n": options.n, "batch": options.batch, "steps": options.steps,
                "repeats": options.repeats, "ms": 1e3 * statistics.median(times["maodun"]) / options.n,
                "to_bare": ratio(times["maodun"], cheapest), "to_bare_nchw": ratio(times["maodun"], times["bare"]),
                "to_reference": ratio(times["maodun"], times["reference"]), "seconds": times,
            }  # fmt: skip
            rows.append(row)
            numbers = [f"{row[key]:.2f}" for key in ("ms", "to_bare", "to_bare_nchw", "to_reference")]
            grid.add_row(net, kind, *numbers)
    Console(width=None if sys.stdout.isatty() else 120).print(grid)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
