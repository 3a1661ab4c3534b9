"""Whole runs on models with a known answer: tables, invariances, the shared clean pass, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from oracles import Counting, Linear, Noisy, distances, generator, linear
from torch import Tensor, nn

import maodun
from maodun.arena.recipe import Recipe, make_recipe
from maodun.arena.run import run
from maodun.arena.store import Store
from maodun.arena.summary import RunSummary, summarise
from maodun.arena.work import RECORDS, choose_targets, column
from maodun.attacks.gradient.pgd import PGD
from maodun.core.errors import InputError, MaodunError, StoreError, UnsupportedError
from maodun.zoo import Dataset
from maodun.zoo.data.base import make_dataset

STEPS = {"steps": 10}


class Threshold(nn.Module):
    """Two classes: is the mean of the input above one half? Its distance in linf is |mean - 1/2|."""

    def __init__(self, slope: float = 20.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        score = self.slope * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], dim=1)


class Remembering(nn.Module):
    """Raises KeyboardInterrupt when it is called for the n-th time, as a person losing patience does."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        super().__init__()
        self.model, self.patience = model, patience

    def forward(self, x: Tensor) -> Tensor:
        self.patience -= 1
        if self.patience == 0:
            raise KeyboardInterrupt
        answer: Tensor = self.model(x)
        return answer


def ramp(n: int = 200, shape: tuple[int, ...] = (1, 2, 3), wrong: int = 10) -> Dataset:
    """Constant images of all brightnesses, labelled rightly but for the first `wrong` ones."""
    level = (np.arange(n, dtype=np.float32) + 0.5) / n
    y = (level > 0.5).astype(np.int64)
    y[:wrong] = 1 - y[:wrong]
    x = np.broadcast_to(level.reshape(-1, *[1] * len(shape)), (n, *shape)).copy()
    return make_dataset("ramp", "given", x, y, ["dark", "light"])


def make(**changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "name": "ramp",
        "data": {"spec": "given"},
        "threats": [{"norm": "linf", "eps": 0.1}],
        "shields": [{"name": "threshold", "model": "given:Threshold"}],
        "spears": [{"attack": "pgd", "options": STEPS}, {"attack": "fgsm"}],
        "shard_size": 64,
        "diagnostics": False,
    }
    return make_recipe(content | changes)


def go(out: Path | str, recipe: Recipe | None = None, data: Dataset | None = None, **models: nn.Module) -> RunSummary:
    models = models or {"threshold": Threshold()}
    return run(recipe or make(), out, progress="quiet", models=models, data=data or ramp())


def plain(summary: RunSummary) -> list[dict[str, Any]]:
    """The table of a run without what differs between equal runs: the seconds."""
    return [cell.model_dump(exclude={"seconds"}) for cell in summary.cells]


def close(one: Any, two: Any) -> bool:
    """Equal up to float rounding, in whatever they are nested."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(close, one, two))
    return one == (pytest.approx(two, rel=1e-5, abs=1e-5) if isinstance(two, float) else two)


def records(out: Path, cell: str) -> dict[str, np.ndarray]:
    table = pq.read_table(sorted((out / "records" / cell).glob("*.parquet"))[0].parent)
    return {name: column(table, name) for name in table.column_names}


def test_robust_accuracy_in_closed_form(tmp_path: Path) -> None:
    recipe = make(threats=[{"norm": "linf", "eps": 0.1}, {"norm": "l2", "eps": 0.2}, {"norm": "linf", "eps": 0.2}])
    summary = go(tmp_path / "run", recipe)
    # In linf a ball of radius e moves the mean by e, in l2 over six equal pixels by e / sqrt(6).
    data = ramp()
    level = data.x.flatten(1)[:, 0]
    right = (level > 0.5).long() == data.y
    assert summary.complete
    assert len(summary.cells) == 6
    for cell in summary.cells:
        reach = cell.eps / 6**0.5 if cell.norm == "l2" else cell.eps
        expected = (right & ((level - 0.5).abs() > reach)).float().mean()
        assert cell.robust.value == pytest.approx(float(expected)), cell.cell
        assert cell.clean.value == pytest.approx(190 / 200)
        assert cell.asr_all.value == pytest.approx(1 - float(expected))
        assert cell.asr_correct.n == 190
        assert cell.statuses["skipped_misclassified"] == 10
    curve = next(curve for curve in summary.curves if curve.spear == "pgd" and curve.norm == "linf")
    assert curve.eps == [0.0, 0.1, 0.2]
    assert curve.robust == pytest.approx([0.95, 0.75, 0.55])
    assert [worst.robust.value for worst in summary.worst if worst.norm == "linf"] == pytest.approx([0.75, 0.55])


def test_records_are_those_of_the_contract(tmp_path: Path) -> None:
    summary = go(tmp_path / "run")
    name = summary.cells[0].cell
    parts = sorted((tmp_path / "run" / "records" / name).glob("*"))
    assert [part.name for part in parts] == [f"part-{number:05d}.parquet" for number in range(4)]
    assert pq.read_schema(parts[0]).names == RECORDS.names
    table = records(tmp_path / "run", name)
    assert (table["sample_id"] == np.arange(200)).all()
    assert (table["success"] == ~table["adv_correct"]).all()
    fell = table["success"] & table["clean_correct"]
    assert (table["distance"][fell] <= 0.1 + 1e-6).all()
    assert table["distance_linf"] == pytest.approx(table["distance"])
    assert (table["distance"][~fell] == 0).all()
    assert table["adv_probs"].shape == (200, 2)
    assert (table["forwards"] >= table["backwards"]).all()


def test_adversarial_inputs_come_back_exactly_and_inside_the_ball(tmp_path: Path) -> None:
    summary = go(tmp_path / "run")
    store = Store(tmp_path / "run")
    data, model = ramp(), Threshold()
    for picture in summary.pictures:
        kept = store.read_arrays(picture.part)
        assert torch.equal(torch.from_numpy(kept["x"]), data.x[torch.from_numpy(kept["ids"])])
        change = np.abs(kept["x_adv"][picture.row] - kept["x"][picture.row]).max()
        assert change == pytest.approx(picture.distance)
        assert kept["ids"][picture.row] == picture.sample_id
        answer = model(torch.from_numpy(kept["x_adv"][picture.row : picture.row + 1])).argmax(1)
        assert int(answer) == picture.adv_pred != picture.label
    assert summary.pictures
    go(tmp_path / "bare", make(adversarials=False))
    assert not (tmp_path / "bare" / "adversarials").exists()


def near(model: Linear, n: int) -> tuple[Tensor, Tensor]:
    """Inputs near the centre of the box, where the classes tie, so that small radii matter."""
    x = 0.4 + 0.2 * torch.rand(n, 1, 4, 6, generator=generator(1))
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.fixture(scope="module")
def wide() -> tuple[Linear, Dataset]:
    model = linear(classes=4)
    x, y = near(model, 96)
    return model, make_dataset("linear", "given", x.numpy(), y.numpy(), None)


def linear_recipe(**changes: Any) -> Recipe:
    shields = [{"name": "linear", "model": "given:Linear"}]
    return make(**({"threats": [{"norm": "linf", "eps": 0.005}], "shields": shields} | changes))


def test_linear_model_of_four_classes_in_closed_form(tmp_path: Path, wide: tuple[Linear, Dataset]) -> None:
    model, data = wide
    summary = go(tmp_path / "run", linear_recipe(spears=[{"attack": "pgd"}]), data, linear=model)
    exact = (distances(model, data.x, "linf").amin(1) > 0.005).float().mean()
    # The cross-entropy follows a mixture of the classes, so it may miss a sample or two, and never fells more.
    assert float(exact) - 1e-6 <= summary.robust.value <= float(exact) + 3 / 96


def test_least_distance_attack_in_closed_form(tmp_path: Path, wide: tuple[Linear, Dataset]) -> None:
    """Judged at any distance for the median and the curve, inside the ball for the robust accuracy."""
    model, data = wide
    eps = 0.02
    threats = [{"norm": "l2", "eps": eps}]
    summary = go(tmp_path / "run", linear_recipe(threats=threats, spears=[{"attack": "deepfool"}]), data, linear=model)
    (cell,) = summary.cells
    exact = distances(model, data.x, "l2").amin(1)
    # DeepFool lands on the boundary or up to two per cent beyond it.
    assert 0.999 <= cell.median_distance / float(exact.quantile(0.5)) <= 1.03
    assert cell.robust.value == pytest.approx(float((exact > eps).float().mean()), abs=2 / 96)
    assert 0.999 <= cell.rho / float((exact / data.x.flatten(1).norm(dim=1)).mean()) <= 1.03
    (curve,) = summary.curves
    for radius, robust in zip(curve.eps, curve.robust, strict=True):
        assert robust == pytest.approx(float((exact > radius).float().mean()), abs=4 / 96)
    table = records(tmp_path / "run", cell.cell)
    outside = table["distance"] > eps * 1.001
    assert outside.any()
    # Outside the ball the adversary gets what it may send: the clean input.
    assert not table["success"][outside].any()
    assert table["fell"].all()
    assert np.array_equal(table["adv_probs"][outside], table["clean_probs"][outside])


@pytest.mark.parametrize(("shard", "batch"), [(1, None), (7, 1), (64, 7), (96, 64)])
def test_shards_and_batches_change_nothing(
    tmp_path: Path, wide: tuple[Linear, Dataset], shard: int, batch: int | None
) -> None:
    model, data = wide
    data = data.take(16)
    small = [{"norm": "linf", "eps": 0.005}, {"norm": "l2", "eps": 0.02}]
    usual = go(tmp_path / "usual", linear_recipe(threats=small), data, linear=model)
    other = linear_recipe(threats=small, shard_size=shard, compute={"batch_size": batch})
    assert 0 < usual.robust.value < 1
    assert close(plain(go(tmp_path / "other", other, data, linear=model)), plain(usual))


def test_order_of_the_samples_changes_nothing(tmp_path: Path, wide: tuple[Linear, Dataset]) -> None:
    model, data = wide
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    mixed = dataclasses.replace(data, x=data.x[order], y=data.y[order], ids=data.ids[order])
    one = go(tmp_path / "one", linear_recipe(), data, linear=model)
    go(tmp_path / "two", linear_recipe(), mixed, linear=model)
    for cell in one.cells:
        straight, shuffled = (records(tmp_path / run, cell.cell) for run in ("one", "two"))
        assert (shuffled["sample_id"] == order.numpy()).all()
        assert (shuffled["success"] == straight["success"][order.numpy()]).all()
        assert shuffled["distance"] == pytest.approx(straight["distance"][order.numpy()], abs=1e-6)


def test_clean_pass_is_made_once_per_shield(tmp_path: Path) -> None:
    model = Counting(Threshold())
    recipe = make(spears=[{"attack": "fgsm"}], shard_size=50)
    go(tmp_path / "one", recipe, threshold=model)
    rows = model.rows
    model.clear()
    many = [{"attack": "fgsm"}, {"attack": "fgsm", "name": "again"}, {"attack": "fgsm", "name": "thrice"}]
    go(tmp_path / "three", make(spears=many, shard_size=50), threshold=model)
    # The clean rows are common to the three cells: three times the rest is what three cells cost.
    clean = 200
    assert model.rows - clean < 3 * (rows - clean) + 1
    model.clear()
    go(tmp_path / "three", make(spears=many, shard_size=50), threshold=model)
    assert model.rows < 20  # looks at a few samples to see whether it is stochastic, and attacks nobody


def test_interrupted_run_continues_where_it_was(tmp_path: Path) -> None:
    undisturbed = go(tmp_path / "whole")
    for patience in (5, 12, 30):
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run", threshold=Remembering(Threshold(), patience))
    partial = summarise(str(tmp_path / "run"))
    assert not partial.complete
    assert plain(go(tmp_path / "run")) == plain(undisturbed)
    events = Store(tmp_path / "run").events()
    finished = [event["part"] for event in events if event["event"] == "shard finished"]
    assert len(finished) == len(set(finished)) == 4 + 8
    assert sum(event["event"] == "interrupted" for event in events) == 3


def test_store_of_another_recipe_weights_or_data_is_refused(tmp_path: Path, wide: tuple[Linear, Dataset]) -> None:
    model, data = wide
    go(tmp_path / "run", linear_recipe(), data, linear=model)
    with pytest.raises(StoreError, match=r"recipe\.threats\.0\.eps was 0\.005 and is now 0\.04"):
        go(tmp_path / "run", linear_recipe(threats=[{"norm": "linf", "eps": 0.04}]), data, linear=model)
    with pytest.raises(StoreError, match=r"weights\.linear"):
        go(tmp_path / "run", linear_recipe(), data, linear=linear(classes=4, seed=9))
    with pytest.raises(StoreError, match=r"data\."):
        go(tmp_path / "run", linear_recipe(), data.take(95), linear=model)


@pytest.mark.parametrize("rule", ["single", "mean", "majority", "worst"])
def test_noisy_model_at_eps_zero_gets_its_clean_accuracy(tmp_path: Path, rule: str) -> None:
    recipe = make(
        threats=[{"norm": "linf", "eps": 0.0}],
        verdict={"rule": rule, "draws": 5},
        spears=[{"attack": "pgd", "options": STEPS, "eot": 2}],
    )
    summary = go(tmp_path / "run", recipe, threshold=Noisy(Threshold(), 0.4))
    (cell,) = summary.cells
    assert cell.robust == cell.clean
    assert cell.clean.value < 0.93  # the noise does matter
    assert cell.draws == (1 if rule == "single" else 5)


def test_noisy_model_falls_as_its_noiseless_one_would(tmp_path: Path) -> None:
    """EOT and fresh draws: the mean decision of a noisy threshold is the threshold, so the answer is known."""
    recipe = make(spears=[{"attack": "pgd", "options": STEPS, "eot": 4}])
    summary = go(tmp_path / "run", recipe, threshold=Noisy(Threshold(), 0.02))
    (cell,) = summary.cells
    assert cell.rule == "majority"
    assert cell.robust.value == pytest.approx(0.75, abs=0.04)


def test_targets_are_wrong_classes_and_depend_on_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(50, 5, generator=generator).softmax(1)
    y, ids = torch.randint(5, (50,), generator=generator), torch.arange(50)
    for goal in ("random", "least_likely", "most_likely"):
        threat = make(threats=[{"norm": "l2", "eps": 1, "targeted": True, "goal": goal}]).threats[0]
        found = choose_targets(threat, probs, y, ids, 0)
        assert found is not None
        assert not (found == y).any()
        half = choose_targets(threat, probs[25:], y[25:], ids[25:], 0)
        assert torch.equal(found[25:], half)
    least = choose_targets(make(threats=[threat.model_dump() | {"goal": "least_likely"}]).threats[0], probs, y, ids, 0)
    assert torch.equal(probs.gather(1, least[:, None]).squeeze(1) <= probs.amax(1), torch.ones(50, dtype=torch.bool))


def test_targeted_attack_in_closed_form(tmp_path: Path) -> None:
    threats = [{"norm": "linf", "eps": 0.1, "targeted": True}]
    summary = go(tmp_path / "run", make(threats=threats, spears=[{"attack": "pgd", "options": STEPS}]))
    # With two classes the only target is the other one; clean errors are there already.
    (cell,) = summary.cells
    assert cell.targeted
    assert cell.robust.value == pytest.approx(0.75)


def test_one_line_evaluation_and_attack() -> None:
    data = ramp()
    found = maodun.attack(Threshold(), data.x, data.y, "pgd", norm="linf", eps="26/255", steps=10)
    assert found.x_adv.shape == data.x.shape
    assert float((found.x_adv - data.x).abs().max()) <= 26 / 255 + 1e-6
    summary = maodun.evaluate(Threshold(), (data.x, data.y), norm="linf", eps=0.1, attack="pgd,fgsm", diagnostics=False)
    assert summary.robust.value == pytest.approx(0.75)
    assert "maodun.evaluate(" in summary.command
    for form in (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=33),
        torch.utils.data.TensorDataset(data.x, data.y),
        (data.x.numpy(), data.y.numpy()),
        data,
    ):
        again = maodun.evaluate(
            Threshold(), form, norm="linf", eps=[0.1, 0.2], attack=PGD(steps=10), diagnostics=False, limit=150
        )
        assert [worst.robust.n for worst in again.worst] == [150, 150]
        # Of 150 samples those above 0.6 or below 0.4 stand, less the ten clean errors.
        assert again.robust.value == pytest.approx((70 + 30) / 150)


def test_global_random_state_is_the_user_s() -> None:
    data = ramp()
    before = torch.random.get_rng_state().clone()
    maodun.evaluate(Noisy(Threshold(), 0.1), (data.x, data.y), norm="linf", eps=0.1, attack="fgsm")
    assert torch.equal(torch.random.get_rng_state(), before)


class Probabilities(Threshold):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Backwards(Threshold):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1) + torch.randn(1) * 0


class OneClass(Threshold):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


def reject(error: type[MaodunError], words: str, *, model: nn.Module | None = None, **changes: Any) -> None:
    data = ramp()
    arguments: dict[str, Any] = {"norm": "linf", "eps": 0.1, "attack": "pgd", "diagnostics": False}
    samples = changes.pop("data", (data.x, data.y))
    with pytest.raises(error, match=words) as caught:
        maodun.evaluate(model or Threshold(), samples, **(arguments | changes))
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("; ") >= 1


def test_bad_input_is_refused_before_the_first_attack() -> None:
    data = ramp()
    reject(InputError, "did you mean 'pgd'", attack="pgdd")
    reject(InputError, "is not an option of pgd", attack=[{"attack": "pgd", "options": {"stepps": 3}}])
    reject(InputError, "cannot be -0.1", eps=-0.1)
    reject(InputError, "cannot be 'l3'", norm="l3")
    reject(UnsupportedError, "does not search in l0", norm="l0", eps=3)
    reject(UnsupportedError, "was given no radius", eps=None)
    reject(InputError, "names no attack", attack=",")
    reject(InputError, "probabilities", model=Probabilities())
    reject(InputError, "1 value per sample", model=OneClass())
    reject(InputError, "training mode", model=nn.Sequential(nn.BatchNorm2d(1), Threshold()).train())
    reject(InputError, "no better than guessing", model=Backwards())
    reject(InputError, "0-255", data=(data.x * 255, data.y))
    reject(InputError, "standardised", data=(data.x * 2 - 1, data.y))
    reject(InputError, "NaN", data=(data.x / 0 * 0, data.y))
    reject(InputError, "model has 2 classes", data=(data.x, data.y + 1))
    reject(InputError, "is no collection", data=7)
    reject(InputError, "cannot take inputs of shape", model=nn.Sequential(nn.Flatten(), nn.Linear(5, 2)).eval())


def test_progress_is_shown_on_standard_error_only_when_wanted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for mode in ("quiet", "log", "bar"):
        run(make(), tmp_path / mode, progress=mode, models={"threshold": Threshold()}, data=ramp())
        shown = capfd.readouterr()
        assert shown.out == ""
        assert (shown.err == "") == (mode == "quiet")
        if mode == "log":
            assert "[600/600]" in shown.err
    with pytest.raises(InputError, match="did you mean 'quiet'"):
        run(make(), tmp_path / "other", progress="quite", models={"threshold": Threshold()}, data=ramp())
