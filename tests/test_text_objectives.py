"""Objectives on embeddings equal their equations written out sentence by sentence, and training resumes to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.training import (
    Batch,
    EmbeddingAdversarial,
    EmbeddingNoise,
    EmbeddingObjective,
    FitSettings,
    Trim,
    VirtualAdversarial,
    fit,
)
from maodun.defenses.training.embedding import UNLABELLED, supervised
from maodun.tasks.text import TextNet, build_text_net

TOKENS = torch.tensor([[2, 3, 4, 0, 0], [5, 5, 0, 0, 0], [6, 2, 7, 3, 1], [4, 1, 6, 0, 0]])
Y = torch.tensor([0, 1, 2, 1])
FREQUENCIES = torch.tensor([0.0, 0.05, 0.3, 0.25, 0.2, 0.1, 0.06, 0.04], dtype=torch.float64)
OBJECTIVES = [
    EmbeddingObjective(seed=3),
    EmbeddingNoise(eps=0.7, weight=0.5, seed=3),
    EmbeddingAdversarial(eps=0.7, weight=0.5, seed=3),
    VirtualAdversarial(eps=0.7, weight=0.5, seed=3, iterations=2),
]


def network(dropout: float = 0.0, kind: str = "mean") -> TextNet:
    net = build_text_net(FREQUENCIES, kind=kind, width=5, hidden=6, classes=3, dropout=dropout, seed=1).double()
    net.embedding.frequencies = FREQUENCIES.clone()
    with torch.no_grad():
        net.head.weight.mul_(10.0)
    return net.train()


def batch(y: Tensor = Y, rows: Tensor | None = None) -> Batch:
    return Batch(TOKENS, y, torch.arange(4) if rows is None else rows, 11)


def embedded(net: TextNet, words: list[int]) -> Tensor:
    """The normalised embeddings of a sentence, written out word by word and dimension by dimension."""
    weight, rows = net.embedding.weight, []
    for word in words:
        row = []
        for d in range(weight.shape[1]):
            mean = sum(FREQUENCIES[j] * weight[j, d] for j in range(len(FREQUENCIES)))
            variance = sum(FREQUENCIES[j] * (weight[j, d] - mean) ** 2 for j in range(len(FREQUENCIES)))
            row.append((weight[word, d] - mean) / torch.sqrt(variance + 1e-12))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def answer(net: TextNet, s: Tensor) -> Tensor:
    hidden = (net.body.weight @ s.mean(0) + net.body.bias).clamp(min=0)  # type: ignore[operator]
    return net.head.weight @ hidden + net.head.bias


def kl(p: Tensor, z: Tensor) -> Tensor:
    return sum(p[c] * (torch.log(p[c]) - F.log_softmax(z, 0)[c]) for c in range(3))  # type: ignore[return-value]


def by_hand(objective: EmbeddingObjective, net: TextNet, y: Tensor) -> Tensor:
    direction = objective.direction(net, batch(y))
    clean, perturbed, labelled = [], [], 0
    for k in range(4):
        words = [w for w in TOKENS[k].tolist() if w]
        s = embedded(net, words)
        known = int(y[k]) != UNLABELLED
        labelled += known
        if known:
            clean.append(-F.log_softmax(answer(net, s), 0)[y[k]])
        d = direction[k, : len(words)]
        still = s.detach().requires_grad_(True)
        if type(objective) is EmbeddingNoise and known:
            perturbed.append(-F.log_softmax(answer(net, s + objective.eps * d), 0)[y[k]])
        if type(objective) is EmbeddingAdversarial and known:
            (g,) = torch.autograd.grad(F.log_softmax(answer(net, still), 0)[y[k]], still)
            r = -objective.eps * g / torch.sqrt((g**2).sum())
            perturbed.append(-F.log_softmax(answer(net, s + r), 0)[y[k]])
        if isinstance(objective, VirtualAdversarial):
            p = F.softmax(answer(net, s), 0).detach()
            for _ in range(objective.iterations):
                place = (objective.xi * d).clone().requires_grad_(True)
                (g,) = torch.autograd.grad(kl(p, answer(net, s.detach() + place)), place)
                d = g / torch.sqrt((g**2).sum())
            perturbed.append(kl(p, answer(net, s + objective.eps * d)))
    total = torch.stack(clean).sum() / labelled
    if perturbed:
        share = 4 if isinstance(objective, VirtualAdversarial) else labelled
        total = total + objective.weight * torch.stack(perturbed).sum() / share
    return total


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("y", [Y, torch.tensor([0, UNLABELLED, 2, UNLABELLED])], ids=["labelled", "half"])
def test_equals_its_equation_to_1e_10(objective, y):
    net, other = network(), network()
    value, hand = objective(net, batch(y)), by_hand(objective, other, y)
    assert abs(value.item() - hand.item()) < 1e-10
    value.backward()
    hand.backward()
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) < 1e-10, name


@pytest.mark.parametrize("kind", ["mean", "lstm"])
@pytest.mark.parametrize("objective", OBJECTIVES[2:], ids=lambda o: type(o).__name__)
def test_the_perturbation_has_the_radius_lies_on_words_and_raises_the_loss(objective, kind):
    net = network(kind=kind)
    flags = [p.requires_grad for p in net.parameters()]
    r = objective.craft(net, batch())
    assert net.training
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    assert torch.allclose(r.flatten(1).norm(dim=1), torch.full((4,), 0.7, dtype=torch.float64))
    assert bool((r[TOKENS == 0] == 0).all())
    net.eval()
    random = 0.7 * EmbeddingNoise(seed=5).direction(net, batch())
    if isinstance(objective, VirtualAdversarial):
        p = net(TOKENS).log_softmax(1)
        worst, any_ = ((p.exp() * (p - net(TOKENS, each).log_softmax(1))).sum(1) for each in (r, random))
        assert bool((worst > any_).all())
    else:
        assert bool(
            (
                F.cross_entropy(net(TOKENS, r), Y, reduction="none") > F.cross_entropy(net(TOKENS), Y, reduction="none")
            ).all()
        )


def test_without_weight_every_objective_is_the_baseline():
    base = EmbeddingObjective(seed=3)(network(0.4), batch())
    for kind in (EmbeddingNoise, EmbeddingAdversarial, VirtualAdversarial):
        assert torch.equal(kind(weight=0.0, seed=3)(network(0.4), batch()), base)


def test_draws_belong_to_the_row_and_step_not_to_the_batch():
    net, order = network(0.4), torch.tensor([2, 0, 3, 1])
    whole = VirtualAdversarial(seed=1).direction(net, batch())
    mixed = VirtualAdversarial(seed=1).direction(net, Batch(TOKENS[order], Y[order], order, 11))
    assert torch.equal(whole[order], mixed)
    assert not torch.equal(whole, VirtualAdversarial(seed=1).direction(net, Batch(TOKENS, Y, torch.arange(4), 12)))
    objective = EmbeddingObjective(seed=1)
    one = torch.cat(
        [objective.answer(net, Batch(TOKENS[k : k + 1], Y[k : k + 1], torch.tensor([k]), 11)) for k in range(4)]
    )
    assert torch.allclose(objective.answer(net, batch()), one, atol=1e-12)
    state = torch.get_rng_state()
    objective(net, batch())
    assert torch.equal(state, torch.get_rng_state())


def test_unlabelled_samples_teach_virtual_training_only():
    hidden = torch.full_like(Y, UNLABELLED)
    for objective in OBJECTIVES:
        net = network()
        value = objective(net, batch(hidden))
        value.backward()
        moved = any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in net.parameters())
        assert moved == isinstance(objective, VirtualAdversarial)
    assert float(supervised(torch.zeros(2, 3), torch.tensor([UNLABELLED, 1]))) == pytest.approx(1.0986, abs=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES[1:], ids=lambda o: type(o).__name__)
def test_training_resumes_to_the_same_weights(objective, tmp_path: Path):
    tokens = torch.randint(1, 8, (40, 6), generator=torch.Generator().manual_seed(0))
    y = (tokens == 3).any(1).long()

    def trained(checkpoint: Path | None = None, stop: bool = False) -> TextNet:
        net = build_text_net(FREQUENCIES, kind="mean", width=4, hidden=4, dropout=0.5, seed=0)

        def after(line: dict[str, float]) -> None:
            if stop and line["epoch"] == 0:
                raise KeyboardInterrupt

        settings = FitSettings(epochs=2, batch_size=16, rate=0.01, optimiser="adamw")
        fit(
            net,
            tokens,
            y,
            objective,
            settings,
            validate=lambda _: 0.0,
            augment=Trim(),
            checkpoint=checkpoint,
            on_epoch=after,
        )
        return net

    whole = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run.ckpt", stop=True)
    resumed = trained(tmp_path / "run.ckpt")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_trim_changes_no_answer():
    net = network().eval()
    cut = Trim()(TOKENS[:2], torch.arange(2), 0, 0)
    assert cut.shape == (2, 3)
    assert torch.allclose(net(cut), net(TOKENS[:2]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EmbeddingAdversarial(eps=0.0), "eps 0.0: is no radius"),
        (lambda: VirtualAdversarial(eps=-1.0), "eps -1.0: is no radius"),
        (lambda: EmbeddingNoise(eps=float("inf")), "is no radius"),
        (lambda: EmbeddingAdversarial(weight=-1.0), "weight -1.0"),
        (lambda: VirtualAdversarial(xi=0.0), "xi 0.0"),
        (lambda: VirtualAdversarial(iterations=0), "iterations 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
