"""Several models as one: what a transfer attack searches on when it has more than one surrogate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError, nearest

FUSIONS = ("logits", "probabilities")


class Ensemble(nn.Module):
    """The mean answer of `members`, each a model from N x ... in [0, 1] to N x C logits.

    `fusion` logits returns the mean of the logits (Dong et al., CVPR 2018), probabilities the logarithm of the mean
    softmax (Liu et al., ICLR 2017), which is again a set of logits. One call passes through every member, and the
    Oracle counts it as so many forwards; `Problem.members` gives attacks the members one by one. Members are neither
    copied nor moved. InputError for no member, something else than a module, or an unknown fusion; for members that
    disagree about the number of classes, at the first call.
    """

    members: nn.ModuleList

    def __init__(self, members: Sequence[nn.Module], *, fusion: str = "logits") -> None:
        super().__init__()
        if not members:
            raise InputError("ensemble", "has no member", "give at least one model")
        strange = [type(member).__name__ for member in members if not isinstance(member, nn.Module)]
        if strange:
            reason = f"holds a {strange[0]}, not a torch.nn.Module"
            raise InputError("ensemble", reason, "give modules from [0, 1] inputs to logits")
        if fusion not in FUSIONS:
            raise InputError(f"fusion '{fusion}'", "is not a fusion known here", nearest(fusion, list(FUSIONS)))
        self.members, self.fusion = nn.ModuleList(members), fusion

    @property
    def price(self) -> int:
        """How many network evaluations one call costs."""
        return sum(price_of(member) for member in self.members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fused logits, N x C."""
        answers: list[Tensor] = [member(x).float() for member in self.members]
        shapes = [tuple(answer.shape[1:]) for answer in answers]
        if len(set(shapes)) > 1:
            raise InputError("ensemble", f"its members answer {shapes} classes", "take models of the same classes")
        if len(answers) == 1 and self.fusion == "logits":
            return answers[0]
        if self.fusion == "logits":
            return torch.stack(answers).mean(0)
        shares: Tensor = torch.stack([answer.log_softmax(1) for answer in answers]).logsumexp(0)
        return shares - math.log(len(answers))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)


@contextmanager
def member_answers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, in order, the answers of every member of the ensemble that `model` is or holds, in one call of it.

    The list fills while the model is called inside the context. InputError when there is no ensemble.
    """
    ensemble = next((module for module in model.modules() if isinstance(module, Ensemble)), None)
    if ensemble is None:
        raise InputError("model", "has no members", "use an ensemble, or leave out what asks for its members")
    answers: list[Tensor] = []
    with ExitStack() as stack:
        for member in ensemble:
            handle = member.register_forward_hook(lambda _module, _inputs, output: answers.append(output))
            stack.callback(handle.remove)
        yield answers


def price_of(model: nn.Module) -> int:
    """Return how many network evaluations one call of `model` costs: those of the ensemble it holds, else one."""
    return next((module.price for module in model.modules() if isinstance(module, Ensemble)), 1)


def members_of(model: nn.Module) -> list[nn.Module]:
    """Return the members of an ensemble, or the model itself as its only one."""
    return list(model) if isinstance(model, Ensemble) else [model]
