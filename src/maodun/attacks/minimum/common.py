"""What the minimum-norm attacks share: dual lengths, schedules, and when a row has nothing more to gain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.problem import Problem
from maodun.core.status import Status


def dual_length(gradient: Tensor, norm: str) -> Tensor:
    """Return the (N,) lengths of N x ... gradients in the norm dual to `norm`.

    A linear function with gradient w changes by at most radius * length over a ball of that radius.
    """
    flat = gradient.flatten(1)
    if norm == "linf":
        return flat.abs().sum(1)
    if norm == "l2":
        length: Tensor = torch.linalg.vector_norm(flat, dim=1)
        return length
    return flat.abs().amax(1)


def corner_distance(x: Tensor, norm: str) -> Tensor:
    """Return the (N,) distances from `x` to the farthest corner of the box [0, 1]: no perturbation is larger."""
    reach = torch.maximum(x, 1.0 - x).flatten(1)
    if norm == "linf":
        return reach.amax(1)
    if norm == "l2":
        length: Tensor = torch.linalg.vector_norm(reach, dim=1)
        return length
    return reach.sum(1) if norm == "l1" else (reach > 0).sum(1).to(x.dtype)


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """Return the value at `step` of `steps` on half a cosine from `first` down to `last`."""
    return last + (first - last) * (1.0 + math.cos(math.pi * step / steps)) / 2.0


def found(problem: Problem) -> Tensor:
    """Return (N,) booleans: the run has an adversarial candidate for the row."""
    return problem.ledger.status[problem.rows] == int(Status.found)


def succeeded(problem: Problem, x: Tensor, logits: Tensor) -> Tensor:
    """Return (N,) booleans: the points `x` (N x ...), just looked at with `logits`, fool the model.

    With a stochastic model a point nearer than every confirmed candidate was luck: fresh draws have refused it.
    """
    fooled = problem.is_adversarial(logits)
    if problem.session.stochastic:
        fooled &= problem.ledger.distance[problem.rows] <= problem.threat.distance(x, problem.x) * (1.0 + 1e-6)
    return fooled


def stuck(problem: Problem) -> Tensor:
    """Return (N,) booleans: no gradient asked for the row so far had a single entry that is not zero."""
    return problem.ledger.flat[problem.rows]


def refuse_below(attack: str, **least: tuple[float, float]) -> None:
    """Raise InputError when an option, given as (value, least value), is smaller than it may be."""
    for option, (value, floor) in least.items():
        if not value >= floor:
            raise InputError(f"option '{option}' of {attack}", f"is {value}", f"give at least {floor}")
