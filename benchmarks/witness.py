"""`python -m benchmarks.witness`: published numbers on nets we did not train, and `sharp` beside `standard`.

Work is cut into chunks (1,000 images, 100 where that takes an hour), one JSON file per (model, eps, attack, chunk). A
run can be stopped at any moment and continued, and `--summary` prints what is there. `sharp` and `standard` of a chunk
run one after the other, in an order that alternates, so that their time ratio is paired.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.flags import discordant, interval, pack, unpack
from benchmarks.job import Job, reset
from benchmarks.measure import quiet
from benchmarks.scoring import score
from benchmarks.subjects import load

RESULTS = Path(__file__).parent / "results" / "witness"


@dataclass(frozen=True)
class Trial:
    """One line of the plan: a subject, a radius as text (a fraction keeps its name) and the attacks to run."""

    model: str
    eps: str
    attacks: tuple[str, ...]
    n: int = 1000
    expected: str = ""
    chunk: int = 1000

    @property
    def chunks(self) -> range:
        """The numbers of its chunks."""
        return range(-(-self.n // self.chunk))


PLAN: tuple[Trial, ...] = (
    Trial("resnet4b", "4/255", ("pgd20", "sharp", "standard"), expected="PGD-20 at most .452"),
    Trial("resnet4b", "8/255", ("pgd20", "sharp", "standard"), expected="PGD-20 at most .157"),
    Trial("resnet56", "8/255", ("pgd20", "sharp", "standard"), expected="0"),
    Trial("trades-mnist", "0.3", ("sharp", "standard"), expected="standard about .928", chunk=100),
    Trial("digits-cnn-at", "0.15", ("sharp", "standard")),
    Trial("digits-cnn", "0.15", ("sharp", "standard")),
    Trial("cifar10-resnet8-at", "8/255", ("sharp", "standard")),
    Trial("cifar10-resnet8", "8/255", ("sharp", "standard")),
)

ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "pgd20": ("pgd", {"steps": 20, "rel_step": 0.25}),
    "sharp": ("sharp", {}),
    "standard": ("autoattack", {}),
    "standard bf16": ("autoattack", {"precision": "bf16"}),
}


def commit() -> str:
    """Short id of the code that ran, with a plus when the attacks' folder is changed."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def path_of(folder: Path, model: str, eps: str, attack: str, chunk: int) -> Path:
    """File of one chunk."""
    safe = f"{model}@{eps.replace('/', '_')}"
    return folder / safe / attack.replace(" ", "-") / f"chunk-{chunk:03d}.json"


def run_chunk(trial: Trial, attack: str, chunk: int, seed: int) -> dict[str, Any]:
    """Attack the images of one chunk of the test split and return what is stored."""
    from benchmarks.contenders import ours, peer

    model, eps, first = trial.model, trial.eps, chunk * trial.chunk
    batch = load(model, min(trial.chunk, trial.n - first), offset=first)
    job = Job(batch.model, batch.x, batch.y, "linf", float(Fraction(eps)), batch.classes, seed)
    reset(batch.model, seed)
    prepare = peer("torchattacks", "standard") if attack == "torchattacks" else ours(*ATTACKS[attack])
    with quiet():
        run = prepare(job)
        cpu, wall = time.process_time(), time.perf_counter()
        x_adv = run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    verdict = score(batch.model, x_adv.detach(), batch.x, batch.y, "linf", job.eps)
    with torch.inference_mode():
        clean = int((batch.model(batch.x).argmax(1) == batch.y).sum())
    return {
        "model": model, "eps": eps, "attack": attack, "chunk": chunk, "n": len(batch.y), "seed": seed,
        "robust": pack(verdict.robust), "robust_count": int(verdict.robust.sum()), "clean_count": clean,
        "outside_ball": verdict.outside_ball, "outside_box": verdict.outside_box, "cpu_seconds": cpu,
        "wall_seconds": wall, "threads": torch.get_num_threads(), "commit": commit(),
    }  # fmt: skip


def stored(folder: Path, trial: Trial, attack: str) -> list[dict[str, Any]]:
    """The finished chunks of one attack on one subject, in order."""
    found = [path_of(folder, trial.model, trial.eps, attack, c) for c in trial.chunks]
    return [json.loads(p.read_text()) for p in found if p.exists()]


def lines(folder: Path, trials: tuple[Trial, ...] = PLAN) -> list[list[str]]:
    """Rows of the summary: robust accuracy with its 95 % interval, and each attack against `standard`."""
    rows = []
    for trial in trials:
        reference = {c["chunk"]: c for c in stored(folder, trial, "standard")}
        for attack in (*ATTACKS, "torchattacks"):
            chunks = stored(folder, trial, attack)
            if not chunks:
                continue
            n, robust = sum(c["n"] for c in chunks), sum(c["robust_count"] for c in chunks)
            low, high = interval(robust, n)
            both = [(c, reference[c["chunk"]]) for c in chunks if c["chunk"] in reference and attack != "standard"]
            gap = weaker = ""
            if both:
                common = sum(c["n"] for c, _ in both)
                gap = f"{100 * sum(c['robust_count'] - r['robust_count'] for c, r in both) / common:+.2f} (n {common})"
                pairs = [discordant(unpack(c["robust"], c["n"]), unpack(r["robust"], r["n"])) for c, r in both]
                weaker = f"{sum(a for a, _ in pairs)}/{sum(b for _, b in pairs)}"
            ratio = ""
            if both:
                each = [c["cpu_seconds"] / r["cpu_seconds"] for c, r in both]
                total = sum(c["cpu_seconds"] for c, _ in both) / sum(r["cpu_seconds"] for _, r in both)
                ratio = f"{total:.3f} (median chunk {statistics.median(each):.3f})"
            rows.append(
                [
                    trial.model, trial.eps, attack, str(n), f"{sum(c['clean_count'] for c in chunks) / n:.3f}",
                    f"{robust / n:.4f} [{low:.3f}, {high:.3f}]", gap, weaker, ratio,
                    f"{sum(c['cpu_seconds'] for c in chunks):.0f}", trial.expected,
                ]
            )  # fmt: skip
    return rows


COLUMNS = (
    "model", "eps", "attack", "n", "clean", "robust [95 %]", "minus standard", "weaker/stronger on", "time / standard",
    "CPU s", "expected",
)  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.witness", description=__doc__)
    parser.add_argument("--model", help="comma separated subjects (default: all of the plan)")
    parser.add_argument("--attack", help="comma separated: " + ", ".join((*ATTACKS, "torchattacks")))
    parser.add_argument("--n", type=int, help="images (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary", action="store_true", help="print what is there and stop")
    parser.add_argument("--again", action="store_true", help="run chunks anew even when they are stored")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> tuple[Trial, ...]:
    """The plan, cut to what the command line asks for."""
    models = options.model.split(",") if options.model else None
    attacks = tuple(options.attack.split(",")) if options.attack else None
    return tuple(
        replace(t, attacks=attacks or t.attacks, n=options.n or t.n)
        for t in PLAN
        if models is None or t.model in models
    )


def work(trials: tuple[Trial, ...], options: argparse.Namespace, progress: Console) -> None:
    """Run every chunk that is not stored yet; a chunk file appears whole or not at all."""
    for trial in trials:
        for chunk in trial.chunks:
            order = trial.attacks if chunk % 2 == 0 else trial.attacks[::-1]
            for attack in order:
                path = path_of(options.out, trial.model, trial.eps, attack, chunk)
                if path.exists() and not options.again:
                    continue
                try:
                    result = run_chunk(trial, attack, chunk, options.seed)
                except LookupError as error:
                    progress.print(f"{trial.model} {attack}: skipped: {error}", highlight=False)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".part")
                partial.write_text(json.dumps(result, indent=0) + "\n")
                partial.replace(path)
                progress.print(
                    f"{trial.model} {trial.eps} {attack} chunk {chunk}: {result['robust_count']}/{result['n']} robust, "
                    f"{result['cpu_seconds']:.0f} s",
                    highlight=False,
                )


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print the summary."""
    options = arguments(argv)
    torch.set_num_threads(1)
    trials = chosen(options)
    if not options.summary:
        work(trials, options, Console(stderr=True))
    grid = Table(*COLUMNS, box=None, pad_edge=False)
    for row in lines(options.out, trials):
        grid.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 190).print(grid)


if __name__ == "__main__":
    main()
