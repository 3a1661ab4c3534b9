"""`python -m benchmarks.strength`: is any attack of ours weaker than the best peer at equal iterations?

Every contender attacks the same samples with each seed; one referee scores all of them. Results are kept per
(model, attack, contender, seed) with one flag per sample, so a stopped run continues and the comparison is paired.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import BY_NAME, Case, shortened
from benchmarks.contenders import Prepare, contenders
from benchmarks.flags import discordant, pack, sign_test, unpack
from benchmarks.measure import attack_once, job_for
from benchmarks.scoring import score
from benchmarks.subjects import SUBJECTS, Batch, load

RESULTS = Path(__file__).parent / "results"
Store = dict[str, dict[str, Any]]
ALLOWED = 0.005
"""How much robust accuracy an attack of ours may leave above the best peer (half a point)."""

COLUMNS = ("attack", "model", "n", "seeds", "who", "robust", "success", "median dist", "ours weaker/stronger on", "p")


def key(model: str, case: str, who: str, seed: int, n: int) -> str:
    """Name of one stored result."""
    return f"{model}|{case}|{who}|seed {seed}|n {n}"


def run_one(prepare: Prepare, case: Case, batch: Batch, seed: int) -> dict[str, Any]:
    """Attack once and return what is stored."""
    job = job_for(case, batch, seed)
    x_adv, seconds = attack_once(prepare, job)
    verdict = score(job.model, x_adv, job.x, job.y, job.norm, job.eps)
    return {
        "robust": pack(verdict.robust), "robust_accuracy": verdict.robust_accuracy,
        "success_rate": verdict.success_rate, "median_distance": verdict.median_distance,
        "outside_ball": 0 if case.minimum else verdict.outside_ball, "outside_box": verdict.outside_box,
        "eps": job.eps, "norm": case.norm, "options": {k: str(v) for k, v in case.options.items()}, "seconds": seconds,
    }  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The stored results of one case on one model, by contender."""

    case: Case
    model: str
    n: int
    by_label: dict[str, list[dict[str, Any]]]

    @staticmethod
    def read(store: Store, case: Case, model: str, labels: list[str], seeds: int, n: int) -> Results:
        """Collect what is stored; contenders without a result are left out."""
        keys = {label: [key(model, case.name, label, s, n) for s in range(seeds)] for label in labels}
        found = {label: [store[k] for k in ks if k in store] for label, ks in keys.items()}
        return Results(case, model, n, {label: f for label, f in found.items() if f})

    @property
    def mine(self) -> str | None:
        """The first of ours."""
        return next((label for label in self.by_label if label.startswith("maodun")), None)

    def mean(self, label: str, what: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(f[what] for f in self.by_label[label])

    def versus(self, label: str) -> tuple[int, int]:
        """Samples (over all common seeds) on which ours is weaker, and stronger, than `label`."""
        pairs = zip(self.by_label[self.mine or label], self.by_label[label], strict=False)
        counts = [discordant(unpack(a["robust"], self.n), unpack(b["robust"], self.n)) for a, b in pairs]
        return sum(w for w, _ in counts), sum(s for _, s in counts)

    def shortfall(self) -> float | None:
        """Robust accuracy of ours minus that of the strongest comparable peer; None when either is missing."""
        peers = [
            self.mean(label, "robust_accuracy")
            for label in self.by_label
            if not label.startswith("maodun") and label not in self.case.not_comparable
        ]
        return self.mean(self.mine, "robust_accuracy") - min(peers) if self.mine and peers else None


def summarise(results: Results) -> list[list[str]]:
    """Rows of one case: every contender's mean over seeds, and ours against it sample by sample."""
    rows, case = [], results.case
    for label, found in results.by_label.items():
        versus, p = "", ""
        if results.mine and not label.startswith("maodun"):
            weak, strong = results.versus(label)
            versus, p = f"{weak}/{strong}", f"{sign_test(weak, strong):.3f}"
        star = " *" if label in case.not_comparable else ""
        rows.append(
            [
                case.name, results.model, str(results.n), str(len(found)), label + star,
                f"{results.mean(label, 'robust_accuracy'):.4f}",
                f"{results.mean(label, 'success_rate'):.3f}" if case.minimum else "",
                f"{results.mean(label, 'median_distance'):.4f}" if case.minimum else "", versus, p,
            ]
        )  # fmt: skip
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strength", description=__doc__)
    parser.add_argument("--attack", help="comma separated cases (default: all but standard): " + ", ".join(BY_NAME))
    parser.add_argument("--model", default="digits-cnn-at,cifar10-resnet8-at", help=", ".join(SUBJECTS))
    parser.add_argument("--who", help="comma separated contenders to keep")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="random starts per contender (default 3; 1 for standard)")
    parser.add_argument("--again", help="comma separated contenders whose stored results are thrown away, e.g. maodun")
    parser.add_argument("--quick", action="store_true", help="short attacks on 32 samples, one seed: a check only")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _names(text: str | None, known: list[str], what: str) -> list[str]:
    chosen = known if text is None else [t.strip() for t in text.split(",") if t.strip()]
    for name in chosen:
        if name not in BY_NAME and name not in SUBJECTS:
            sys.exit(f"{what} '{name}': is not known here; choose from {', '.join(known)}")
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, store it, print the comparison and what falls short."""
    options = arguments(argv)
    torch.set_num_threads(1)
    console, progress = Console(width=None if sys.stdout.isatty() else 150), Console(stderr=True)
    out = options.out or RESULTS / ("strength-quick.json" if options.quick else "strength.json")
    store: Store = json.loads(out.read_text()) if out.exists() else {}
    for again in filter(None, (options.again or "").split(",")):
        store = {k: v for k, v in store.items() if k.split("|")[2] != again.strip()}
    n = 32 if options.quick else options.n
    grid, short = Table(*COLUMNS, box=None, pad_edge=False), []
    only = {w.strip() for w in options.who.split(",")} if options.who else None
    for model in _names(options.model, list(SUBJECTS), "model"):
        try:
            batch = load(model, n)
        except LookupError as error:
            progress.print(f"{model}: skipped: {error}")
            continue
        for name in _names(options.attack, [c for c in BY_NAME if c != "standard"], "attack"):
            case = shortened(BY_NAME[name]) if options.quick else BY_NAME[name]
            seeds = 1 if options.quick or name == "standard" else options.seeds
            found, absent = contenders(case, only=only)
            for label, prepare in found.items():
                for seed in range(seeds):
                    name_of = key(model, name, label, seed, n)
                    if name_of in store:
                        continue
                    progress.print(name_of, style="dim")
                    try:
                        store[name_of] = run_one(prepare, case, batch, seed)
                    except Exception as error:  # noqa: BLE001 -- one broken contender must not lose the rest
                        absent[label] = f"{type(error).__name__}: {error}"
                        break
                    out.parent.mkdir(exist_ok=True)
                    out.write_text(json.dumps(store, indent=0, sort_keys=True) + "\n")
            labels = [*case.ours, *case.peers]
            results = Results.read(store, case, model, labels, seeds, n)
            for row in summarise(results):
                grid.add_row(*row, style="bold" if row[4].startswith("maodun") else None)
            gap = results.shortfall()
            if gap is not None and gap > ALLOWED:
                short.append(f"{name} on {model}: ours leaves {100 * gap:.2f} points more than the best peer")
            for who, why in absent.items():
                progress.print(f"{name} on {model}: {who} did not run: {why}", style="yellow", highlight=False)
    console.print(grid)
    for line in short:
        console.print(line, style="red", highlight=False)


if __name__ == "__main__":
    main()
