"""`python -m benchmarks.speed`: time ratio to the fastest peer, strength, calls and overhead of every attack."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import table
from benchmarks.cases import BY_NAME, shortened
from benchmarks.measure import Outcome, measure
from benchmarks.subjects import SUBJECTS, load

RESULTS = Path(__file__).parent / "results"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--attack", help="comma separated cases (default: all): " + ", ".join(BY_NAME))
    parser.add_argument("--model", default="digits-cnn-at,cifar10-resnet8-at", help=", ".join(SUBJECTS))
    parser.add_argument("--who", help="comma separated contenders to keep, e.g. maodun,advlib")
    parser.add_argument("--n", type=int, default=128, help="samples (default 128)")
    parser.add_argument("--heavy-n", type=int, default=32, help="samples of the long attacks (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; 0 counts and scores only (default 5)")
    parser.add_argument("--heavy-repeats", type=int, help="rounds of the long attacks (default: as --repeats)")
    parser.add_argument("--quick", action="store_true", help="short attacks, 32 samples, 2 rounds: a check only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file (default: results/speed.json, or speed-quick.json)")
    return parser.parse_args(argv)


def _chosen(text: str | None, known: dict[str, object], what: str) -> list[str]:
    names = list(known) if text is None else [t.strip() for t in text.split(",") if t.strip()]
    for name in names:
        if name not in known:
            sys.exit(f"{what} '{name}': is not known here; choose from {', '.join(known)}")
    return names


def write(path: Path, rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    """Merge rows into a JSON file: a row replaces the older one of the same attack, model and contender."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {(r["attack"], r["model"], r["who"]) for r in rows}
    kept = [r for r in old if (r["attack"], r["model"], r["who"]) not in fresh]
    about = {
        "command": "python -m benchmarks.speed", "torch": torch.__version__, "python": platform.python_version(),
        "threads": options.threads, "machine": platform.machine(), "clock": "time.process_time, interleaved rounds",
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    order = {name: i for i, name in enumerate(BY_NAME)}
    merged = sorted([*kept, *rows], key=lambda r: (order.get(str(r["attack"]), 99), str(r["model"])))
    path.write_text(json.dumps({"about": about, "rows": merged}, indent=1, default=str) + "\n")


def show(console: Console, rows: list[dict[str, object]]) -> None:
    """Print rows as a table, ours in bold."""
    grid = Table(*table.COLUMNS, box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*table.cells(row), style="bold" if str(row["who"]).startswith("maodun") else None)
    console.print(grid)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and store."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 170)
    progress = Console(stderr=True)
    cases = [BY_NAME[name] for name in _chosen(options.attack, dict(BY_NAME), "attack")]
    names = _chosen(options.model, dict(SUBJECTS), "model")
    n = min(options.n, 32) if options.quick else options.n
    only = {w.strip() for w in options.who.split(",")} if options.who else None
    out = options.out or RESULTS / ("speed-quick.json" if options.quick else "speed.json")
    outcomes: list[Outcome] = []
    for name in names:
        try:
            batch = load(name, n)
        except LookupError as error:
            progress.print(f"{name}: skipped: {error}")
            continue
        for case in cases:
            repeats = min(options.repeats, 2) if options.quick else options.repeats
            if case.heavy and options.heavy_repeats is not None:
                repeats = options.heavy_repeats
            chosen = shortened(case) if options.quick else case
            some = batch.head(options.heavy_n) if case.heavy else batch
            outcome = measure(chosen, some, repeats=repeats, only=only, say=lambda s: progress.print(s, style="dim"))
            outcomes.append(outcome)
            found = table.rows(outcome)
            show(console, found)
            write(out, found, options)
    if outcomes:
        out.with_suffix(".md").write_text(table.markdown(json.loads(out.read_text())["rows"]))
    for line in table.absences(outcomes):
        console.print(line, style="yellow", highlight=False)


if __name__ == "__main__":
    main()
