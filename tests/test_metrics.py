"""Metrics: rates against closed forms and another library, denominators by hand, curves of a known model."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from maodun.arena import metrics
from maodun.arena.calibrated import profile
from maodun.arena.laboratory import stronger
from maodun.arena.summary import Rate


def columns(success: list[int], correct: list[int], **more: list[float]) -> dict[str, np.ndarray]:
    table = {
        "sample_id": np.arange(len(success)),
        "success": np.array(success, bool),
        "clean_correct": np.array(correct, bool),
    }
    return table | {name: np.array(values) for name, values in more.items()}


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 17), (532, 1000), (1, 1)])
def test_interval_is_clopper_and_pearson_s(hits: int, n: int) -> None:
    found = metrics.rate(hits, n)
    low, high = proportion_confint(hits, n, alpha=0.05, method="beta")
    assert found.value == hits / n
    assert found.low == pytest.approx(low if hits else 0.0, abs=1e-9)
    assert found.high == pytest.approx(high if hits < n else 1.0, abs=1e-9)


def test_interval_of_no_successes_in_closed_form() -> None:
    assert metrics.rate(0, 50).high == pytest.approx(1 - 0.025 ** (1 / 50), abs=1e-12)


def test_interval_of_nothing() -> None:
    assert metrics.rate(0, 0) == Rate(value=0.0, low=0.0, high=1.0, n=0)


def test_both_denominators_of_attack_success() -> None:
    # Five samples: two clean errors (successes of any attack), one of the three right ones falls.
    table = columns(success=[1, 1, 1, 0, 0], correct=[0, 0, 1, 1, 1])
    assert metrics.clean_accuracy(table).value == pytest.approx(3 / 5)
    assert metrics.robust_accuracy(table).value == pytest.approx(2 / 5)
    assert (metrics.success_of_all(table).value, metrics.success_of_all(table).n) == (3 / 5, 5)
    assert (metrics.success_of_correct(table).value, metrics.success_of_correct(table).n) == (1 / 3, 3)


def test_distances_are_those_of_the_fallen() -> None:
    table = columns([1, 1, 1, 0], [0, 1, 1, 1], distance=[9.0, 0.1, 0.3, 5.0], rho=[9.0, 0.2, 0.4, 5.0])
    assert metrics.median_distance(table) == pytest.approx(0.2)
    assert metrics.rho(table) == pytest.approx(0.3)
    none = columns([0], [1], distance=[1.0], rho=[1.0])
    assert metrics.median_distance(none) is None
    assert metrics.rho(none) is None


def test_worst_case_is_per_sample_and_matches_samples_by_id() -> None:
    first = columns([1, 0, 0, 0], [1, 1, 1, 1])
    second = columns([0, 0, 1, 1], [1, 1, 1, 1]) | {"sample_id": np.array([3, 2, 1, 0])}
    clean, robust, strongest = metrics.worst_case([first, second])
    # The first fells sample 0, the second samples 1 and 0: two of four stand.
    assert (clean.value, robust.value, strongest) == (1.0, 0.5, 1)


def test_worst_case_counts_only_what_all_have_seen() -> None:
    first = columns([1, 0, 0, 0], [1, 1, 0, 1])
    second = {name: values[:2] for name, values in columns([0, 0, 0, 0], [1, 1, 0, 1]).items()}
    clean, robust, _ = metrics.worst_case([first, second])
    assert (clean.n, robust.value) == (2, 0.5)


def test_security_curve_of_uniform_distances_is_a_straight_line() -> None:
    n = 1001
    distance = np.linspace(0.001, 1.0, n)
    table = columns([1] * n, [1] * n) | {"distance": distance}
    radii, robust = metrics.security_curve(table, points=11)
    assert radii == pytest.approx(np.linspace(0, 1, 11))
    assert robust == pytest.approx(1 - np.linspace(0, 1, 11), abs=2e-3)
    assert (robust[0], robust[-1]) == (1.0, 0.0)


def test_security_curve_without_falls_is_a_point() -> None:
    table = columns([1, 0, 0, 0], [0, 1, 1, 1]) | {"distance": np.zeros(4)}
    assert metrics.security_curve(table) == ([0.0], [0.75])


def test_calibration_needs_samples_and_finite_values() -> None:
    assert profile(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)) is None
    assert profile(np.full((2, 3), np.nan, np.float32), np.zeros(2, np.int64)) is None
    found = profile(np.eye(3, dtype=np.float32), np.arange(3))
    assert found is not None
    assert (found.ece, found.brier, found.n) == (0.0, 0.0, 3)


def test_paired_sign_test() -> None:
    import torch

    one = torch.tensor([True] * 6 + [False] * 10)
    two = torch.tensor([False] * 6 + [False] * 9 + [True])
    only, other, p = stronger(one, two)
    # Six against one: the chance of six or seven heads in seven throws is 8 / 128.
    assert (only, other) == (6, 1)
    assert p == pytest.approx(8 / 128)
    assert stronger(one, one) == (0, 0, 1.0)
