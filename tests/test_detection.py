"""Detectors: thresholds at their rate, scores with known answers, refusal that no attack counts as a win."""

from __future__ import annotations

import math
import uuid

import numpy as np
import pytest
import torch
from oracles import generator
from torch import Tensor, nn

from maodun.arena.detectors import clean_samples, pgd_adversary
from maodun.arena.recipe import DataSpec, ThreatSpec, make_recipe
from maodun.arena.run import run
from maodun.attacks.gradient.orthogonal import Orthogonal
from maodun.attacks.gradient.pgd import PGD
from maodun.attacks.query.hopskipjump import HopSkipJump
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle, is_stochastic
from maodun.core.rejection import doubt, fold, join, may_reject
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge
from maodun.defenses import Stack, build_defense
from maodun.defenses.detection import (
    DETECTORS,
    LID,
    Detector,
    Entropy,
    FeatureSqueezing,
    Mahalanobis,
    MaxSoftmax,
    NearestNeighbours,
    PurifyCompare,
    Reconstruction,
    RejectingClassifier,
    TrainedDetector,
    area_under_risk_coverage,
    auroc,
    fit_detector,
    load_detector,
    risk_coverage,
    save_detector,
)
from maodun.zoo import load_data
from maodun.zoo.data.base import make_dataset


class Two(nn.Module):
    """Two classes by the sign of the first entry about 0.5; the other entries say nothing to it."""

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 2)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.weight[0, 0], self.linear.weight[1, 0] = -scale, scale
            self.linear.bias.copy_(torch.tensor([scale / 2, -scale / 2]))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(x.flatten(1))
        return answer


class Height(Detector):
    """Doubts what is high in the last entry: a detector whose every answer is known."""

    name = "height"

    def __init__(self, fpr: float = 0.05) -> None:
        super().__init__(fpr, 2000, "train", "")

    def score(self, seen):
        return seen.x.flatten(1)[:, -1]


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = 0.5 + 0.08 * torch.randn(n, 1, 4, 4, generator=generator(seed)).clamp(-3, 3)
    x[:, 0, 0, 0] = 0.5 + 0.1 * torch.rand(n, generator=generator(seed + 1)) * (1 - 2 * (torch.arange(n) % 2)) - 1e-4
    return x, (x[:, 0, 0, 0] > 0.5).long()


def made(detector: Detector, model: nn.Module | None = None, **more) -> RejectingClassifier:
    model = Two().eval() if model is None else model
    x, y = images(400, 2)
    return fit_detector(model, detector, (x, y), images(400, 5)[0], **more)


def adversary(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return PGD(steps=3).run(Oracle(model), x, y, Threat("linf", 0.2), stop_early=False).x_adv


def build(kind: type[Detector]) -> RejectingClassifier:
    options = {"k": 5} if kind in (LID, NearestNeighbours) else {}
    detector = kind(**options)
    return made(detector, adversary=adversary if detector.needs_adversary else None)


def test_folding_makes_refusal_as_good_as_the_label() -> None:
    logits, y = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 3.0, 2.0]]), torch.tensor([0, 0, 0])
    answer = join(logits, torch.tensor([-0.5, 0.5, 4.0]))
    assert torch.allclose(doubt(answer), torch.tensor([-0.5, 0.5, 4.0]))
    assert answer.argmax(1).tolist() == [1, 3, 3]
    assert fold(answer, y).argmax(1).tolist() == [1, 0, 0]
    assert fold(answer, y)[0].tolist() == [2.5, 3.0, 2.0]
    draws = answer[:, None].expand(3, 4, 4)
    assert torch.equal(fold(draws, y)[:, 2], fold(answer, y))


@pytest.mark.parametrize("kind", DETECTORS, ids=lambda kind: kind.name)
def test_every_detector_keeps_its_rate_and_its_answer(kind, tmp_path) -> None:
    rejecting = build(kind)
    x = images(500, 9)[0]
    with torch.no_grad():
        answer = rejecting(x)
        rejected = rejecting.answer(x).accepted.logical_not()
        assert torch.equal(answer.argmax(1) == 2, rejected)
        assert 0.0 < float(rejected.float().mean()) < 0.1  # 5 % asked for; 500 samples, 3 standard errors
        parts = torch.cat([rejecting(x[:7]), rejecting(x[7:8]), rejecting(x[8:]).flip(0).flip(0)])
        assert torch.allclose(parts, answer, atol=1e-4)
        file = save_detector(rejecting, tmp_path / "d.safetensors")
        options = {"k": 5} if kind in (LID, NearestNeighbours) else {}
        again = load_detector(file, kind(**options), rejecting.model)
        assert torch.equal(again(x), answer)
    assert may_reject(rejecting)
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(doubt(rejecting(x)).sum(), x)
    assert torch.isfinite(grad).all()
    assert bool(grad.any())


def test_thresholds_are_conformal() -> None:
    rejecting = made(Height(fpr=0.05))
    scores = images(400, 5)[0].flatten(1)[:, -1].sort().values
    assert float(rejecting.detector.threshold) == float(scores[math.ceil(401 * 0.95) - 1])


def test_scores_with_known_values() -> None:
    model = Two().eval()
    x = torch.full((1, 1, 4, 4), 0.5)
    with torch.no_grad():
        seen = RejectingClassifier(model, MaxSoftmax()).look(x)
        assert float(MaxSoftmax().score(seen)) == pytest.approx(math.log(2), abs=1e-5)
        assert float(Entropy().score(seen)) == pytest.approx(math.log(2), abs=1e-5)
        # 0.52 becomes 16/31 with five bits: both softmax outputs are sigmoids of 40 (x - 0.5).
        x[:, 0, 0, 0] = 0.52
        look = RejectingClassifier(model, FeatureSqueezing(median=0)).look(x)
        moved = 2 * abs(1 / (1 + math.exp(-40 * 0.02)) - 1 / (1 + math.exp(-40 * (16 / 31 - 0.5))))
        assert float(FeatureSqueezing(median=0).score(look)) == pytest.approx(moved, abs=1e-4)


def test_mahalanobis_of_a_gaussian_is_chi_squared() -> None:
    # Features (what enters the linear layer) are 16 independent normals around the class means, of any scale.
    x = torch.randn(4000, 16, generator=generator(3)) * torch.linspace(0.01, 0.3, 16) + 0.5
    y = torch.arange(4000) % 2
    rejecting = fit_detector(Two().eval(), Mahalanobis(), (x, y), x[:500])
    with torch.no_grad():
        score = rejecting.answer(x).score
        assert float(score.mean()) == pytest.approx(1.0, abs=0.02)
        # Variance of chi^2_16 / 16 is 2 / 16.
        assert float(score.var()) == pytest.approx(2 / 16, rel=0.25)


def test_lid_of_a_plane_is_its_dimension() -> None:
    x = torch.zeros(3000, 16)
    x[:, :3] = torch.rand(3000, 3, generator=generator(3))
    rejecting = fit_detector(Two().eval(), LID(k=20), (x, x[:, 0].long()), x[:100])
    inside = 0.3 * torch.rand(200, 3, generator=generator(4)) + 0.35
    with torch.no_grad():
        probe = torch.zeros(200, 16)
        probe[:, :3] = inside
        assert float(rejecting.answer(probe).score.mean()) == pytest.approx(3.0, rel=0.12)


def test_neighbours_and_reconstruction_in_closed_form() -> None:
    x = torch.zeros(40, 16)
    x[:, 0] = torch.linspace(0.1, 1.0, 40)
    x[:20, 1] = x[:20, 0]
    model = Two().eval()
    near = fit_detector(model, NearestNeighbours(k=1), (x, x[:, 0].long()), x)
    probe = torch.zeros(1, 16)
    probe[0, 1] = 0.7
    with torch.no_grad():
        # Unit vectors of the memory point along (1, 1) / sqrt 2 or (1, 0); the probe along (0, 1).
        assert float(near.answer(probe).score) == pytest.approx(math.sqrt(2 - math.sqrt(2)), abs=1e-4)
        flat = fit_detector(model, Reconstruction(components=2), (x, x[:, 0].long()), x)
        assert float(flat.answer(x).score.max()) < 1e-8
        probe[0, 5] = 0.4
        assert float(flat.answer(probe).score) == pytest.approx(0.4**2 / 16, rel=1e-3)


def test_trained_detector_tells_what_it_was_shown() -> None:
    def far(_model: nn.Module, x: Tensor, _y: Tensor) -> Tensor:
        return x + 0.4

    rejecting = made(TrainedDetector(), adversary=far)
    x = images(200, 9)[0]
    with torch.no_grad():
        clean, attacked = rejecting.answer(x).score, rejecting.answer(x + 0.4).score
    assert auroc(clean, attacked) > 0.99


def test_area_under_the_curves_in_closed_form() -> None:
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1.0
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.5
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5
    assert math.isnan(auroc(torch.zeros(0), torch.zeros(2)))
    coverage, risk = risk_coverage(torch.tensor([0.3, 0.1, 0.2, 0.4]), torch.tensor([True, True, True, False]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == [0.0, 0.0, 0.0, 0.25]
    assert area_under_risk_coverage(torch.tensor([0.0, 1.0]), torch.tensor([False, True])) == 0.75


def test_an_attack_wins_only_accepted_and_wrong() -> None:
    """The class turns at 0.5 in the first entry; the detector refuses whatever is high in the last one."""
    rejecting = made(Height())
    x, y = images(60, 7)
    tau = float(rejecting.detector.threshold)
    fooled = x.clone()
    fooled[:, 0, 0, 0] = 1 - x[:, 0, 0, 0]
    fooled[:, 0, -1, -1] = tau - 0.01
    caught = fooled.clone()
    caught[:, 0, -1, -1] = tau + 0.01
    threat = Threat("linf", 1.0)
    assert judge(rejecting, fooled, x, y, threat).success.all()
    verdict = judge(rejecting, caught, x, y, threat)
    assert not verdict.success.any()
    assert verdict.doubt is not None and bool((verdict.doubt > 0).all())
    assert not judge(rejecting, caught, x, y, threat, targets=1 - y).success.any()


@pytest.mark.parametrize(
    "attack",
    [PGD(steps=20, loss="margin"), Orthogonal(steps=20), Orthogonal(steps=20, mode="selective"), HopSkipJump(steps=4)],
    ids=["pgd", "orthogonal", "selective", "hopskipjump"],
)
def test_attacks_pass_classifier_and_detector_at_once(attack) -> None:
    """Samples that start refused must be brought below the threshold as well as over the boundary."""
    rejecting = made(Height())
    x, y = images(40, 7)
    x[:20, 0, -1, -1] = float(rejecting.detector.threshold) + 0.05
    found = attack.run(Oracle(rejecting), x, y, Threat("linf", 0.15), check_model=False)
    verdict = judge(rejecting, found.x_adv, x, y, Threat("linf", 0.15))
    assert torch.equal(found.found, verdict.success)
    assert float(verdict.success.float().mean()) > 0.95
    blind = PGD(steps=20).run(Oracle(rejecting.model), x, y, Threat("linf", 0.15), stop_early=False)
    assert float(judge(rejecting, blind.x_adv, x, y, Threat("linf", 0.15)).success[:20].float().mean()) < 0.9


def test_orthogonal_steps_do_not_disturb_the_other_half() -> None:
    """The detector hates what the classifier's gradient wants: steps along the plain gradient raise its score."""

    class Tilted(Height):
        def score(self, seen):
            flat = seen.x.flatten(1)
            return (flat[:, 0] - 0.5).abs() * 2 + flat[:, -1]

    rejecting = made(Tilted())
    x, y = images(30, 7)
    found = Orthogonal(steps=40).run(Oracle(rejecting), x, y, Threat("l2", 0.6), check_model=False)
    assert float(found.found.float().mean()) > 0.95


def recipe(**shield):
    return make_recipe(
        {
            "data": {"spec": "digits", "limit": 40},
            "threats": [{"norm": "linf", "eps": 0.15}],
            "shields": [{"name": "s", "model": "zoo:digits-cnn", **shield}],
            "spears": [
                {"attack": "apgd", "options": {"loss": "ce", "steps": 20}, "name": "joint"},
                {"attack": "pgd", "options": {"steps": 5}, "name": "static", "surrogate": "zoo:digits-cnn"},
            ],
            "diagnostics": True,
        }
    )


def test_the_arena_fits_counts_and_reports_refusals() -> None:
    summary = run(
        recipe(defense="max_softmax", options={"samples": 600}), f"memory://det/{uuid.uuid4().hex}", progress="quiet"
    )
    joint, static = summary.cells
    for cell in (joint, static):
        assert cell.rejection is not None
        assert 0.85 <= cell.rejection.coverage.value <= 1.0
        assert cell.clean.value <= cell.rejection.coverage.value
        # Right among all is right among the accepted times the share accepted.
        product = cell.rejection.accuracy.value * cell.rejection.coverage.value
        assert cell.clean.value == pytest.approx(product)
    assert joint.robust.value <= static.robust.value
    assert "rejection" in {finding.name for finding in summary.findings}


def test_a_detector_of_another_model_and_one_without_data_are_refused(tmp_path) -> None:
    file = save_detector(made(MaxSoftmax()), tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="fitted to a model whose weights begin"):
        run(recipe(defense="max_softmax", options={"file": str(file)}), f"memory://det/{uuid.uuid4().hex}")
    squeezed = save_detector(made(FeatureSqueezing(bits=4, median=0)), tmp_path / "squeezed.safetensors")
    load_detector(squeezed, FeatureSqueezing(bits=4, median=0), Two())
    with pytest.raises(InputError, match="was fitted with 'bits=4, median=0', not with 'bits=5, median=0'"):
        load_detector(squeezed, FeatureSqueezing(bits=5, median=0), Two())
    with pytest.raises(InputError, match="holds a max_softmax"):
        load_detector(file, Entropy(), Two())
    with pytest.raises(InputError, match="cannot be read"):
        (tmp_path / "no.safetensors").write_bytes(b"no")
        load_detector(tmp_path / "no.safetensors", Entropy(), Two())
    with pytest.raises(InputError, match=r"cannot tell a share of 0\.05 from none; give 19 or more"):
        fit_detector(Two(), MaxSoftmax(), images(40), images(18)[0])
    with pytest.raises(InputError, match="no threshold"):
        RejectingClassifier(Two(), MaxSoftmax())(images(3)[0])
    with pytest.raises(InputError, match="learns from attacked samples"):
        made(TrainedDetector())
    with pytest.raises(InputError, match="none of that name"):
        made(Mahalanobis(layers="liner"))
    with pytest.raises(InputError, match="does not map inputs to inputs"):
        PurifyCompare("mahalanobis")
    x, y = images(30)
    data = make_dataset("given", "given", x.numpy(), y.numpy(), None)
    given = recipe(defense="max_softmax").model_copy(
        update={"data": recipe().data.model_copy(update={"spec": "given"})}
    )
    with pytest.raises(InputError, match="no clean validation data"):
        run(given, f"memory://det/{uuid.uuid4().hex}", models={"s": Two().eval()}, data=data)


def test_a_detector_stands_first_in_a_stack_and_keys_its_purifier_by_sample() -> None:
    whole = Stack([PurifyCompare("random_resize_pad"), build_defense("bit_depth")]).wrap(Two().eval())
    assert isinstance(whole, RejectingClassifier) and may_reject(whole) and is_stochastic(whole)
    rejecting = made(whole.detector, whole.model)
    x, ids = images(9)[0], torch.arange(9)
    order = torch.tensor([4, 2, 0, 8, 6, 1, 3, 5, 7])

    def ask(rows: Tensor) -> Tensor:
        with torch.no_grad(), context.draw(Stream(3, "test"), ids[rows], torch.zeros_like(rows)):
            return rejecting.answer(x[rows]).score

    once = ask(ids)
    assert torch.allclose(ask(order), once[order], atol=1e-6)
    assert torch.allclose(torch.cat([ask(ids[:1]), ask(ids[1:])]), once, atol=1e-6)


def test_a_purifier_that_compares_draws_other_noise_than_the_same_one_behind_it() -> None:
    x, ids = images(4)[0], torch.arange(4)
    detector = PurifyCompare("gaussian_noise")
    seen: list[Tensor] = []
    behind = build_defense("gaussian_noise").wrap(Two().eval())
    behind.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
        RejectingClassifier(behind, detector).answer(x)
    first, second = seen[0] - x, seen[1] - x
    # The second input carries the detector's noise and the defence's; equal draws would give twice the first.
    assert not torch.allclose(second, 2 * first, atol=1e-3)


def test_a_file_without_splits_is_never_fitted_to_where_it_is_judged(tmp_path) -> None:
    x, y = images(90)
    file = tmp_path / "one.npz"
    np.savez(file, x=x.numpy(), y=y.numpy())
    for split, validation in (("test", "train"), ("test", "validation"), ("train", "train")):
        spec = recipe().model_copy(update={"data": DataSpec(spec=f"npz:{file}", split=split, limit=30)})
        judged = load_data(spec.data.spec, split=split, limit=30)
        (fitted, labels), clean = clean_samples(spec, judged, MaxSoftmax(validation=validation))
        assert torch.equal(fitted, x[30:78]) and torch.equal(labels, y[30:78])
        assert torch.equal(clean, x[78:])
    with pytest.raises(InputError, match="no clean samples beside the 90"):
        clean_samples(spec, load_data(spec.data.spec), MaxSoftmax())


@pytest.mark.parametrize(("norm", "eps"), [("linf", None), ("flow", 1.0), ("l0", 3.0)])
def test_what_a_trained_detector_cannot_learn_from_is_refused_first(norm, eps) -> None:
    with pytest.raises(InputError, match="no ball that it searches"):
        pgd_adversary(ThreatSpec(norm=norm, eps=eps), 0)


@pytest.mark.parametrize("options", [{"fpr": 0.0}, {"fpr": 1.0}, {"samples": 1}])
def test_impossible_options(options) -> None:
    with pytest.raises(InputError):
        MaxSoftmax(**options)
