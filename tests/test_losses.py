"""Losses: hand-computed values, shift and scale invariance, few classes, and a gradient under shifted logits."""

from __future__ import annotations

import math

import pytest
import torch

from maodun.core.errors import InputError
from maodun.core.losses import LOSSES, dlr, get_loss, margin

Z = torch.tensor([[4.0, 1.0, 3.0, -2.0, 0.0], [0.5, 2.5, -1.0, 2.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([0, 3])
T = torch.tensor([2, 0])


def test_values_by_hand():
    assert margin(Z, Y).tolist() == [-1.0, 0.5]
    assert margin(Z, Y, T).tolist() == [-1.0, -2.0]
    assert dlr(Z, Y).tolist() == pytest.approx([-1.0 / 3.0, 0.5 / 2.0])
    assert dlr(Z, Y, T).tolist() == pytest.approx([-1.0 / (4.0 - 0.5), -1.5 / (2.5 - 0.25)])
    ce = LOSSES["ce"](Z, Y, None)
    assert ce.tolist() == pytest.approx((Z.logsumexp(1) - Z.gather(1, Y[:, None]).squeeze(1)).tolist())


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("targets", [None, T])
@pytest.mark.parametrize("shift", [-50.0, 1000.0])
def test_shift_changes_neither_value_nor_gradient(name, targets, shift):
    a, b = Z.clone().requires_grad_(), (Z + shift).requires_grad_()
    la, lb = LOSSES[name](a, Y, targets), LOSSES[name](b, Y, targets)
    assert torch.allclose(la, lb, atol=1e-9)
    ga, gb = torch.autograd.grad(la.sum(), a)[0], torch.autograd.grad(lb.sum(), b)[0]
    assert torch.allclose(ga, gb, atol=1e-9)
    assert (ga.abs().sum(1) > 0).all()


@pytest.mark.parametrize("targets", [None, T])
def test_dlr_ignores_scale(targets):
    assert torch.allclose(dlr(Z, Y, targets), dlr(1000.0 * Z, Y, targets))


@pytest.mark.parametrize("name", ["margin", "dlr"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("aim", [False, True])
def test_two_and_three_classes_still_climb(name, classes, aim):
    z = torch.tensor([[2.0, 1.0, 0.25][:classes]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1]) if aim else None
    loss = LOSSES[name](z, torch.tensor([0]), targets)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert math.isfinite(float(loss.detach())) and grad[0, 0] < 0 < grad[0, 1]


def test_margin_sign_is_success():
    for row in range(2):
        assert (float(margin(Z, Y)[row]) > 0) == (int(Z[row].argmax()) != int(Y[row]))


def test_unknown_loss_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'margin'"):
        get_loss("margn")
