"""Universal perturbations: the closed-form best on linear models, one tensor for all, and honest refusals."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Counting, Linear, Noisy, generator
from torch import Tensor

import maodun
from maodun.attacks.artifacts import load_attack, save_artifact
from maodun.attacks.universal.training import UniversalFit
from maodun.attacks.universal.uap import UAP, DeepFoolFit, train_uap, train_uap_deepfool
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import EOT, Budget, Oracle
from maodun.core.threat import Threat
from maodun.core.verdict import judge

SHAPE, N = (2, 3, 4), 80
WEIGHT = torch.randn(24, generator=generator(0))
CLIMB = UniversalFit(epochs=20, batch_size=8, clip=math.inf, starts=1)


def binary() -> Linear:
    """Class 1 where WEIGHT . (x - 0.5) is positive."""
    weight = torch.stack([-WEIGHT, WEIGHT]) / 2
    return Linear(weight, -weight.sum(1) / 2).eval()


def images(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(n, *SHAPE, generator=generator(seed))
    return x, binary()(x).argmax(1)


def margins(x: Tensor) -> Tensor:
    """The signed l2 distance from the boundary, times the length of WEIGHT."""
    return (x - 0.5).flatten(1) @ WEIGHT


def test_the_targeted_linf_perturbation_is_the_sign_of_the_weights():
    x, y = images()
    uap = train_uap(Oracle(binary()), x, y, Threat("linf", 0.05), CLIMB, target=1)
    assert torch.equal(uap.tensors["delta"].flatten(), 0.05 * WEIGHT.sign())
    fresh, label = images(200, seed=2)
    found = uap.run(Oracle(binary()), fresh, label, Threat("linf", 0.05), check_model=False)
    # It flips exactly the images of class 0 nearer than eps * |w|_1, and none of class 1.
    assert torch.equal(found.found, (label == 0) & (margins(fresh) > -0.05 * WEIGHT.abs().sum()))
    assert 0.2 < found.found.float().mean() < 0.6


def test_the_targeted_l2_perturbation_lies_along_the_weights():
    x, y = images()
    uap = train_uap(Oracle(binary()), x, y, Threat("l2", 0.3), CLIMB, target=0)
    delta = uap.tensors["delta"].flatten()
    assert float(delta.norm()) == pytest.approx(0.3, rel=1e-5)
    assert float(torch.cosine_similarity(delta, -WEIGHT, dim=0)) > 0.995


@pytest.mark.parametrize("few", [0, 1])
def test_an_untargeted_one_chooses_the_direction_that_more_images_lie_in(few):
    x, y = images(160)
    keep = torch.cat([(y == few).nonzero()[:12, 0], (y != few).nonzero()[:60, 0]])
    fit = UniversalFit(epochs=15, batch_size=12, starts=3, clip=0.1)
    uap = train_uap(Oracle(binary()), x[keep], y[keep], Threat("linf", 0.05), fit)
    delta = uap.tensors["delta"].flatten()
    way = 1.0 if few == 1 else -1.0
    # Only the best reachable share matters once all that can be flipped are beyond the clip.
    best = ((y[keep] != few) & (margins(x[keep]).abs() < 0.05 * WEIGHT.abs().sum())).float().mean()
    moved = binary()((x[keep] + uap.tensors["delta"]).clamp(0, 1)).argmax(1) != y[keep]
    assert float(way * delta @ WEIGHT) > 0
    assert float(moved.float().mean()) >= 0.9 * float(best)


def test_deepfool_moves_one_class_straight_across():
    x, y = images()
    x, y = x[y == 0], y[y == 0]
    # The published form: an image at a time.
    fit = DeepFoolFit(epochs=2, batch_size=1, step=1.0)
    uap = train_uap_deepfool(Oracle(binary()), x, torch.zeros_like(y), Threat("l2", 0.3), fit)
    delta = uap.tensors["delta"].flatten()
    assert float(torch.cosine_similarity(delta, WEIGHT, dim=0)) > 0.9999
    assert float(delta.norm()) <= 0.3 + 1e-6
    reached = margins(x) > -float(delta.norm() * WEIGHT.norm()) + 1e-4
    assert uap.about["history"][-1]["fooled"] == pytest.approx(float(reached.float().mean()), abs=1.5 / len(x))
    far = train_uap_deepfool(Oracle(binary()), x, torch.zeros_like(y), Threat("l2", 5.0), fit)
    assert far.about["history"][-1]["fooled"] == 1.0 and len(far.about["history"]) == 1
    # All in one pass over all images, and no further than the hardest needs (plus what DeepFool overshoots).
    assert float(far.tensors["delta"].norm()) < 1.3 * float(margins(x).abs().max() / WEIGHT.norm())


def test_the_order_of_the_images_does_not_matter():
    x, y = images()
    fit = UniversalFit(epochs=2, batch_size=7, starts=2)
    order = torch.randperm(N, generator=generator(3))
    ids = torch.arange(N) + 100
    whole = train_uap(Oracle(binary()), x, y, Threat("linf", 0.04), fit, ids=ids)
    shuffled = train_uap(Oracle(binary(), batch_size=3), x[order], y[order], Threat("linf", 0.04), fit, ids=ids[order])
    assert torch.allclose(whole.tensors["delta"], shuffled.tensors["delta"], atol=1e-6)
    deep = DeepFoolFit(epochs=1, batch_size=7)
    threat, few = Threat("linf", 0.04), Oracle(binary(), batch_size=3)
    first = train_uap_deepfool(Oracle(binary()), x, y, threat, deep, ids=ids)
    other = train_uap_deepfool(few, x[order], y[order], threat, deep, ids=ids[order])
    assert torch.allclose(first.tensors["delta"], other.tensors["delta"], atol=1e-6)


def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    x, y = images()
    fit = UniversalFit(epochs=3, batch_size=16, starts=2)
    whole = train_uap(Oracle(binary()), x, y, Threat("linf", 0.04), fit)

    class Stop(Exception):
        pass

    def stop(line):
        if line["start"] == 1 and line["epoch"] == 1:
            raise Stop

    file = tmp_path / "uap.ckpt"
    with pytest.raises(Stop):
        train_uap(Oracle(binary()), x, y, Threat("linf", 0.04), fit, checkpoint=file, on_epoch=stop)
    seen = []
    again = train_uap(Oracle(binary()), x, y, Threat("linf", 0.04), fit, checkpoint=file, on_epoch=seen.append)
    assert again == whole and len(seen) == 1
    assert again.about["forwards"] == whole.about["forwards"] == 2 * 3 * N + 4 * N  # and the choice of the starts
    with pytest.raises(InputError, match="another run"):
        train_uap(Oracle(binary()), x, y, Threat("linf", 0.05), fit, checkpoint=file)


def test_it_is_an_attack_like_any_other(tmp_path):
    x, y = images()
    uap = train_uap(Oracle(binary()), x, y, Threat("linf", 0.05), CLIMB, target=1, about={"data": "made up"})
    assert uap.about["data"] == "made up" and uap.about["images"] == int((y == 0).sum())
    path = save_artifact(uap, tmp_path / "uap.safetensors")
    assert load_attack(path) == uap
    fresh, label = images(60, seed=5)
    made = maodun.attack(binary(), fresh, label, f"file:{path}", norm="linf", eps=0.05)
    assert made.queries.max() <= 2 and made.backwards.sum() == 0
    # A smaller ball is respected, and the perturbation is the same for all images.
    small = uap.candidates(fresh, torch.arange(60), Threat("linf", 0.01))
    assert torch.allclose(small - fresh, (0.01 * WEIGHT.sign()).reshape(1, *SHAPE).expand_as(fresh), atol=1e-6)
    assert judge(binary(), small, fresh, label, Threat("linf", 0.01)).valid.all()


def test_targets_are_its_own_or_refused():
    x, y = images()
    uap = train_uap(Oracle(binary()), x, y, Threat("linf", 0.05), CLIMB, target=1)
    zeros, ones = x[y == 0], torch.ones(int((y == 0).sum()), dtype=torch.int64)
    threat = Threat("linf", 0.05, targeted=True)
    found = uap.run(Oracle(binary()), zeros, 1 - ones, threat, targets=ones, check_model=False)
    assert found.found.any()
    with pytest.raises(UnsupportedError, match="only bring about class 1"):
        uap.run(Oracle(binary()), x[y == 1], y[y == 1], threat, targets=torch.zeros_like(y[y == 1]), check_model=False)
    free = UAP(shape=SHAPE, eps=0.05, tensors={"delta": torch.zeros(SHAPE)})
    with pytest.raises(UnsupportedError, match="cannot be targeted"):
        free.run(Oracle(binary()), zeros, 1 - ones, threat, targets=ones)


def test_bad_input_is_refused_with_a_reason():
    x, y = images()
    oracle, threat = Oracle(binary()), Threat("linf", 0.05)
    for call, words in (
        (lambda: train_uap(oracle, x * 255, y, threat), "divide by 255"),
        (lambda: train_uap(oracle, x, 1 - y, threat), "no better than guessing"),
        (lambda: train_uap(oracle, x, y, Threat("linf")), "is infinite"),
        (lambda: train_uap(oracle, x, y, threat, target=7), "has 2 classes"),
        (lambda: train_uap(oracle, x, y, threat, target=-1), "numbered from 0"),
        (lambda: train_uap(oracle, x[y == 1], y[y == 1], threat, target=1), "no images of a class other than 1"),
        (lambda: train_uap(oracle, x[:0], y[:0], threat), "holds no images"),
        (lambda: train_uap(oracle, x, y, Threat("l1", 1.0)), "not trained in l1"),
        (lambda: UniversalFit(epochs=0), "too small"),
        (lambda: UniversalFit(loss="cee"), "is not a loss"),
        (lambda: UAP(shape=SHAPE, eps=0.1, tensors={"delta": torch.zeros(3)}), "needs a tensor delta"),
        (lambda: UAP(shape=SHAPE, eps=0.1, tensors={}), "got none"),
    ):
        with pytest.raises((InputError, UnsupportedError), match=words):
            call()
    with pytest.raises(InputError, match="trained for inputs"):
        UAP(shape=(3, 3), eps=0.1, tensors={"delta": torch.zeros(3, 3)}).run(oracle, x, y, threat)


def test_a_noisy_model_is_trained_against_through_the_oracle():
    x, y = images()
    noisy = Counting(Noisy(binary(), 0.05))
    oracle = Oracle(noisy, gradient=EOT(draws=3), stochastic=True)
    fit = UniversalFit(epochs=2, batch_size=16, starts=1)
    uap = train_uap(oracle, x, y, Threat("linf", 0.05), fit, target=1)
    delta = uap.tensors["delta"].flatten()
    assert torch.equal(delta.sign(), WEIGHT.sign()) and uap == train_uap(
        oracle, x, y, Threat("linf", 0.05), fit, target=1
    )
    few = int((y == 0).sum())
    assert uap.about["backwards"] == 3 * few * (1 + fit.epochs)
    assert noisy.weight_gradients == 0


def test_a_budget_per_sample_is_refused():
    x, y = images()
    with pytest.raises(InputError, match="per sample"):
        train_uap(Oracle(binary(), budget=Budget(forwards=2)), x, y, Threat("linf", 0.05), CLIMB)
