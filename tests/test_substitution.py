"""Word substitution: the worst replacement of a linear model is known, the budget holds, candidates are scored anew."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from maodun.attacks.text import Substitution
from maodun.core.errors import InputError

V = 12
TABLE = torch.full((V, 3), -1)
TABLE[2], TABLE[3], TABLE[4] = torch.tensor([5, 6, -1]), torch.tensor([7, -1, -1]), torch.tensor([8, 9, 10])


class Sum(nn.Module):
    """Logit 1 is the sum of the words' weights, logit 0 is zero."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, tokens: Tensor) -> Tensor:
        total = (self.weights[tokens] * (tokens != 0)).sum(1)
        return torch.stack([torch.zeros_like(total), total], 1)


class Pairs(Sum):
    """Only words 6 and 7 together turn the answer: each alone makes it surer."""

    def forward(self, tokens: Tensor) -> Tensor:
        both = (tokens == 6).any(1) & (tokens == 7).any(1)
        one = (tokens == 6).any(1) | (tokens == 7).any(1)
        score = torch.where(both, -1.0, torch.where(one, 2.0, 1.0)) + 0.1 * (tokens == 5).any(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def sentences(n: int = 40, length: int = 9) -> tuple[Tensor, Tensor, Sum]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, V, (n, length), generator=generator)
    tokens[torch.arange(length).expand(n, -1) >= torch.randint(3, length + 1, (n, 1), generator=generator)] = 0
    model = Sum(torch.randn(V, generator=generator))
    return tokens, model(tokens).argmax(1), model


def test_greedy_finds_the_best_budget_of_a_linear_model():
    tokens, y, model = sentences()
    attack = Substitution(share=0.4)
    found = attack.run(model, tokens, y, TABLE)
    for row, label, got in zip(tokens, y, found.success, strict=True):
        sign = 1 if int(label) == 0 else -1
        gains = []
        for word in row[row != 0].tolist():
            options = [sign * (model.weights[o] - model.weights[word]).item() for o in TABLE[word].tolist() if o >= 0]
            gains.append(max([0.0, *options]))
        budget = max(1, int(0.4 * len(gains) + 1e-9))
        start = sign * float(model(row[None])[0, 1])
        assert bool(got) == (start + sum(sorted(gains)[-budget:]) > 0), row
    assert bool((found.changed <= attack.budget(tokens)).all())
    assert 0 < int(found.success.sum()) < len(y)


def test_one_step_equals_trying_everything():
    tokens, y, model = sentences()
    found = Substitution(share=0.01).run(model, tokens, y, TABLE)
    for k, row in enumerate(tokens):
        worst, tried = -1e9, 1
        for place, word in enumerate(row.tolist()):
            for option in TABLE[word].tolist():
                if option >= 0:
                    changed = row.clone()
                    changed[place] = option
                    z = model(changed[None])[0]
                    worst, tried = max(worst, float(z[1 - y[k]] - z[y[k]])), tried + 1
        assert bool(found.success[k]) == (worst > 0)
        assert int(found.queries[k]) == tried


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_neither_batch_size_nor_order_matters(size):
    tokens, y, model = sentences()
    whole = Substitution(share=0.4).run(model, tokens, y, TABLE)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    mixed = Substitution(share=0.4, batch_size=size).run(model, tokens[order], y[order], TABLE)
    assert torch.equal(whole.tokens[order], mixed.tokens)
    assert torch.equal(whole.queries[order], mixed.queries)


def test_a_beam_finds_what_greed_misses_and_keeps_different_sentences():
    tokens, y = torch.tensor([[2, 3, 11, 11]]), torch.tensor([1])
    model = Pairs(torch.zeros(V))
    assert not bool(Substitution(share=0.5).run(model, tokens, y, TABLE).success)
    found = Substitution(share=0.5, beam=3).run(model, tokens, y, TABLE)
    assert bool(found.success)
    assert sorted(set(found.tokens[0].tolist())) == [6, 7, 11]
    every = list(itertools.product([2, 5, 6], [3, 7]))
    assert int(found.queries) <= 1 + 3 + 3 * len(every)


def test_two_beams_that_meet_in_one_sentence_keep_a_second():
    tokens, beams = torch.tensor([[2, 3, 11, 11]]), torch.tensor([[[6, 3, 11, 11], [2, 7, 11, 11]]])
    made, best, asked = Substitution(share=0.5, beam=2)._widen(
        Pairs(torch.zeros(V)), beams, tokens, torch.tensor([1]), TABLE
    )
    assert made[0, 0].tolist() == [6, 7, 11, 11]
    assert made[0, 1].tolist() != [6, 7, 11, 11]
    assert (best.item(), asked.item()) == (1.0, 3)


def test_wrong_sentences_are_left_alone_and_count():
    tokens, y, model = sentences()
    found = Substitution().run(model, tokens, 1 - y, TABLE)
    assert bool(found.success.all())
    assert torch.equal(found.tokens, tokens)
    assert bool((found.queries == 1).all())


def test_the_verdict_takes_the_clean_sentence_when_a_candidate_is_outside():
    tokens, y = torch.tensor([[2, 3, 11, 11]]), torch.tensor([1])
    model, attack = Pairs(torch.zeros(V)), Substitution(share=0.5)
    inside, foreign, many = torch.tensor([[6, 7, 11, 11]]), torch.tensor([[6, 7, 11, 2]]), torch.tensor([[5, 7, 2, 2]])
    assert attack.judge(model, inside, tokens, y, TABLE)[0].tolist() == [True]
    for outside in (foreign, many):
        success, changed = attack.judge(model, outside, tokens, y, TABLE)
        assert success.tolist() == [False]
        assert changed.tolist() == [0]
    assert Substitution(share=0.25).judge(model, inside, tokens, y, TABLE)[0].tolist() == [False]


def test_nothing_to_substitute_changes_nothing():
    tokens, y, model = sentences()
    found = Substitution(share=1.0).run(model, tokens, y, torch.full((V, 1), -1))
    assert torch.equal(found.tokens, tokens)
    assert not bool(found.success.any())
    assert model.weights.requires_grad


def run(tokens: Tensor) -> None:
    Substitution().run(Sum(torch.ones(99)), tokens, torch.tensor([0, 1]), TABLE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Substitution(share=0.0), "share 0.0"),
        (lambda: Substitution(share=1.5), "share 1.5"),
        (lambda: Substitution(beam=0), "beam 0"),
        (lambda: run(torch.tensor([[2, 0], [0, 0]])), "sentence 1: holds"),
        (lambda: run(torch.tensor([[2], [50]])), "word number 50"),
        (lambda: run(torch.rand(2, 3)), "give word numbers"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
