"""`python -m benchmarks.memory`: peak memory of an attack against one forward and backward of its batch.

Every measurement is a process of its own. After loading and a warm-up on one sample, the kernel's high-water mark is
reset; what rises above the resident size at that moment is the price of the work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "pgd": ("pgd", {"steps": 5}),
    "apgd": ("apgd", {"steps": 10}),
    "apgd-t": ("apgd-t", {"steps": 5, "targets": 9}),
    "fab-t": ("fab", {"steps": 5, "targets": 9}),
    "deepfool": ("deepfool", {"steps": 5}),
    "cw": ("cw", {"steps": 10, "searches": 2}),
    "ddn": ("ddn", {"steps": 10}),
    "fmn": ("fmn", {"steps": 10}),
    "square": ("square", {"queries": 50}),
}
NORM = {"deepfool": "l2", "cw": "l2", "ddn": "l2", "fmn": "l2"}


def resident() -> tuple[int, int]:
    """(resident, high-water mark) of this process in bytes, from the kernel."""
    text = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def reset_high_water() -> None:
    """Make the high-water mark start again from the present size (Linux 4.0 and later)."""
    Path("/proc/self/clear_refs").write_text("5")


def one(model: str, what: str, n: int) -> dict[str, Any]:
    """Measure one piece of work in this process; `n` 0 takes the batch size that the oracle chooses."""
    import torch

    from benchmarks.maodun_side import prepare
    from benchmarks.subjects import load
    from maodun.core.sizing import automatic_batch_size

    torch.set_num_threads(1)
    probe = load(model, 2)
    size = n or automatic_batch_size(probe.model, probe.x)
    batch = load(model, size)
    size = len(batch.y)
    for parameter in batch.model.parameters():
        parameter.requires_grad_(False)

    def gradient(count: int) -> None:
        leaf = batch.x[:count].clone().requires_grad_(True)
        torch.autograd.grad(batch.model(leaf).logsumexp(1).sum(), leaf)

    from benchmarks.job import Job

    def attack(count: int) -> None:
        name, options = ATTACKS[what]
        norm = NORM.get(what, "linf")
        options = {**options, **({"targets": min(9, batch.classes - 1)} if "targets" in options else {})}
        x, y = batch.x[:count], batch.y[:count]
        prepare(name, options)(Job(batch.model, x, y, norm, batch.subject.eps[norm], batch.classes))()

    work = gradient if what == "one gradient" else attack
    gradient(2)
    if what != "one gradient":
        attack(2)
    reset_high_water()
    before, _ = resident()
    work(size)
    return {"model": model, "what": what, "n": size, "before": before, "peak": resident()[1]}


def child(model: str, what: str, n: int) -> dict[str, Any]:
    """Run `one` in a fresh process; LookupError with its last line of complaint when it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", what, "--model", model, "--n", str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed without a word")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure, print and store."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", default="digits-cnn-at,cifar10-resnet8-at")
    parser.add_argument("--attack", default=",".join(ATTACKS))
    parser.add_argument("--n", type=int, default=0, help="batch (default: what the oracle chooses)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        sys.stdout.write(json.dumps(one(options.model, options.one, options.n)) + "\n")
        return
    grid = Table("model", "what", "n", "rise MB", "/ one gradient", "peak MB", "peak / peak", box=None, pad_edge=False)
    rows, console = [], Console(width=None if sys.stdout.isatty() else 130)
    for model in options.model.split(","):
        try:
            base = child(model, "one gradient", options.n)
        except LookupError as error:
            console.print(f"{model}: skipped: {error}", highlight=False)
            continue
        for what in ("one gradient", *options.attack.split(",")):
            try:
                found = base if what == "one gradient" else child(model, what, options.n)
            except LookupError as error:
                console.print(f"{model} {what}: skipped: {error}", highlight=False)
                continue
            rise, floor = found["peak"] - found["before"], max(base["peak"] - base["before"], 1)
            rows.append({**found, "rise_ratio": rise / floor, "peak_ratio": found["peak"] / base["peak"]})
            grid.add_row(
                model, what, str(found["n"]), f"{rise / 2**20:.1f}", f"{rise / floor:.2f}",
                f"{found['peak'] / 2**20:.0f}", f"{found['peak'] / base['peak']:.3f}",
            )  # fmt: skip
    console.print(grid)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
