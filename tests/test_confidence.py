"""Class-wise calibration, abstention and temperature: hand cases and invariances."""

from __future__ import annotations

import math

import pytest
import torch

from maodun.arena.calibrated import profile
from maodun.arena.calibration import calibrate
from maodun.arena.confidence import (
    abstention,
    after_temperature,
    auroc,
    best_temperature,
    bootstrap,
    classwise_ece,
    entropies,
    spread,
    tempered,
)


def predictions(n: int = 600, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and labels drawn from them: calibrated by construction."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2.0 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def test_classwise_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    labels = torch.tensor([0, 1, 1])
    # Class 0: bin of .9 holds 1.8 against 1, bin of .2 holds .2 against 0. Class 1 mirrors it.
    expected = ((1.8 - 1.0) + 0.2 + (1.0 - 0.2) + (1.0 - 0.8)) / (3 * 2)
    assert classwise_ece(probs, labels) == pytest.approx(expected, abs=1e-6)


def test_classwise_of_certainty() -> None:
    labels = torch.tensor([0, 1, 2])
    assert classwise_ece(torch.eye(3), labels) == 0.0
    assert classwise_ece(torch.eye(3)[[1, 2, 0]], labels) == pytest.approx(2 / 3)


def test_abstention_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    found = abstention(probs, torch.tensor([0, 1, 0, 0]), (0.75, 0.9, 1.0))
    assert found.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert found.aurc_best == pytest.approx((0 + 0 + 0 + 1 / 4) / 4)
    assert found.coverage == {0.75: 1.0, 0.9: 0.25, 1.0: 0.25}


def test_ties_do_not_depend_on_order() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.6, 0.4]])
    labels = torch.tensor([0, 1, 0, 0])
    order = torch.tensor([0, 3, 2, 1])
    first, second = abstention(probs, labels), abstention(probs[order], labels[order])
    assert first.aurc == pytest.approx(second.aurc)
    assert first.coverage == second.coverage
    assert abstention(probs, torch.zeros(4, dtype=torch.long)).aurc == 0.0
    assert abstention(probs, torch.ones(4, dtype=torch.long)).coverage == {0.8: 0.0, 0.9: 0.0, 0.95: 0.0}


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_temperature_undoes_a_scale_of_the_logits(factor: float) -> None:
    probs, labels = predictions()
    base = best_temperature(probs, labels)
    assert base == pytest.approx(1.0, abs=0.15)
    scaled = tempered(probs, 1 / factor)
    assert best_temperature(scaled, labels) == pytest.approx(factor * base, rel=1e-3)
    assert torch.allclose(tempered(scaled, factor), probs, atol=1e-9)


def test_temperature_is_never_fitted_on_what_it_is_scored_on() -> None:
    probs, labels = predictions()
    sharp = tempered(probs, 0.2)
    temperature, scores = after_temperature(sharp, labels)
    assert temperature == pytest.approx(5.0, rel=0.2)
    assert scores.ece < 0.5 * calibrate(sharp, labels).ece
    even = torch.arange(600) % 2 == 0
    first = tempered(sharp[even], best_temperature(sharp[~even], labels[~even]))
    second = tempered(sharp[~even], best_temperature(sharp[even], labels[even]))
    whole = torch.empty_like(sharp)
    whole[even], whole[~even] = first, second
    assert scores.nll == pytest.approx(calibrate(whole, labels).nll)


def test_zero_probabilities_stay_finite() -> None:
    probs, labels = torch.eye(3), torch.tensor([0, 1, 0])
    assert math.isfinite(best_temperature(probs, labels))
    assert torch.isfinite(tempered(probs, 2.0)).all()


def test_bootstrap_covers_the_value_and_repeats_itself() -> None:
    probs, labels = predictions()

    def brier(p: torch.Tensor, y: torch.Tensor) -> float:
        return calibrate(p, y).brier

    low, high = bootstrap(probs, labels, brier, draws=200)
    assert low < brier(probs, labels) < high
    assert bootstrap(probs, labels, brier, draws=200) == (low, high)
    wide = bootstrap(probs[:100], labels[:100], brier, draws=200)
    assert wide[1] - wide[0] > high - low


def test_auroc_by_hand_and_by_torchmetrics() -> None:
    from torchmetrics.functional.classification import binary_auroc

    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    # Right: .9 and one .8; wrong: the other .8 and .6. Of four pairs three are in order and one is a tie.
    assert auroc(probs, torch.tensor([0, 0, 1, 1])) == pytest.approx(3.5 / 4)
    assert auroc(probs, torch.zeros(4, dtype=torch.long)) is None
    many, labels = predictions()
    many = (many * 20).round() / 20 + 1e-3
    theirs = binary_auroc(many.max(1).values, (many.argmax(1) == labels).long())
    assert auroc(many, labels) == pytest.approx(float(theirs), abs=1e-6)


def test_entropies_of_right_and_wrong_answers() -> None:
    probs = torch.tensor([[0.5, 0.5 - 1e-9], [1.0, 0.0], [0.9, 0.1]])
    right, wrong = entropies(probs, torch.tensor([0, 1, 1]))
    assert right == pytest.approx(math.log(2), abs=1e-6)
    assert wrong == pytest.approx((0.0 - 0.9 * math.log(0.9) - 0.1 * math.log(0.1)) / 2, abs=1e-6)
    assert entropies(probs[:1], torch.tensor([0]))[1] is None


def test_all_resamples_at_once_agree_with_one_by_one() -> None:
    probs, labels = predictions()
    sharp = tempered(probs, 0.5)
    found = spread(sharp, labels, draws=300)
    slow = {
        "ece": bootstrap(sharp, labels, lambda p, y: calibrate(p, y).ece, draws=300),
        "over": bootstrap(sharp, labels, lambda p, y: calibrate(p, y).over, draws=300),
        "under": bootstrap(sharp, labels, lambda p, y: calibrate(p, y).under, draws=300),
    }
    for name, ends in slow.items():
        # The very same resamples in the same order.
        assert found[name] == pytest.approx(ends, abs=1e-12)
    gap = float((sharp.max(1).values - (sharp.argmax(1) == labels).double()).mean())
    assert found["gap"][0] < gap < found["gap"][1]


def test_a_profile_tells_both_findings_apart_and_what_a_temperature_mends() -> None:
    probs, labels = predictions(n=800)
    clean = tempered(probs, 2.0).numpy()
    risk_averse = profile(clean, labels.numpy())
    assert risk_averse is not None and risk_averse.under > 0.1 > risk_averse.over
    assert risk_averse.intervals["under"][0] > 0.1 and risk_averse.confidence < risk_averse.accuracy
    mended = risk_averse.after("clean")
    assert mended is not None and mended.temperature == pytest.approx(0.5, rel=0.2) and mended.under < 0.06
    # Attacked: every answer wrong and sure. What suits clean inputs makes it worse, what suits attacked ones better.
    wrong = probs.roll(1, dims=1)
    attacked = profile(tempered(wrong, 0.5).numpy(), labels.numpy(), clean)
    assert attacked is not None and attacked.over > 0.3
    by_clean, by_attacked = attacked.after("clean"), attacked.after("attacked")
    assert by_clean.temperature == pytest.approx(mended.temperature)
    assert by_clean.over > attacked.over > by_attacked.over and by_attacked.nll < attacked.nll < by_clean.nll
    assert dict(attacked.coverage)[0.95] <= dict(risk_averse.coverage)[0.95]


def test_a_profile_of_nothing_and_of_few_samples() -> None:
    import numpy as np

    probs, labels = predictions(n=3)
    assert profile(probs.numpy()[:0], labels.numpy()[:0]) is None
    assert profile(np.full((3, 5), np.nan), labels.numpy()) is None
    few = profile(probs.numpy(), labels.numpy())
    assert few is not None and few.rescaled == [] and few.n == 3
    assert profile(np.eye(5)[labels.numpy()], labels.numpy()).auroc is None
