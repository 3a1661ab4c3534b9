"""A committee of classifiers as a defence: what the surrogates' ensemble does, and votes and random members."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core import context
from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError, nearest

FUSIONS = ("logits", "probabilities", "majority")
# What the mean probabilities add to the votes: less than any vote, so that they only part what is tied.
_TIE = 0.01


class Votes(nn.Module):
    """Every member's vote as a one-hot row: N x M x C logits in, the same shape out.

    Its derivative is zero; the BPDA partner is the softmax.
    """

    name = "majority vote"
    broken = True

    def forward(self, answers: Tensor) -> Tensor:
        """Return one-hot votes."""
        return F.one_hot(answers.argmax(2), answers.shape[2]).to(answers)

    def bpda_partner(self, answers: Tensor) -> Tensor:
        """Return the members' probabilities."""
        return answers.softmax(2)


class Committee(Ensemble):
    """Classifiers that answer as one: N x ... in [0, 1] to N x C logits.

    `fusion`: logits (their mean), probabilities (the logarithm of the mean softmax) or majority (the logarithm of the
    shares of votes, ties parted by the mean probability). `subset` of the members answer each query, drawn anew for
    every sample and call from keyed noise; None means all. All members are evaluated in any case, so that a sample's
    answer does not depend on its batch. A member may itself be defended; two with equal random defences draw apart.
    `price` counts every member once per call. InputError for an unknown fusion, a subset that is none, and (at the
    first call) for members that answer other numbers of classes.

    Source: logit and probability averages as in Strauss et al. (2017) and Pang et al. (ICML 2019), random members as
    in random self-ensembles (Liu et al., ECCV 2018); attacked as in Tramer et al. (NeurIPS 2020).
    """

    def __init__(self, members: Sequence[nn.Module], *, fusion: str = "logits", subset: int | None = None) -> None:
        if fusion not in FUSIONS:
            raise InputError(f"fusion '{fusion}'", "is not a way to answer as one", nearest(fusion, list(FUSIONS)))
        super().__init__(members, fusion="logits" if fusion == "majority" else fusion)
        if subset is not None and not 1 <= subset <= len(members):
            reason = f"cannot be drawn from {len(members)} members"
            raise InputError(f"subset {subset}", reason, f"give 1 to {len(members)}, or leave it out for all")
        self.fusion, self.subset = fusion, subset
        self.votes = Votes() if fusion == "majority" else None
        self.stochastic = subset is not None and subset < len(members)
        self.name = f"a random {subset} of {len(members)} members" if self.stochastic else f"{len(members)} members"

    def forward(self, x: Tensor) -> Tensor:
        """Return the committee's logits, N x C."""
        answers = self.answers(x)
        weights = self._weights(x).unsqueeze(2)
        if self.fusion == "logits":
            return (weights * answers).sum(1)
        if self.fusion == "probabilities":
            return (weights.log() + answers.log_softmax(2)).logsumexp(1)
        shares = answers.softmax(2).detach()
        votes = answers if self.votes is None else self.votes(answers)
        # Clamped no higher than need be: below it a class without a vote has no derivative left.
        return (weights * (votes + _TIE * shares)).sum(1).clamp_min(torch.finfo(torch.float32).tiny).log()

    def answers(self, x: Tensor) -> Tensor:
        """Return every member's logits, N x M x C."""
        answers: list[Tensor] = []
        for place, member in enumerate(self.members):
            with context.part(f"member-{place}"):
                answers.append(member(x).float())
        refuse_other_classes([str(place + 1) for place in range(len(answers))], answers)
        return torch.stack(answers, dim=1)

    def _weights(self, x: Tensor) -> Tensor:
        """Return each sample's weights of the members, N x M, adding up to one."""
        members = len(self.members)
        if not self.stochastic or self.subset is None:
            return x.new_full((x.shape[0], members), 1.0 / members)
        order = context.noise(x, "committee").uniform((members,)).argsort(1).argsort(1)
        return (order < self.subset).to(torch.float32) / self.subset

    def extra_repr(self) -> str:
        """Return what rebuilds it, besides the members."""
        return f"fusion={self.fusion}, subset={self.subset}"


def refuse_other_classes(names: Sequence[str], answers: Sequence[Tensor]) -> None:
    """Raise InputError when members, by name, do not answer with the same shape (N x C)."""
    for name, answer in zip(names, answers, strict=True):
        if answer.ndim != 2 or answer.shape[1] != answers[0].shape[1]:
            reason = f"answers {_classes(answer)} where member '{names[0]}' answers {_classes(answers[0])}"
            raise InputError(f"member '{name}'", reason, "take members of the same classes")


def _classes(answer: Tensor) -> str:
    return f"{answer.shape[1]} classes" if answer.ndim == 2 else f"a tensor of shape {tuple(answer.shape)}"
