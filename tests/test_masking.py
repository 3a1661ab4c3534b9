"""Masks: what they leave alone, what they hide, and that an adversary who knows them sees what was there before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.attacks.gradient.pgd import PGD
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.estimators import BPDA, EOT, Estimator, Exact
from maodun.core.losses import get_loss
from maodun.core.oracle import Oracle, is_stochastic
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge
from maodun.defenses import DEFENSES, Stack, build_defense
from maodun.defenses.masking import KWTA, MASKS, NoiseLayers, Saturating
from maodun.zoo import load_data, load_model

LIFTED = sorted(mask.name for mask in MASKS if mask.lifted)
INSIDE = sorted(mask.name for mask in MASKS if mask.innermost)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return load_model("zoo:digits-cnn").model


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_data("digits", limit=64)
    return data.x, data.y


def gradient(model: nn.Module, x: Tensor, y: Tensor, estimator: Estimator, loss: str = "ce") -> Tensor:
    oracle, function = Oracle(model, gradient=estimator), get_loss(loss)
    with oracle.ready():
        session = oracle.session(x, torch.arange(len(x)), 0)
        rows = torch.arange(len(x))
        found = session.estimate(x, rows, lambda logits, at: function(logits, y[at], None).unsqueeze(1))
    return found[2][0]


def test_every_mask_is_a_defence_that_says_how_it_is_seen_through() -> None:
    for mask in MASKS:
        assert DEFENSES[mask.name] is mask
        assert len(mask.mitigation) > 10
        # What hides a gradient declares it, unless its own gradient is there for the taking.
        assert mask.broken or mask.name in ("noise_layers", "k_wta")


@pytest.mark.parametrize("name", LIFTED)
def test_decisions_are_those_of_the_bare_classifier(name: str, net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, _ = digits
    bare = net(x)
    lead = bare.topk(2, dim=1).values
    clear = lead[:, 0] - lead[:, 1] > 0.02
    assert int(clear.sum()) > 60
    masked = build_defense(name).wrap(net)(x)
    assert torch.equal(masked.argmax(1)[clear], bare.argmax(1)[clear])


@pytest.mark.parametrize("name", LIFTED)
@pytest.mark.parametrize("every", [True, False])
def test_plain_gradients_are_hidden_and_the_adaptive_one_is_the_bare_one(
    name: str, every: bool, net: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits
    masked = build_defense(name).wrap(net)
    bare = gradient(net, x, y, Exact())
    assert float((bare != 0).flatten(1).any(1).float().mean()) == 1.0
    plain = gradient(masked, x, y, Exact())
    hidden = (plain == 0).flatten(1).all(1)
    assert float(hidden.float().mean()) > 0.8
    assert torch.allclose(gradient(masked, x, y, BPDA(every=every)), bare, atol=1e-7)


def test_a_margin_sees_through_a_scale_without_any_partner(net: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    scaled = gradient(build_defense("logit_scale", factor=500.0).wrap(net), x, y, Exact(), "margin")
    assert torch.allclose(scaled / 500.0, gradient(net, x, y, Exact(), "margin"), atol=1e-4)


class Functions(nn.Module):
    """ReLUs in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return torch.relu(self.act(self.two(x)).relu())


class TestActivations:
    def test_all_spellings_are_exchanged_and_given_back(self) -> None:
        net, x = Functions(), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        before = net(x)
        places: list[int] = []

        class Note(KWTA):
            name = "note"

            def activation(self, x: Tensor, place: int) -> Tensor:
                places.append(place)
                return F.relu(x)

        assert torch.equal(Note().wrap(net)(x), before)
        assert places == [0, 1, 2, 3]
        assert torch.equal(net(x), before)
        zero = Saturating(step=1e9).wrap(net)(x).detach()
        assert float(zero.abs().max()) < 1e-9
        assert torch.equal(net(x), before)

    @pytest.mark.parametrize("name", INSIDE)
    def test_a_classifier_without_relus_is_refused(self, name: str) -> None:
        with pytest.raises(InputError, match="no ReLU"):
            build_defense(name).wrap(nn.Linear(4, 2))(torch.rand(2, 4))

    @pytest.mark.parametrize("name", INSIDE)
    def test_it_stands_last_in_a_stack(self, name: str) -> None:
        with pytest.raises(InputError, match="changes the classifier itself"):
            Stack([build_defense(name), build_defense("bit_depth")])
        Stack([build_defense("bit_depth"), build_defense(name)])

    def test_winners(self) -> None:
        x = torch.tensor([[1.0, -5.0, 3.0, 2.0, 0.5], [-1.0, -2.0, -3.0, -4.0, -5.0]])
        assert KWTA(share=0.4)(x).tolist() == [[0, 0, 3, 2, 0], [0, 0, 0, 0, 0]]
        assert torch.equal(KWTA(share=1.0)(x), F.relu(x))
        wide = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 5
        assert (KWTA(share=0.2)(wide) > 0).flatten(1).sum(1).tolist() == [15] * 4

    def test_saturation_hides_a_derivative_that_the_relu_has(self) -> None:
        stairs = Saturating(step=0.5, sharpness=1000.0)
        x = torch.tensor([-1.0, 0.1, 0.4, 0.6, 1.3, 1.7], requires_grad=True)
        out = stairs(x)
        assert out.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.5, 1.5, 1.5], abs=1e-6)
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert slope.tolist() == [0.0] * 6
        (slope,) = torch.autograd.grad(stairs.bpda_partner(x).sum(), x)
        assert slope.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        fine = Saturating(step=1e-3)(torch.linspace(-1, 3, 1000))
        assert torch.allclose(fine, F.relu(torch.linspace(-1, 3, 1000)), atol=1e-3)

    def test_noise_is_keyed_and_has_its_size(self) -> None:
        mask = NoiseLayers(sigma=0.5)
        x = torch.full((3, 4000), 2.0)

        def drawn(ids: list[int], place: int = 0, number: int = 0) -> Tensor:
            with context.draw(Stream(0, "test"), torch.tensor(ids), torch.full((len(ids),), number)):
                return mask(x[: len(ids)], place)

        together = drawn([4, 5, 6])
        assert float((together - 2.0).std()) == pytest.approx(1.0, rel=0.05)
        assert torch.equal(drawn([6, 4]), together[[2, 0]])
        assert not torch.equal(drawn([4, 5, 6], place=1), together)
        assert not torch.equal(drawn([4, 5, 6], number=1), together)
        assert is_stochastic(mask.wrap(nn.ReLU()))

    def test_the_mean_over_draws_comes_nearer_to_the_bare_gradient(
        self, net: nn.Module, digits: tuple[Tensor, Tensor]
    ) -> None:
        x, y = digits
        noisy = NoiseLayers(sigma=1.0).wrap(net)
        bare = gradient(net, x, y, Exact(), "margin").flatten(1)

        def agreement(estimator: Estimator) -> float:
            return float(F.cosine_similarity(gradient(noisy, x, y, estimator, "margin").flatten(1), bare).mean())

        one, many = agreement(Exact()), agreement(EOT(Exact(), 20))
        assert many > one + 0.1


@pytest.mark.parametrize("name", sorted(mask.name for mask in MASKS))
def test_the_adaptive_number_is_that_of_the_network_without_the_mask(
    name: str, net: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits
    masked = build_defense(name).wrap(net)
    # k-WTA breaks the surface into pieces: its gradient is sound, and takes more steps to follow.
    threat, attack = Threat("linf", 0.15), PGD(steps=30 if name == "k_wta" else 8)

    def standing(model: nn.Module, estimator: Estimator) -> float:
        found = attack.run(Oracle(model, gradient=estimator), x, y, threat, check_model=False)
        return judge(model, found.x_adv, x, y, threat).robust.value

    adaptive = EOT(Exact(), 4) if name == "noise_layers" else BPDA(every=False)
    assert standing(masked, adaptive) <= standing(net, Exact()) + 0.02
    if name in LIFTED:
        assert standing(masked, Exact()) > 0.4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("noise_layers", {"sigma": 0.0}, "must be positive"),
        ("k_wta", {"share": 0.0}, "share of the activations"),
        ("saturating", {"step": -1.0}, "must be positive"),
        ("truncated_gradient", {"step": 0.0}, "must be positive"),
        ("quantised_logits", {"step": 0.0}, "must be positive"),
        ("squashed_logits", {"sharpness": 0.0}, "must be positive"),
        ("logit_scale", {"factor": 0.0}, "must be positive"),
    ],
)
def test_refusals(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_defense(name, **options)
