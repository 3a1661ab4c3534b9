"""Which training objective is better, by how much, and how sure is that? From the runs of recipes/tables/training-*.

    python -m benchmarks.training_claims runs/training-mnist runs/training-mnist-unseen

Shields are called "OBJECTIVE" or "OBJECTIVE, seed N"; seeds of one objective are averaged. A sample stands when it is
answered rightly and no spear of that threat fells it. Intervals are 95 % percentiles of a bootstrap over the images,
the same resampled images for all objectives of a run, so differences are paired. They say nothing of other seeds.
Calibration is that of the clean inputs and of the inputs of the spear called `--calibration`, before and after the
temperature that fits the other half of the samples best.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maodun.arena.calibration import calibrate
from maodun.arena.confidence import after_temperature
from maodun.arena.recipe import format_radius
from maodun.arena.store import Store, part_name

DRAWS = 10_000
Array = NDArray[Any]
Probabilities = tuple[torch.Tensor, torch.Tensor]


class Run:
    """The records of one finished run: what stands, by threat and objective, one row per seed."""

    def __init__(self, folder: str, calibration: str) -> None:
        store = Store(folder)
        manifest = store.manifest()
        shards = -(-manifest["data"]["samples"] // manifest["recipe"]["shard_size"])
        self.name, self.n = manifest["name"], manifest["data"]["samples"]
        self.stands: dict[str, dict[str, dict[str, Array]]] = {"clean": {}}
        self.said: dict[str, dict[str, list[Probabilities]]] = {}
        for cell in manifest["cells"]:
            table = store.read_table([f"records/{cell['name']}/{part_name(k)}.parquet" for k in range(shards)])
            objective, shield = cell["shield"].split(", seed")[0], cell["shield"]
            threat = f"{cell['norm']} {format_radius(cell['eps'])}"
            right = table["clean_correct"].to_numpy()
            self.stands["clean"].setdefault(objective, {})[shield] = right
            rows = self.stands.setdefault(threat, {}).setdefault(objective, {})
            rows[shield] = rows.get(shield, right) & right & ~table["success"].to_numpy()
            if cell["spear"] == calibration:
                labels = torch.from_numpy(table["label"].to_numpy().copy())
                for kind, column in (("clean", "clean_probs"), (f"{calibration}, {threat}", "adv_probs")):
                    told = torch.tensor(np.stack(table[column].to_numpy()), dtype=torch.float64)
                    self.said.setdefault(kind, {}).setdefault(objective, []).append((told, labels))
        self.weights = np.random.default_rng(0).multinomial(self.n, np.full(self.n, 1 / self.n), size=DRAWS) / self.n

    def share(self, threats: list[str], objective: str) -> tuple[float, Array]:
        """Return the mean over seeds and threats of what stands, and its bootstrap draws."""
        rows = np.mean([np.mean(list(self.stands[t][objective].values()), axis=0) for t in threats], axis=0)
        return float(rows.mean()), self.weights @ rows


def points(value: float, draws: Array, sign: str = "") -> str:
    """Return a share and its interval in points."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def show(run: Run, against: list[str]) -> None:
    """Print a run's shares, the mean over its threats, and the differences from each of `against`."""
    threats = [name for name in run.stands if name != "clean"]
    columns = {"clean": ["clean"], **{name: [name] for name in threats}}
    if len(threats) > 1:
        columns["mean of threats"] = threats
    objectives = list(run.stands["clean"])
    print(f"\n{run.name}: {run.n} images, per cent standing; {DRAWS} bootstrap draws\n")
    print("| objective | seeds | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for objective in objectives:
        cells = [points(*run.share(names, objective)) for names in columns.values()]
        print(f"| {objective} | {len(run.stands['clean'][objective])} | " + " | ".join(cells) + " |")
    for base in against:
        for objective in objectives:
            if base in objectives and objective != base:
                pairs = {name: (run.share(which, objective), run.share(which, base)) for name, which in columns.items()}
                text = (f"{k} {points(a[0] - b[0], a[1] - b[1], '+')}" for k, (a, b) in pairs.items())
                print(f"{objective} - {base}: " + "; ".join(text))


def show_calibration(run: Run, draws: int = 200) -> None:
    """Print calibration errors, means over seeds, with a bootstrap interval of the under-confidence before scaling."""
    for kind, told in run.said.items():
        print(
            f"\ncalibration, {kind}\n\n| objective | ECE | over | under | T | ECE after | under after |\n|" + "---|" * 7
        )
        for objective, pairs in told.items():
            before = [calibrate(*pair) for pair in pairs]
            after = [after_temperature(*pair) for pair in pairs]
            ece = interval_of(pairs, lambda p, y: calibrate(p, y).ece, draws)
            under = interval_of(pairs, lambda p, y: calibrate(p, y).under, draws)
            mean = [float(np.mean(v)) for v in ([s.over for s in before], [t for t, _ in after])]
            rest = [float(np.mean(v)) for v in ([s.ece for _, s in after], [s.under for _, s in after])]
            print(f"| {objective} | {ece} | {mean[0]:.3f} | {under} | {mean[1]:.2f} | {rest[0]:.3f} | {rest[1]:.3f} |")


def interval_of(pairs: list[Probabilities], of: Callable[[torch.Tensor, torch.Tensor], float], draws: int) -> str:
    """Return the mean over seeds of a statistic and its 95 % bootstrap interval over the images."""
    rng = np.random.default_rng(0)
    n = len(pairs[0][1])
    values = []
    for _ in range(draws):
        rows = torch.from_numpy(rng.integers(0, n, n))
        values.append(np.mean([of(told[rows], labels[rows]) for told, labels in pairs]))
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{np.mean([of(*pair) for pair in pairs]):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Print the tables of every run named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="+")
    parser.add_argument("--against", default="PGD training,TRADES")
    parser.add_argument("--calibration", default="PGD-20")
    options = parser.parse_args()
    for folder in options.run:
        run = Run(folder, options.calibration)
        show(run, options.against.split(","))
        show_calibration(run)


if __name__ == "__main__":
    main()
