"""Trained attacks as files: what is saved is what is loaded, and what cannot be meant is refused by name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import maodun
from maodun.attacks import artifacts
from maodun.attacks.artifacts import TrainedAttack, list_artifacts, load_attack, save_artifact
from maodun.attacks.registry import build_attack
from maodun.core.engine import Attack
from maodun.core.errors import InputError, StoreError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.status import Status
from maodun.core.threat import Threat


@dataclass(frozen=True, kw_only=True)
class Shift(TrainedAttack):
    """Adds one image to all images, and noise keyed by the sample id after the first try."""

    name: ClassVar[str] = "shift"

    scale: float = 1.0
    many: int = 1

    @property
    def tries(self):
        return self.many

    def craft(self, x, ids, stream, eps, number):
        noise = stream.uniform(ids, self.shape, number) if number else 0.0
        return x + self.scale * self.tensors["delta"].to(x) + noise


class Linear(nn.Module):
    """Class 1 when the mean of the inputs exceeds a half, class 0 otherwise."""

    def forward(self, x):
        score = x.flatten(1).mean(1) - 0.5
        return torch.stack([-score, score], 1)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    import sys
    import types

    room = types.ModuleType("maodun.attacks.shift_for_tests")
    room.Shift = Shift
    monkeypatch.setitem(sys.modules, room.__name__, room)
    monkeypatch.setitem(artifacts.KINDS, "shift", "shift_for_tests")


def shift(**options):
    return Shift(shape=(1, 2, 3), eps=0.3, tensors={"delta": torch.full((1, 2, 3), 0.2)}, **options)


def images(n=4, value=0.4):
    return torch.full((n, 1, 2, 3), value), torch.zeros(n, dtype=torch.int64)


def test_a_file_gives_back_the_same_attack(tmp_path):
    attack = shift(scale=1.5, about={"trained on": "nothing"})
    path = save_artifact(attack, tmp_path / "deep" / "a.safetensors")
    again = load_attack(path)
    assert again == attack
    assert hash(again) == hash(attack)
    assert torch.equal(again.tensors["delta"], attack.tensors["delta"])
    assert dict(again.about) == {"trained on": "nothing"}
    assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_attack(path, sha256=again.sha256) == attack
    assert [(file, head["kind"]) for file, head in list_artifacts(tmp_path)] == [(path, "shift")]
    assert not list(tmp_path.rglob("*.part"))


def test_other_tensors_or_options_are_another_attack():
    other = Shift(shape=(1, 2, 3), eps=0.3, tensors={"delta": torch.full((1, 2, 3), 0.21)})
    assert len({shift(), shift(scale=2.0), other}) == 3
    assert shift().sha256 in repr(shift())


def test_it_costs_one_query_and_only_what_fools_the_target_is_kept():
    x, y = images()
    x[0] = 0.1
    found = shift().run(Oracle(Linear(), access="decision"), x, y, Threat("linf", 0.3))
    assert found.status.tolist() == [int(Status.exhausted_steps), *[int(Status.found)] * 3]
    assert found.queries.tolist() == [2] * 4
    assert found.backwards.sum() == 0
    torch.testing.assert_close(found.x_adv[1:], x[1:] + 0.2)
    assert torch.equal(found.x_adv[0], x[0])


def test_the_radius_asked_for_holds():
    x, y = images()
    made = shift(scale=4.0).candidates(x, torch.arange(4), Threat("linf", 0.05))
    torch.testing.assert_close(made, x + 0.05)
    found = shift().run(Oracle(Linear()), x, y, Threat("linf", 0.05))
    assert not found.found.any()


@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_later_try_depends_on_the_sample_alone(size):
    x, _ = images(7)
    ids = torch.tensor([5, 3, 9, 1, 0, 2, 8])
    whole = shift(many=2).candidates(x, ids, Threat("linf", 0.3), seed=4, number=1)
    parts = [
        shift(many=2).candidates(a, b, Threat("linf", 0.3), seed=4, number=1)
        for a, b in zip(x.split(size), ids.split(size), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(shift().candidates(x.flip(0), ids.flip(0), Threat("linf", 0.3), 4, 1), whole.flip(0))


def test_the_next_try_goes_to_those_still_standing():
    x, y = images(6, 0.1)
    found = shift(many=5).run(Oracle(Linear()), x, y, Threat("linf", 0.5), seed=1)
    assert found.found.all()
    assert 2 < int(found.queries.max()) <= 6


def test_file_colon_path_is_an_attack_by_name(tmp_path):
    x, y = images()
    path = save_artifact(shift(), tmp_path / "a.safetensors")
    assert isinstance(build_attack(f"file:{path}"), Attack)
    assert build_attack(f"file:{path}", scale=2).scale == 2.0
    made = maodun.attack(Linear(), x, y, f"file:{path}", norm="linf", eps=0.3)
    assert made.found.all()
    summary = maodun.evaluate(Linear(), (x, y), norm="linf", eps=0.3, attack=f"file:{path}", diagnostics=False)
    assert summary.robust.value == 0.0


def test_a_run_does_not_go_on_with_another_file_of_the_same_name(tmp_path):
    x, y = images()
    path, run = tmp_path / "a.safetensors", tmp_path / "run"
    save_artifact(shift(), path)
    given = {"norm": "linf", "eps": 0.3, "attack": f"file:{path}", "diagnostics": False, "out": run}
    maodun.evaluate(Linear(), (x, y), **given)
    maodun.evaluate(Linear(), (x, y), **given)
    save_artifact(shift(scale=0.5), path)
    with pytest.raises(StoreError, match="another recipe"):
        maodun.evaluate(Linear(), (x, y), **given)


def test_a_kind_without_a_file_says_what_to_do():
    with pytest.raises(InputError, match="maodun train"):
        build_attack("shift")


def test_another_shape_norm_or_target_is_refused_by_name():
    x, _ = images()
    with pytest.raises(InputError, match=r"\(1, 2, 3\).*\(1, 4, 4\)"):
        shift().check(torch.zeros(2, 1, 4, 4), Threat("linf", 0.3))
    with pytest.raises(UnsupportedError, match="linf"):
        shift().check(x, Threat("l2", 0.3))
    with pytest.raises(UnsupportedError, match="target"):
        shift().check(x, Threat("linf", 0.3, targeted=True))


def test_files_that_are_no_trained_attack(tmp_path):
    bad = tmp_path / "bad.safetensors"
    cases = {"there is no such file": None, "not a whole safetensors": b"{}", "says nothing of an attack": "plain"}
    for words, content in cases.items():
        if content == "plain":
            save_file({"a": torch.zeros(1)}, bad)
        elif content is not None:
            bad.write_bytes(content)
        with pytest.raises(InputError, match=words):
            load_attack(bad)
    assert list_artifacts(tmp_path) == []
    with pytest.raises(InputError, match="no such folder"):
        list_artifacts(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 9}, "format"),
        ({"kind": "shfit"}, "did you mean 'shift'"),
        ({"options": {"shape": [1, 2, 3], "eps": 0.3, "colour": 1}}, "colour"),
        ({"options": {"shape": [1, 2, 3], "eps": "wide"}}, "eps"),
        ({"options": {"eps": 0.3}}, "do not fit"),
    ],
)
def test_headers_that_cannot_be_meant(tmp_path, change, words):
    path = tmp_path / "a.safetensors"
    header = {"format": 1, "kind": "shift", "options": {"shape": [1, 2, 3], "eps": 0.3}, "about": {}} | change
    save_file({"delta": torch.zeros(1, 2, 3)}, path, {"maodun": json.dumps(header)})
    with pytest.raises(InputError, match=words):
        load_attack(path)


def test_wrong_digest_fixed_options_and_unsaved_attacks(tmp_path):
    path = save_artifact(shift(), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="sha256"):
        load_attack(path, sha256="0" * 64)
    with pytest.raises(InputError, match="fixed when the attack was trained"):
        build_attack(f"file:{path}", eps=0.5)
    with pytest.raises(InputError, match="save_artifact"):
        maodun.evaluate(Linear(), images(), norm="linf", eps=0.3, attack=shift())
    with pytest.raises(InputError, match="cannot be written"):
        save_artifact(shift(), path / "below-a-file.safetensors")
