"""The registry: every attack has a name, a sentence and checked options."""

from __future__ import annotations

import dataclasses

import pytest

from maodun.attacks.gradient.pgd import PGD
from maodun.attacks.registry import ATTACKS, build_attack, describe, get_attack, options_of
from maodun.core.engine import Attack
from maodun.core.errors import InputError

NAMES = {
    "fgsm", "bim", "pgd", "mifgsm", "nifgsm", "lowfreq", "apgd", "apgd-t", "deepfool", "cw", "ddn", "fmn", "fab",
    "square", "autoattack", "autoattack-plus", "autoattack-rand", "sharp", "stadv", "lavan", "rays", "hopskipjump",
    "nes", "spsa", "simba", "bandits", "boundary", "geoda", "transfer", "dr", "nrdm", "ssp", "fia", "ila", "relation",
    "jsma", "diffhammer", "diffattack",
    "maxconf",
    "orthogonal",
}  # fmt: skip


def test_every_promised_attack_is_there_under_its_own_name():
    assert set(ATTACKS) == NAMES and len(ATTACKS) == len(NAMES)
    for name, attack in ATTACKS.items():
        assert issubclass(attack, Attack) and attack.name == name
        assert attack().name == name and attack().total_steps >= 1


def test_descriptions_say_what_an_attack_offers():
    rows = {row.name: row for row in describe()}
    assert set(rows) == NAMES
    assert all(row.summary and "\n" not in row.summary for row in rows.values())
    assert rows["square"].access == "scores" and rows["square"].images_only
    assert rows["cw"].kind == "minimum" and rows["pgd"].kind == "fixed"
    assert rows["apgd"].norms == ("linf", "l2", "l1") and rows["apgd"].targeted


def test_defaults_and_options_reach_the_attack():
    assert build_attack("pgd") == PGD()
    assert build_attack("pgd", steps=7, step_size=1, random_start=False) == PGD(
        steps=7, step_size=1.0, random_start=False
    )
    assert isinstance(build_attack("pgd", step_size=1).step_size, float)
    for name in ("apgd", "square", "autoattack-rand"):
        assert "steps" in options_of(get_attack(name)) or "queries" in options_of(get_attack(name))


def test_a_copy_from_its_repr_is_the_same_attack():
    attack = build_attack("mifgsm", steps=3, decay=0.5)
    fields = {entry.name: getattr(attack, entry.name) for entry in dataclasses.fields(attack)}
    assert build_attack("mifgsm", **fields) == attack


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pdg", {}, "did you mean 'pgd'"),
        ("autoatack", {}, "did you mean 'autoattack'"),
        ("zzz", {}, "known: apgd"),
        ("pgd", {"step": 3}, "known: loss, random_start, restarts, step_size, steps"),
        ("pgd", {"steps": "ten"}, "must be an integer"),
        ("pgd", {"steps": 2.5}, "must be an integer"),
        ("pgd", {"steps": True}, "must be an integer"),
        ("pgd", {"step_size": "big"}, "must be a number or nothing"),
        ("pgd", {"random_start": 1}, "true or false"),
        ("pgd", {"loss": "crossentropy"}, "is not a loss"),
        ("apgd-t", {"targets": 0}, "at least 1"),
        ("autoattack", {"version": "standart"}, "did you mean 'standard'"),
    ],
)
def test_mistakes_are_named_with_their_remedy(name, options, words):
    with pytest.raises(InputError, match=words):
        build_attack(name, **options)
