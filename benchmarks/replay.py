"""`python -m benchmarks.replay`: time and peak memory of a purifier's exact gradient, by its number of steps.

Every measurement is a process of its own. Time is that of one gradient (forward, recomputation, backward) against the
forward purification of the same batch without gradients, medians of interleaved repeats; memory is the kernel's
high-water mark. The network is our small U-Net with random weights: what it predicts changes no
cost. The model is held as an attack holds it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import reset_high_water, resident

RESULTS = Path(__file__).parent / "results"
SHAPE = (3, 32, 32)


def shield(what: str, way: str, steps: int) -> Any:
    """Return a classifier behind a purifier of random weights; parameters are frozen."""
    from torch import nn

    from maodun.defenses import Defended, purification
    from maodun.defenses.purification.network import new_network

    score = new_network(SHAPE)
    if what == "filter":
        defense = purification.DiffusionFilter(score, t_star=0.1, steps=steps)
    else:
        defense = purification.DistributionTransfer(score, mode=what, t_star=0.1, steps=steps)
    defense.gradient = {"replay": purification.Replay(), "disk": purification.Replay(keep="disk")}.get(
        way, purification.Plain()
    )
    victim = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 256, 10))
    return Defended(defense, victim).eval().requires_grad_(False)


def one(what: str, way: str, steps: int, n: int, repeats: int) -> dict[str, Any]:
    """Measure one purifier in this process, in CPU seconds of its one thread."""
    import torch

    from maodun.core.oracle import Oracle

    torch.set_num_threads(1)
    model, x = shield(what, way, steps), torch.rand(n, *SHAPE)

    def gradient() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def seconds(work: Any) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    # Warm up on one sample: what the whole batch needs is then seen to rise.
    few = x[:1].clone().requires_grad_()
    torch.autograd.grad(shield(what, way, 5)(few).sum(), few)
    with Oracle(model).ready():
        reset_high_water()
        before, _ = resident()
        first = seconds(gradient)
        peak = resident()[1]
        pairs = [(seconds(forward), seconds(gradient)) for _ in range(repeats)]
        ratios = [back / ahead for ahead, back in pairs] or [first / seconds(forward)]
    return {
        "what": what, "way": way, "steps": steps, "n": n, "repeats": repeats, "before": before, "peak": peak,
        "forward_s": statistics.median(ahead for ahead, _ in pairs) if pairs else None,
        "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
    }  # fmt: skip


def child(*words: str) -> dict[str, Any]:
    """Run `one` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.replay", "--one", *words], capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure, print and store."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--what", default="filter,conf", help="filter, or a mode of distribution transfer")
    parser.add_argument("--way", default="replay,disk,plain")
    parser.add_argument("--steps", default="5,100")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        what, way, steps = options.one
        sys.stdout.write(json.dumps(one(what, way, int(steps), options.n, options.repeats)) + "\n")
        return
    rows, console = [], Console(width=None if sys.stdout.isatty() else 130)
    grid = Table(
        "what", "way", "steps", "rise MB", "peak MB", "rise / rise", "peak / peak", "gradient / forward", box=None
    )
    for what in options.what.split(","):
        for way in options.way.split(","):
            base: dict[str, Any] = {}
            for steps in options.steps.split(","):
                found = child(what, way, steps, "--n", str(options.n), "--repeats", str(options.repeats))
                base = base or found
                rise, floor = found["peak"] - found["before"], max(1, base["peak"] - base["before"])
                rows.append(found)
                grid.add_row(
                    what, way, steps, f"{rise / 2**20:.0f}",
                    f"{found['peak'] / 2**20:.0f}", f"{rise / floor:.2f}", f"{found['peak'] / base['peak']:.2f}",
                    f"{found['ratio']:.2f} [{found['ratio_low']:.2f}, {found['ratio_high']:.2f}]",
                )  # fmt: skip
    console.print(grid)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "replay.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
