"""What the attacks that see labels only share: asking for some rows, finding a start, walking back to the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core import geometry
from maodun.core.geometry import per_sample
from maodun.core.problem import Problem
from maodun.core.streams import Stream

Draw = Callable[[Tensor, int, int], Tensor]
"""Directions B x size x D, not scaled, of samples with ids (B,): draw(ids, size, number)."""

# Directions are drawn in groups of this size whatever the batch, so that sums over them do not depend on it.
GROUP = 16
# Probes of one call; more samples than fit wait for the next.
_MOST_CELLS = 2**22


@dataclass
class Asking:
    """Questions about some rows of a problem at a time; `broke` (N,) marks those that cannot pay for another.

    A row that is broke, or whose run has ended because its candidate is near enough, is not asked: it answers no.
    """

    problem: Problem
    broke: Tensor

    @staticmethod
    def of(problem: Problem) -> Asking:
        """Return the questions of one step."""
        return Asking(problem, torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device))

    def able(self, among: Tensor, queries: int = 1, spare: int = 0) -> Tensor:
        """Return (N,) booleans: the rows of `among` that can be asked `queries` times and keep `spare` queries."""
        among = among & ~self.problem.ledger.finished[self.problem.rows]
        affords = self.problem.affords(queries + spare)
        return among if affords is None else among & affords

    def fooled(self, x: Tensor, among: Tensor) -> Tensor:
        """Return (N,) booleans: the rows of `among` whose points `x` (N x ...) fool the model; one query each."""
        able = self.able(among)
        self.broke |= among & ~able
        index = able.nonzero().squeeze(1)
        if index.numel() == 0:
            return torch.zeros_like(among)
        if index.numel() == among.shape[0]:
            return self.problem.is_reached(self.problem.decisions(x))
        some = self.problem.select(index)
        return torch.zeros_like(among).index_put((index,), some.is_reached(some.decisions(x[index])))

    def leave(self) -> Tensor:
        """Return `broke` and have the run note whose budget is spent."""
        self.problem.ledger.retire(self.problem.rows[self.broke & ~self.problem.ledger.finished[self.problem.rows]])
        return self.broke


def find_start(asking: Asking, starts: str, tries: int, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return points N x ... far from the samples and (N,) booleans: the point fools the model.

    `starts` "noise" draws noise of several grains, keyed by the sample's id, at most `tries` per sample. "batch" looks
    first at the nearest other sample of the batch whose label is another (or the target): one query, but the
    result then depends on who else is in the batch.
    """
    problem = asking.problem
    point = problem.x.clone()
    have = torch.zeros(len(problem), dtype=torch.bool, device=point.device)
    if starts == "batch":
        point, some = _other(problem)
        have = asking.fooled(point, some)
    for k in range(tries):
        if bool((have | asking.broke).all()):
            break
        noise = _noise(problem.x, problem.ids, stream, k)
        hit = asking.fooled(noise, ~have & ~asking.broke)
        point = torch.where(per_sample(hit, point).bool(), noise, point)
        have |= hit
    return point, have


def _other(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return each sample's nearest other sample with a label that would do, and whether there is one."""
    flat, y = problem.x.flatten(1), problem.y
    wanted = y.unsqueeze(1) != y if problem.targets is None else problem.targets.unsqueeze(1) == y
    order = {"linf": math.inf, "l2": 2.0, "l1": 1.0}.get(problem.threat.norm, 2.0)
    apart = torch.cdist(flat, flat, p=order).masked_fill_(~wanted, math.inf)
    return problem.x[apart.argmin(1)], wanted.any(1)


def _noise(x: Tensor, ids: Tensor, stream: Stream, k: int) -> Tensor:
    """Return the k-th noise image of every sample: fine, coarse, coarser, a single colour, and over again."""
    grain = (0, 4, 2, 1)[k % 4] if x.ndim == 4 else 0
    if grain == 0:
        return stream.uniform(ids, tuple(x.shape[1:]), k).to(x)
    cells = stream.uniform(ids, (x.shape[1], grain, grain), k).to(x)
    return F.interpolate(cells, size=x.shape[2:], mode="nearest")


def between(x: Tensor, far: Tensor, share: Tensor, norm: str) -> Tensor:
    """Return the point at `share` (N,) of the way from `x` to `far`: on the line, or in linf on the shrinking cube.

    In linf `share` is a radius in input units.
    """
    if norm == "linf":
        return geometry.project_linf(far, x, share)
    return torch.lerp(x, far, per_sample(share, x))


def walk_back(asking: Asking, far: Tensor, among: Tensor, width: float) -> Tensor:
    """Return points nearer to the clean samples that still fool the model, by halving towards them.

    `far` N x ... fool the model in the rows `among`; `width` is the final interval as a share of the first distance.
    Other rows come back as they are.
    """
    problem = asking.problem
    norm = problem.threat.norm
    high = problem.threat.distance(far, problem.x) if norm == "linf" else torch.ones_like(problem.rows, dtype=far.dtype)
    low, width_of = torch.zeros_like(high), width * high
    open_ = among & (high > 0)
    while bool(open_.any()):
        middle = (low + high) / 2.0
        hit = asking.fooled(between(problem.x, far, middle, norm), open_)
        high = torch.where(hit, middle, high)
        low = torch.where(open_ & ~hit, middle, low)
        open_ = open_ & (high - low > width_of) & ~asking.broke
    return torch.where(per_sample(among, far).bool(), between(problem.x, far, high, norm), far)


def normal_at(
    asking: Asking, x: Tensor, radius: Tensor, draws: int, among: Tensor, draw: Draw, number: int, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the boundary's estimated normal N x ... at `x`, pointing to what fools the model, and (N,) draws made.

    Labels at `draws` random points `radius` (N,) away (l2), less their mean (Chen et al., 2020, equations 12 and 16).
    Costs a query per draw; `draw` is where directions come from and `number` keys them. Rows that cannot pay for a
    group of draws and `spare` queries stop drawing.
    """
    problem = asking.problem
    made = torch.zeros(len(problem), dtype=torch.int64, device=x.device)
    votes = torch.zeros_like(radius)
    with_votes, plain = torch.zeros_like(x).flatten(1), torch.zeros_like(x).flatten(1)
    block = max(1, _MOST_CELLS // (GROUP * plain.shape[1]))
    for group in range(math.ceil(draws / GROUP)):
        size = min(GROUP, draws - group * GROUP)
        able = asking.able(among, size, spare).nonzero().squeeze(1)
        if able.numel() == 0:
            break
        for part in torch.split(able, block):
            signs, u = _vote(problem.select(part), x[part], radius[part], size, draw, number * 4096 + group)
            sums = torch.bmm(torch.stack([signs, torch.ones_like(signs)], 1), u)
            with_votes[part] += sums[:, 0]
            plain[part] += sums[:, 1]
            votes[part] += signs.sum(1)
            made[part] += size
    mean = votes / made.clamp(min=1)
    # Where all draws agree their mean direction is all there is to go by.
    agree = mean.abs() == 1.0
    normal = with_votes - torch.where(agree, torch.zeros_like(mean), mean).unsqueeze(1) * plain
    return geometry.unit_l2(normal).reshape(x.shape), made


def anywhere(stream: Stream, entries: int) -> Draw:
    """Return a source of directions over all entries."""
    return lambda ids, size, number: stream.coarse_normal(ids, (size, entries), number)


def _vote(problem: Problem, x: Tensor, radius: Tensor, size: int, draw: Draw, number: int) -> tuple[Tensor, Tensor]:
    """Return the answers B x size (1 fools, -1 not) around `x`, and the directions B x size x D that were asked."""
    entries = x[0].numel()
    u = draw(problem.ids, size, number).to(x)
    u *= (radius.unsqueeze(1) / torch.linalg.vector_norm(u, dim=2).clamp(min=geometry.TINY)).unsqueeze(2)
    center = x.reshape(-1, 1, entries)
    points = (center + u).clamp_(0.0, 1.0)
    wide = problem.repeat(size)
    hit = wide.is_reached(wide.decisions(points.reshape(-1, *x.shape[1:])))
    torch.sub(points, center, out=u)
    u *= (1.0 / radius.clamp(min=geometry.TINY)).reshape(-1, 1, 1)
    return (hit.to(x.dtype) * 2.0 - 1.0).reshape(-1, size), u
