"""Which training objective is better, by how much, and how sure is that? From the runs of recipes/tables/training-*.

    python -m benchmarks.training_claims runs/training-mnist+runs/training-mnist-seed1 runs/training-mnist-unseen

Runs joined by + are of the same images and make one table. Shields are called "OBJECTIVE" or "OBJECTIVE, seed N"; seeds
of one objective are averaged. A sample stands when it is answered rightly and no spear of that threat fells it.
Intervals are 95 % percentiles of a bootstrap over the images, the same resampled images for all objectives, so
differences are paired. They say nothing of other seeds. With --calibration K, of a run with one threat: the calibration
of the clean images and of the last points of K steps of PGD on every image (a search for a verdict stops once a sample
is fooled; here nothing stops), before and after the temperature that fits the other half of the samples best.
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
from maodun.attacks.registry import build_attack
from maodun.core.threat import Threat
from maodun.defenses.training import Batch, Inner
from maodun.zoo import load_data, load_model

DRAWS = 10_000
Array = NDArray[Any]
Told = tuple[torch.Tensor, torch.Tensor]
"""Probabilities N x C and labels (N,)."""


class Table:
    """The records of finished runs on the same images: what stands, by threat and objective, one row per seed."""

    def __init__(self, folders: list[str]) -> None:
        self.manifests = []
        self.stands: dict[str, dict[str, dict[str, Array]]] = {"clean": {}}
        for folder in folders:
            store = Store(folder)
            manifest = store.manifest()
            self.manifests.append(manifest)
            shards = -(-manifest["data"]["samples"] // manifest["recipe"]["shard_size"])
            for cell in manifest["cells"]:
                records = store.read_table([f"records/{cell['name']}/{part_name(k)}.parquet" for k in range(shards)])
                self._add(cell, records["clean_correct"].to_numpy(), records["success"].to_numpy())
        if len({manifest["data"]["sha256"] for manifest in self.manifests}) > 1:
            raise SystemExit(f"{' and '.join(folders)} are of different images")
        self.name, self.n = self.manifests[0]["name"], self.manifests[0]["data"]["samples"]
        self.weights = np.random.default_rng(0).multinomial(self.n, np.full(self.n, 1 / self.n), size=DRAWS) / self.n

    def _add(self, cell: dict[str, Any], right: Array, success: Array) -> None:
        objective, threat = objective_of(cell["shield"]), f"{cell['norm']} {format_radius(cell['eps'])}"
        self.stands["clean"].setdefault(objective, {})[cell["shield"]] = right
        rows = self.stands.setdefault(threat, {}).setdefault(objective, {})
        rows[cell["shield"]] = rows.get(cell["shield"], right) & right & ~success

    def share(self, threats: list[str], objective: str) -> tuple[float, Array]:
        """Return the mean over seeds and threats of what stands, and its bootstrap draws."""
        rows = np.mean([np.mean(list(self.stands[t][objective].values()), axis=0) for t in threats], axis=0)
        return float(rows.mean()), self.weights @ rows


def objective_of(shield: str) -> str:
    """Return a shield's name without its seed."""
    return shield.partition(", seed")[0]


def told_by(
    manifests: list[dict[str, Any]], steps: int, limit: int | None = None, only: list[str] | None = None
) -> dict[str, dict[str, list[Told]]]:
    """Return what every shield answers: {"clean" or "PGD-steps": {objective: one pair per seed}}.

    On the run's images, or on the first `limit` of the same split; of the objectives in `only` where they are named.
    """
    found: dict[str, dict[str, list[Told]]] = {"clean": {}, f"PGD-{steps}": {}}
    for recipe in (manifest["recipe"] for manifest in manifests):
        data = load_data(recipe["data"]["spec"], split=recipe["data"]["split"], limit=limit or recipe["data"]["limit"])
        threat = Threat(recipe["threats"][0]["norm"], recipe["threats"][0]["eps"])
        attack = Inner(build_attack("pgd", steps=steps), threat, recipe["seed"])
        for shield in (each for each in recipe["shields"] if only is None or objective_of(each["name"]) in only):
            model = load_model(shield["model"], weights=shield["weights"], options=shield["model_options"]).model
            answers: list[list[torch.Tensor]] = [[], []]
            for rows in torch.split(torch.arange(len(data)), 250):
                for place, x in enumerate((data.x[rows], attack(model, Batch(data.x[rows], data.y[rows], rows, 0)))):
                    with torch.no_grad():
                        answers[place].append(model(x).double().softmax(1))
            for kind, parts in zip(found, answers, strict=True):
                found[kind].setdefault(objective_of(shield["name"]), []).append((torch.cat(parts), data.y))
    return found


def points(value: float, draws: Array, sign: str = "") -> str:
    """Return a share and its interval in points."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def show(table: Table, against: list[str]) -> None:
    """Print the shares, the mean over the threats, and the differences from each of `against`."""
    threats = [name for name in table.stands if name != "clean"]
    columns = {"clean": ["clean"], **{name: [name] for name in threats}}
    if len(threats) > 1:
        columns["mean of threats"] = threats
    objectives = list(table.stands["clean"])
    print(f"\n{table.name}: {table.n} images, per cent standing; {DRAWS} bootstrap draws\n")
    print("| objective | seeds | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for objective in objectives:
        cells = [points(*table.share(names, objective)) for names in columns.values()]
        print(f"| {objective} | {len(table.stands['clean'][objective])} | " + " | ".join(cells) + " |")
    for base in against:
        for objective in objectives:
            if base in objectives and objective != base:
                both = {k: (table.share(which, objective), table.share(which, base)) for k, which in columns.items()}
                text = (f"{k} {points(a[0] - b[0], a[1] - b[1], '+')}" for k, (a, b) in both.items())
                print(f"{objective} - {base}: " + "; ".join(text))


def show_calibration(told: dict[str, dict[str, list[Told]]], base: str, draws: int) -> None:
    """Print calibration errors, means over seeds, with bootstrap intervals and paired differences from `base`."""
    for kind, answers in told.items():
        print(f"\ncalibration, {kind}\n\n| objective | ECE | over | under | T | ECE after | under after |")
        print("|" + "---|" * 7)
        for objective, pairs in answers.items():
            before, after = [calibrate(*pair) for pair in pairs], [after_temperature(*pair) for pair in pairs]
            over, warm = np.mean([s.over for s in before]), np.mean([t for t, _ in after])
            rest = np.mean([(s.ece, s.under) for _, s in after], axis=0)
            ece, under = (points_of(resampled(pairs, of, draws)) for of in (ece_of, under_of))
            print(f"| {objective} | {ece} | {over:.3f} | {under} | {warm:.2f} | {rest[0]:.3f} | {rest[1]:.3f} |")
        for objective in answers:
            if base in answers and objective != base:
                for name, of in (("ECE", ece_of), ("under", under_of), ("ECE after T", warm_of)):
                    pairs = (resampled(answers[each], of, draws) for each in (objective, base))
                    print(f"{objective} - {base}, {name}: {points_of(np.subtract(*pairs), '+')}")


def ece_of(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error."""
    return calibrate(probabilities, labels).ece


def under_of(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Its under-confident part."""
    return calibrate(probabilities, labels).under


def warm_of(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error after the best temperature."""
    return after_temperature(probabilities, labels)[1].ece


def resampled(pairs: list[Told], of: Callable[[torch.Tensor, torch.Tensor], float], draws: int) -> Array:
    """Return the mean over seeds of a statistic: of the samples as they are, then of `draws` resamples."""
    rng, n = np.random.default_rng(0), len(pairs[0][1])
    values = [np.mean([of(*pair) for pair in pairs])]
    for _ in range(draws):
        rows = torch.from_numpy(rng.integers(0, n, n))
        values.append(np.mean([of(told[rows], labels[rows]) for told, labels in pairs]))
    return np.array(values)


def points_of(values: Array, sign: str = "") -> str:
    """Return the first value and the 95 % interval of the others."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main() -> None:
    """Print the tables of every run named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="+")
    parser.add_argument("--against", default="PGD training,TRADES")
    parser.add_argument("--calibration", type=int, default=0)
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap of the calibration")
    parser.add_argument("--images", type=int, help="for the calibration; otherwise the run's")
    options = parser.parse_args()
    for folders in options.run:
        table = Table(folders.split("+"))
        show(table, options.against.split(","))
        if options.calibration:
            told = told_by(table.manifests, options.calibration, options.images)
            show_calibration(told, options.against.split(",")[0], options.draws)


if __name__ == "__main__":
    main()
