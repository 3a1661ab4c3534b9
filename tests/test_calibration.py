"""Calibration scores against hand cases and against torchmetrics, scikit-learn and torch."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from maodun.arena.calibration import calibrate, equal_mass, equal_width


def random_predictions(n: int = 997, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2.5 * torch.randn(n, classes, generator=generator)).softmax(1)
    labels = torch.where(
        torch.rand(n, generator=generator) < 0.6,
        probs.argmax(1),
        torch.randint(classes, (n,), generator=generator),
    )
    return probs, labels


def test_hand_case() -> None:
    # Three answers with confidence .9 (two right), one with .6 (wrong): gaps |2/3 - .9| * 3/4 + .6 * 1/4.
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    labels = torch.tensor([0, 0, 1, 1])
    scores = calibrate(probs, labels)
    assert scores.ece == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.6, abs=1e-6)
    assert scores.mce == pytest.approx(0.6, abs=1e-6)
    assert scores.over == pytest.approx(scores.ece, abs=1e-6)
    assert scores.under == pytest.approx(0.0, abs=1e-9)
    assert scores.brier == pytest.approx((0.02 + 0.02 + 1.62 + 0.72) / 4, abs=1e-6)
    assert scores.nll == pytest.approx(-(2 * math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4, abs=1e-6)
    assert scores.n == 4


def test_perfect_and_hopeless_confidence() -> None:
    probs = torch.eye(3)
    assert calibrate(probs, torch.tensor([0, 1, 2])).ece == 0.0
    wrong = calibrate(probs, torch.tensor([1, 2, 0]))
    assert (wrong.ece, wrong.over, wrong.under, wrong.brier) == (1.0, 1.0, 0.0, 2.0)
    assert math.isfinite(wrong.nll)


def test_underconfidence_is_told_apart() -> None:
    probs = torch.full((50, 2), 0.5) + torch.tensor([0.05, -0.05])
    scores = calibrate(probs, torch.zeros(50, dtype=torch.long))
    assert scores.under == pytest.approx(0.45, abs=1e-6)
    assert scores.over == 0.0


@pytest.mark.parametrize("bins", [5, 15])
def test_agrees_with_torchmetrics(bins: int) -> None:
    probs, labels = random_predictions()
    scores = calibrate(probs, labels, bins)
    for norm, ours in (("l1", scores.ece), ("max", scores.mce)):
        theirs = multiclass_calibration_error(probs, labels, probs.shape[1], n_bins=bins, norm=norm)
        assert ours == pytest.approx(float(theirs), abs=1e-5)


def test_agrees_with_scikit_learn_and_torch() -> None:
    probs, labels = random_predictions()
    scores = calibrate(probs, labels)
    exact = probs.double() / probs.double().sum(1, keepdim=True)
    theirs = brier_score_loss(labels.numpy(), exact.numpy(), labels=list(range(7)), scale_by_half=False)
    assert scores.brier == pytest.approx(theirs, abs=1e-6)
    assert scores.nll == pytest.approx(float(torch.nn.functional.nll_loss(probs.log(), labels)), abs=1e-5)


def test_equal_mass_bins_hold_equal_numbers() -> None:
    probs, labels = random_predictions()
    counts = equal_mass(probs, labels).count
    assert float(counts.max() - counts.min()) <= 1
    assert float(counts.sum()) == 997


def test_bins_average_to_the_whole() -> None:
    probs, labels = random_predictions()
    for bins in (equal_width(probs, labels), equal_mass(probs, labels)):
        accuracy = (probs.argmax(1) == labels).double().mean()
        assert float((bins.share * bins.accuracy).sum()) == pytest.approx(float(accuracy), abs=1e-12)


def test_order_does_not_matter() -> None:
    probs, labels = random_predictions()
    order = torch.randperm(997, generator=torch.Generator().manual_seed(1))
    assert calibrate(probs[order], labels[order]).ece == pytest.approx(calibrate(probs, labels).ece, abs=1e-12)
