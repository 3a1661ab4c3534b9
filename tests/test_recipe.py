"""Recipes: what is accepted, how mistakes are named, and what decides their identity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from maodun.arena.recipe import format_radius, load_recipe, make_recipe, parse_radius, parse_recipe
from maodun.core.errors import InputError

GOOD = """\
name: digits
seed: 3
data: {spec: digits, split: test, limit: 500}
threats: [{norm: linf, eps: 8/255}, {norm: l2}]
shields:
  - {name: none, model: "zoo:digits-cnn"}
  - {name: bit depth, model: "zoo:digits-cnn", defense: bit_depth, options: {bits: 3}}
spears:
  - {attack: pgd, options: {steps: 40}}
  - {attack: pgd, name: "PGD (EOT, BPDA)", options: {steps: 40}, gradient: bpda, eot: 8}
verdict: {rule: majority, draws: 10}
shard_size: 256
diagnostics: true
"""


def test_the_contract_s_recipe_is_read() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.threats[0].eps == pytest.approx(8 / 255)
    assert math.isinf(recipe.threats[1].eps)
    assert recipe.shields[0].label == "none"
    assert recipe.shields[1].options == {"bits": 3}
    assert [spear.label for spear in recipe.spears] == ["pgd", "PGD (EOT, BPDA)"]
    assert recipe.compute.batch_size is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (0.15, 0.15), ("inf", math.inf), (None, math.inf), (0, 0.0), ("1e-3", 1e-3), (" 1 / 2 ", 0.5)],
)
def test_radius(text: object, value: float) -> None:
    assert parse_radius(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1/255", -0.1, "nan", "8/0", "eight", True, [1], "1/2/3"])
def test_radius_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"radius|number"):
        parse_radius(text)


@pytest.mark.parametrize(
    ("eps", "text"), [(8 / 255, "8/255"), (0.15, "0.15"), (math.inf, "inf"), (0.3, "0.3"), (1, "1")]
)
def test_radius_is_written_as_people_do(eps: float, text: str) -> None:
    assert format_radius(eps) == text
    assert parse_radius(text) == pytest.approx(eps)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("options: {steps: 40}}\n", "optoins: {steps: 40}}\n", 9, ("spears.0.optoins", "did you mean 'options'?")),
        ("shard_size: 256", "shard_sise: 256", 12, ("shard_sise", "did you mean 'shard_size'?")),
        ("seed: 3", "seed: three", 2, ("seed",)),
        ("norm: linf", "norm: lynf", 4, ("threats.0.norm", "'linf'")),
        ("eps: 8/255", "eps: -8/255", 4, ("threats.0.eps", "cannot be -8/255")),
        ("rule: majority", "rule: mayority", 11, ("verdict.rule", "'majority'")),
        ("draws: 10", "draws: 0", 11, ("verdict.draws",)),
        ("limit: 500", "limit: 0", 3, ("data.limit",)),
        ("seed: 3", "name: twice", 2, ("already given on line 1",)),
        ('name: "PGD (EOT, BPDA)"', "name: pgd", 10, ("two spears are called 'pgd'",)),
        ("{norm: l2}", "{norm: l2", 4, ("not valid YAML",)),
        ("data:", "daat:", 3, ("unknown key 'daat'", "did you mean 'data'?")),
    ],
)
def test_mistakes_are_named_with_their_line(old: str, new: str, line: int, words: tuple[str, ...]) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(InputError) as caught:
        parse_recipe(text, source="digits.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert any(f"digits.yaml line {near}:" in message for near in (line, line + 1))
    for word in words:
        assert word in message


def test_missing_key_and_wrong_kind() -> None:
    with pytest.raises(InputError, match="'shields' is missing"):
        parse_recipe("data: {spec: digits}\nthreats: [{norm: l2}]\nspears: [{attack: pgd}]\n")
    for text in ("", "[1, 2]", "word"):
        with pytest.raises(InputError, match="not a mapping"):
            parse_recipe(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_yaml_cannot_run_code() -> None:
    with pytest.raises(InputError, match="not valid YAML"):
        parse_recipe("name: !!python/object/apply:os.getcwd []\n")


def test_identity_ignores_how_it_is_computed() -> None:
    recipe = parse_recipe(GOOD)
    same = parse_recipe(GOOD.replace("diagnostics: true", "diagnostics: false") + "compute: {batch_size: 7}\n")
    assert same.digest() == recipe.digest()
    for old, new in (("seed: 3", "seed: 4"), ("8/255", "7/255"), ("steps: 40", "steps: 41"), ("256", "128")):
        assert parse_recipe(GOOD.replace(old, new)).digest() != recipe.digest()
    assert parse_recipe(GOOD + "compute: {precision: bf16}\n").digest() != recipe.digest()


def test_dump_reads_back() -> None:
    recipe = parse_recipe(GOOD)
    again = make_recipe(recipe.model_dump(mode="json"))
    assert again == recipe
    assert again.digest() == recipe.digest()
