"""Low-frequency PGD: on a linear model the optimum within the slow waves is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maodun.attacks.gradient.lowfreq import LowFrequency, slow
from maodun.attacks.gradient.pgd import PGD
from maodun.core.errors import InputError
from maodun.core.geometry import cosine_basis
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.defenses.training import Batch, Inner

SHAPE = (2, 8, 6)
IDS = torch.arange(12)
X = 0.4 + 0.2 * Stream(0, "x").uniform(IDS, SHAPE)
WEIGHT = Stream(0, "w").normal(torch.arange(1), SHAPE)[0]


class Line(nn.Module):
    """Two logits, 0 and w.x: class 0 is the label, and the attack climbs w."""

    def forward(self, x: Tensor) -> Tensor:
        score = (x * WEIGHT).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score - 50.0], 1)


def _climb(attack: PGD, norm: str, eps: float, rows: Tensor = IDS) -> Tensor:
    labels = torch.zeros(len(rows), dtype=torch.int64)
    return Inner(attack, Threat(norm, eps))(Line(), Batch(X[rows], labels, rows, 0)) - X[rows]


def test_slow_is_an_orthogonal_projection_on_the_slowest_waves() -> None:
    delta = Stream(1, "d").normal(IDS, SHAPE)
    kept = slow(delta, 0.5)
    spectrum = cosine_basis(8) @ kept @ cosine_basis(6).T
    whole = cosine_basis(8) @ delta @ cosine_basis(6).T
    assert torch.allclose(spectrum[..., :4, :3], whole[..., :4, :3], atol=1e-5)
    assert float(spectrum[..., 4:, :].abs().max()) < 1e-5
    assert float(spectrum[..., :, 3:].abs().max()) < 1e-5
    assert torch.allclose(slow(kept, 0.5), kept, atol=1e-5)
    assert torch.allclose(slow(delta, 1.0), delta, atol=1e-5)
    assert torch.allclose(slow(delta, 0.01), delta.mean((2, 3), keepdim=True).expand_as(delta), atol=1e-5)


def test_in_l2_a_linear_model_is_climbed_along_its_slow_part_to_the_rim() -> None:
    delta = _climb(LowFrequency(share=0.5, steps=20, random_start=False, loss="margin"), "l2", 0.2)
    part = slow(WEIGHT.unsqueeze(0), 0.5)
    assert torch.allclose(delta, (0.2 * part / part.norm()).expand_as(delta), atol=1e-5)


def test_in_linf_the_step_is_the_sign_of_the_slow_part() -> None:
    delta = _climb(LowFrequency(share=0.5, steps=4, random_start=False, loss="margin"), "linf", 0.05)
    assert torch.allclose(delta, (0.05 * slow(WEIGHT.unsqueeze(0), 0.5).sign()).expand_as(delta), atol=1e-6)


def test_a_random_start_is_slow_and_inside_the_ball() -> None:
    delta = _climb(LowFrequency(share=0.25, steps=1, step_size=1e-9, loss="margin"), "l2", 0.2)
    assert torch.allclose(slow(delta, 0.25), delta, atol=1e-5)
    assert float(delta.flatten(1).norm(dim=1).max()) <= 0.2 + 1e-5
    assert float(delta.flatten(1).norm(dim=1).min()) > 0


def test_all_waves_are_pgd_and_batches_do_not_matter() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    labels = model(X).argmax(1)
    attacks = (PGD(steps=5, random_start=False), LowFrequency(steps=5, share=1.0, random_start=False))
    found = [attack.run(Oracle(model), X, labels, Threat("l2", 0.8)).x_adv for attack in attacks]
    assert torch.allclose(*found, atol=1e-4)
    attack = LowFrequency(steps=5, share=0.3)
    whole = attack.run(Oracle(model, batch_size=64), X, labels, Threat("linf", 0.1)).x_adv
    parts = attack.run(Oracle(model, batch_size=1), X, labels, Threat("linf", 0.1)).x_adv
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        LowFrequency(share=share)
