"""JSMA: move the two entries that the saliency map likes best, again and again, until the class changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from maodun.attacks.minimum.common import found, refuse_below
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.problem import Problem

_PAIRS_AT_ONCE = 2**22
"""Pairs looked at in one piece: 16 MiB of float32."""


@dataclass
class JSMAState(State):
    """`went` (N x ...) int8: the direction in which each entry has been moved, 0 while it has not been."""

    went: Tensor


@dataclass(frozen=True, kw_only=True)
class JSMA(Attack[JSMAState]):
    """Move the pair of entries with the largest saliency by `theta` until the class changes (Papernot et al., 2016).

    Inputs N x ..., values in [0, 1]; norm l0, which counts changed entries (each channel of a pixel is one); targeted
    or not. With a = the sum over a pair of the derivatives of the target's output and b = that of all other outputs
    together, the pair with a > 0 > b and the largest -ab is moved by `theta` (in [-1, 1], not 0; a negative one
    lowers); where no pair does both, the one with the largest a > 0 (the published search ends there). Entries at the
    wall of the box are left out. Without a target the label takes its place with the signs turned, as it is to fall
    (NT-JSMA, Wiyatno and Xu, 2018). `maximal` looks at every class and at both directions and takes the best pair of
    all (M-JSMA, ibid.); no entry ever turns back. `outputs` says what is differentiated: "logits" (JSMA-Z in Carlini
    and Wagner, 2017) or "probabilities" (JSMA-F), whose derivatives vanish where softmax is saturated. A sample ends
    when it is fooled, when no pair is left within the radius, or after `steps` pairs.

    The best pair is exact: of d entries only those that at most one other beats in both sums can be in it, and only
    their pairs are compared. Costs per step a forward and two backwards, on probabilities one; untargeted and
    `maximal`, a backward per class.
    """

    name: ClassVar[str] = "jsma"
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    kind: ClassVar[str] = "minimum"

    steps: int = 100
    theta: float = 1.0
    outputs: Literal["logits", "probabilities"] = "logits"
    maximal: bool = False

    def __post_init__(self) -> None:
        refuse_below(self.name, steps=(self.steps, 1))
        if not 0.0 < abs(self.theta) <= 1.0:
            raise InputError(
                f"option 'theta' of {self.name}", f"is {self.theta}", "give a step in [-1, 1] other than 0"
            )
        if self.outputs not in ("logits", "probabilities"):
            raise InputError(f"option 'outputs' of {self.name}", f"is '{self.outputs}'", "use logits or probabilities")

    @property
    def total_steps(self) -> int:
        """A pair of entries per step."""
        return self.steps

    def init(self, problem: Problem) -> JSMAState:
        """Start at the clean input."""
        none = torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device)
        return JSMAState(x=problem.x, done=none, went=torch.zeros_like(problem.x, dtype=torch.int8))

    def step(self, problem: Problem, state: JSMAState) -> JSMAState:
        """Look at the point and move the best pair of every row that is not fooled."""
        own, rest = self._derivatives(problem, state.x)
        pair, way, none = self._best(problem, state, own, rest)
        move = torch.zeros_like(state.x).flatten(1).scatter_(1, pair, way.to(state.x).unsqueeze(1).expand_as(pair))
        done = found(problem) | none
        move = move.masked_fill_(done.unsqueeze(1), 0.0).reshape(state.x.shape)
        x = torch.add(state.x, move, alpha=abs(self.theta)).clamp_(0.0, 1.0)
        went = torch.where(move == 0, state.went, move.sign().to(torch.int8))
        return replace(state, x=x, went=went, done=done)

    def _derivatives(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return N x K x d derivatives of each aim's output and of all others together, K aims a row.

        An aim is the class to reach or, without a target, the label, with both signs turned; with `maximal` and no
        target there is one for every class.
        """
        every = self.maximal and not problem.targeted
        aims = problem.y if problem.targets is None else problem.targets

        def heads(logits: Tensor, index: Tensor) -> Tensor:
            outputs = logits.softmax(1) if self.outputs == "probabilities" else logits
            if every:
                return outputs
            wanted = outputs.gather(1, aims[index].unsqueeze(1))
            # Probabilities sum to one, so the others' derivatives are minus the aim's.
            return wanted if self.outputs == "probabilities" else torch.cat([wanted, outputs.sum(1, keepdim=True)], 1)

        gradients = torch.stack(problem.values_and_gradients(x, heads)[2], 1).flatten(2)
        own = gradients if every else gradients[:, :1]
        if self.outputs == "probabilities":
            rest = -own
        else:
            rest = (gradients.sum(1, keepdim=True) if every else gradients[:, 1:]) - own
        if problem.targets is not None:
            return own, rest
        # The label is to fall where every other aim is to rise.
        sign = torch.ones(own.shape[:2], device=x.device)
        sign = sign.scatter_(1, problem.y.unsqueeze(1), -1.0) if every else -sign
        return own * sign.unsqueeze(2), rest * sign.unsqueeze(2)

    def _best(self, problem: Problem, state: JSMAState, own: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's pair (N x 2), its direction (N,) of -1 or 1, and whether there is no pair (N,)."""
        x, went = state.x.flatten(1).unsqueeze(1), state.went.flatten(1).unsqueeze(1)
        # A pair more than the radius allows may still be one of entries that have moved before.
        free = (went != 0) | ((went != 0).sum(2, keepdim=True) + 2 <= problem.threat.eps)
        ways = (1, -1) if self.maximal else (1 if self.theta > 0 else -1,)
        gains, drops = [], []
        for way in ways:
            can = free & (x < 1.0 if way > 0 else x > 0.0) & (went != -way)
            gains.append(torch.where(can, own * way, -torch.inf))
            drops.append(torch.where(can, rest * -way, -torch.inf))
        gain, drop = torch.cat(gains, 1), torch.cat(drops, 1)
        n, choices, size = gain.shape
        # Products of small derivatives underflow long before the derivatives do.
        largest = torch.maximum(own.abs(), rest.abs()).amax((1, 2)).clamp_(min=torch.finfo(own.dtype).tiny)
        gain, drop = gain / largest.reshape(-1, 1, 1), drop / largest.reshape(-1, 1, 1)
        pairs, scores = best_pairs(gain.reshape(-1, size), drop.reshape(-1, size))
        score, choice = scores.reshape(n, choices).max(1)
        rows = torch.arange(n, device=x.device)
        pair = pairs.reshape(n, choices, 2)[rows, choice]
        # Where no pair does both, the published search gives up; the aim alone still leads on.
        tops, alone = gain.topk(min(2, size), dim=2)
        most, best = tops.sum(2).max(1)
        none = score <= 0.0
        pair = torch.where(none.unsqueeze(1), alone[rows, best], pair)
        turn = torch.where(none, best, choice) // (choices // len(ways))
        return pair, torch.tensor(ways, device=x.device)[turn], none & ~(most > 0.0)


def best_pairs(gain: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row of two M x d tensors the pair (p, q) with the largest product of sums, and the product.

    The product is (gain_p + gain_q)(drop_p + drop_q) over pairs both of whose sums are positive; -inf marks entries
    that may not be chosen. A row without such a pair has the product 0 (and a pair that means nothing). Exact: an entry
    beaten in both by two others can give its place to one of them. d log d operations and the pairs of what is left.
    """
    rows, size = gain.shape
    if size < 2:
        return torch.zeros(rows, 2, dtype=torch.int64, device=gain.device), torch.zeros(rows, device=gain.device)
    gain, order = gain.sort(dim=1, descending=True, stable=True)
    drop = drop.gather(1, order)
    # The largest and the second largest drop among the entries before each: all these have at least its gain.
    first = _before(drop.cummax(1).values)
    second = _before(torch.minimum(drop, first).cummax(1).values)
    kept = (drop > second) & torch.isfinite(gain)
    width = max(2, int(kept.sum(1).max())) if rows else 2
    # The kept entries, in order, move to the front.
    front = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    valid = kept.gather(1, front)
    gain = gain.gather(1, front).masked_fill_(~valid, -torch.inf)
    drop = drop.gather(1, front).masked_fill_(~valid, -torch.inf)
    places, products = [], []
    left, right = torch.triu_indices(width, width, 1, device=gain.device)
    for part in torch.split(torch.arange(rows, device=gain.device), max(1, _PAIRS_AT_ONCE // left.numel())):
        up = gain[part][:, left] + gain[part][:, right]
        down = drop[part][:, left] + drop[part][:, right]
        product, place = torch.where((up > 0) & (down > 0), up * down, 0.0).max(1)
        places.append(place)
        products.append(product)
    place = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=gain.device)
    chosen = torch.stack([left[place], right[place]], 1)
    product = torch.cat(products) if products else torch.zeros(0, device=gain.device)
    return order.gather(1, front.gather(1, chosen)), product


def _before(values: Tensor) -> Tensor:
    """Return `values` one place to the right, -inf first."""
    return torch.nn.functional.pad(values[:, :-1], (1, 0), value=-torch.inf)
