"""Do the orderings known from the literature hold? Paired differences of a transfer run's black-box success.

    python -m benchmarks.transfer_orderings runs/transfer

Reads the records of a finished `maodun arena recipes/transfer.yaml`. Held-out targets are the shields that no spear
searched on. A spear's success against a target is counted among the samples the target answers correctly; a group of
spears (one attack from every single surrogate) has the mean over its members and the held-out targets. Intervals are
95 % percentiles of a paired bootstrap over the images, the same resampled images for both sides of a difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maodun.arena.store import Store, part_name

DRAWS = 10_000
Array = NDArray[Any]


class Run:
    """The successes of every cell with surrogates, by (norm, eps, spear, target), on the samples in order."""

    def __init__(self, folder: str) -> None:
        store = Store(folder)
        manifest = store.manifest()
        shards = -(-manifest["data"]["samples"] // manifest["recipe"]["shard_size"])
        self.success: dict[tuple[float, str, str], Array] = {}
        self.correct: dict[str, Array] = {}
        self.surrogates: dict[str, tuple[str, ...]] = {}
        self.attack: dict[str, str] = {}
        self.white: set[tuple[str, str]] = set()
        for cell in manifest["cells"]:
            if not cell["surrogates"]:
                continue
            parts = [f"records/{cell['name']}/{part_name(number)}.parquet" for number in range(shards)]
            table = store.read_table(parts)
            self.success[cell["eps"], cell["spear"], cell["shield"]] = table["success"].to_numpy()
            self.correct[cell["shield"]] = table["clean_correct"].to_numpy()
            self.surrogates[cell["spear"]] = tuple(cell["surrogates"])
            self.attack[cell["spear"]] = cell["hooks"]
            self.white |= {(cell["spear"], cell["shield"])} if cell["white_box"] else set()
        seen = {target for _, target in self.white}
        self.held_out = [target for target in self.correct if target not in seen]
        self.radii = sorted({eps for eps, _, _ in self.success})
        n = len(next(iter(self.correct.values())))
        self.weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS)

    def spears(self, attack: str, *, single: bool) -> list[str]:
        """Return the spears of one attack, those with one surrogate or those with several."""
        own = [name for name, called in self.attack.items() if called == attack]
        return [name for name in own if (len(self.surrogates[name]) == 1) == single]

    def black_box(self, eps: float, spears: Sequence[str], targets: Sequence[str]) -> tuple[float, Array]:
        """Return the mean success over spears and those targets that are not white box: value and bootstrap draws."""
        values, draws = [], []
        for spear in spears:
            for target in (one for one in targets if (spear, one) not in self.white):
                correct, success = self.correct[target], self.success[eps, spear, target]
                values.append(success[correct].mean())
                draws.append((self.weights[:, correct] @ success[correct]) / self.weights[:, correct].sum(1))
        return float(np.mean(values)), np.mean(draws, axis=0)


def main() -> None:
    """Print the groups and the differences as tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    run = Run(parser.parse_args().run)
    attacks = list(dict.fromkeys(run.attack.values()))
    singles = {f"{attack}, one surrogate": run.spears(attack, single=True) for attack in attacks}
    several = {f"{attack}, ensemble": run.spears(attack, single=False) for attack in attacks}
    groups = {name: spears for name, spears in (singles | several).items() if spears}
    pairs = [
        ("mi, one surrogate", "bim, one surrogate"),
        *((name, "mi, one surrogate") for name in singles if not name.startswith(("bim", "mi, "))),
        ("mi, ensemble", "mi, one surrogate"),
        ("mi, ensemble", "best single mi"),
        ("di-mi, ensemble", "best single di-mi"),
        *((name, "mi, ensemble") for name in groups if name.endswith("ensemble") and name != "mi, ensemble"),
    ]
    print(f"{len(run.weights[0])} images; {DRAWS} bootstrap draws")
    for eps in run.radii:
        print(f"\neps {eps * 255:.0f}/255, held-out targets {', '.join(run.held_out)}")
        found = {name: run.black_box(eps, spears, run.held_out) for name, spears in groups.items()}
        for attack in ("mi", "di-mi"):
            each = [run.black_box(eps, [spear], run.held_out) for spear in run.spears(attack, single=True)]
            if each:
                found[f"best single {attack}"] = max(each, key=lambda one: one[0])
        show(found, pairs)
        if set(run.held_out) != set(run.correct) and any(singles.values()):
            print(f"\neps {eps * 255:.0f}/255, every target but the surrogate itself")
            everywhere = list(run.correct)
            alone = {name: run.black_box(eps, spears, everywhere) for name, spears in singles.items() if spears}
            show(alone, pairs)


def show(found: dict[str, tuple[float, Array]], pairs: list[tuple[str, str]]) -> None:
    """Print the values of the groups and the differences of the pairs that are among them."""
    for name, (value, draws) in found.items():
        low, high = np.percentile(draws, [2.5, 97.5])
        print(f"  {name:28s} {100 * value:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    for one, two in pairs:
        if one in found and two in found:
            low, high = np.percentile(found[one][1] - found[two][1], [2.5, 97.5])
            value = 100 * (found[one][0] - found[two][0])
            print(f"  {one} - {two}: {value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")


if __name__ == "__main__":
    main()
