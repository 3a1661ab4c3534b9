"""What is typed after a command means the recipe one would write by hand."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest

from maodun.app import endings, flags
from maodun.arena.recipe import parse_recipe
from maodun.core.errors import InputError


def given(**words: object) -> flags.Flags:
    return flags.Flags(**{"model": "zoo:digits-cnn", "data": "digits", **words})


def test_flags_are_the_recipe_written_by_hand() -> None:
    by_hand = parse_recipe(
        """
        name: zoo:digits-cnn on digits
        seed: 3
        data: {spec: digits, limit: 20}
        threats: [{norm: l2, eps: 0.5, targeted: true}, {norm: l2, eps: 8/255, targeted: true}]
        shields: [{model: "zoo:digits-cnn", defense: bit_depth, options: {bits: 3}}]
        spears:
          - {attack: pgd, options: {steps: 10, loss: dlr}, gradient: bpda, eot: 4}
          - {attack: square, gradient: bpda, eot: 4}
        verdict: {rule: majority, draws: 7}
        compute: {batch_size: 16, precision: bf16, channels_last: true}
        diagnostics: false
        """
    )
    by_flags = given(
        seed=3,
        limit=20,
        norm="l2",
        eps="0.5, 8/255",
        targeted=True,
        defense="bit_depth:bits=3",
        attack="pgd:steps=10:loss=dlr,square",
        gradient="bpda",
        eot=4,
        rule="majority",
        draws=7,
        batch_size="16",
        precision="bf16",
        channels_last=True,
    ).recipe()
    assert by_flags == by_hand
    assert by_flags.digest() == by_hand.digest()


def test_the_same_attack_twice_keeps_two_names() -> None:
    spears = given(eps="0.1", attack="pgd:steps=1,pgd:steps=9,fgsm").recipe().spears
    assert [spear.label for spear in spears] == ["pgd:steps=1", "pgd:steps=9", "fgsm"]


@pytest.mark.parametrize(
    ("text", "radii"),
    [(None, [math.inf]), ("8/255", [8 / 255]), ("0, 0.5,1", [0.0, 0.5, 1.0]), ("inf", [math.inf])],
)
def test_radii(text: str | None, radii: list[float]) -> None:
    assert flags.parse_radii(text) == radii


@pytest.mark.parametrize("text", ["eight", "-0.1", "8/0", "nan", "0.1,,0.2", ""])
def test_wrong_radii(text: str) -> None:
    with pytest.raises(InputError, match="eps"):
        flags.parse_radii(text)


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5"])
def test_wrong_batch_sizes(text: str) -> None:
    with pytest.raises(InputError, match="batch-size"):
        flags.parse_batch_size(text)


def test_option_values_are_typed() -> None:
    options = flags.parse_options(["steps=40", "step-size=0.5", "loss=dlr", "on=true", "off=null"], thing="--x")
    assert options == {"steps": 40, "step_size": 0.5, "loss": "dlr", "on": True, "off": None}
    with pytest.raises(InputError, match="key=value"):
        flags.parse_options(["steps"], thing="--x")


def test_every_flag_of_the_dataclasses_is_a_flag_of_the_command(maodun) -> None:
    for command in ("evaluate", "attack"):
        shown = maodun(command, "--help").out
        for kind in (flags.EvaluateFlags if command == "evaluate" else flags.Flags, flags.RunFlags):
            for name in kind.__dataclass_fields__:
                assert "--" + name.replace("_", "-")[:14] in shown, (command, name)


def test_usage_errors_are_one_line(maodun) -> None:
    for words in (["nonsense"], ["evaluate"], ["evaluate", "--nope"], ["list", "cars"], ["arena"]):
        assert "see maodun" in maodun(*words).error


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = (
        "import sys, maodun.app.cli as c; code = c.run(['--help']);"
        "sys.exit(code or 10 * any(m in sys.modules for m in ('torch', 'numpy', 'pyarrow')))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < 5  # about 0.3 s on an idle machine


def test_an_interrupt_before_the_work_is_no_error(maodun, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flags.Flags, "recipe", interrupted)
    done = maodun("evaluate", "--model", "zoo:digits-cnn", "--data", "digits", "--eps", "0.1")
    assert done.code == endings.INTERRUPTED
    assert "interrupted" in done.err


def test_the_recorded_command_gives_the_same_flags_again() -> None:
    given_flags = flags.EvaluateFlags(
        model="victims:linear", data="npz:my data.npz", eps="8/255", model_option=["a=1", "b=2"], diagnostics=False
    )
    line = flags.spell("evaluate", given_flags, flags.RunFlags(out="runs/x"))
    assert line == (
        "maodun evaluate --model victims:linear --data 'npz:my data.npz' --eps 8/255 "
        "--model-option a=1 --model-option b=2 --no-diagnostics --out runs/x"
    )


def test_left_out_the_gradient_is_the_one_that_sees_through_the_defence() -> None:
    def asked(**words: object) -> str:
        return given(eps="0.1", attack="pgd", **words).recipe().spears[0].gradient

    assert asked() == "exact"
    assert asked(defense="bit_depth:bits=3") == "auto"
    assert asked(defense="bit_depth,gaussian") == "auto"
    assert asked(defense="bit_depth", gradient="exact") == "exact"
    assert asked(defense="bit_depth", surrogate="zoo:digits-cnn") == "exact"
    assert given(model="http://localhost/x", eps="0.1", attack="pgd", defense="jpeg").recipe().spears[0].gradient == (
        "exact"
    )
