"""The nearest point of a hyperplane inside the box, for several points per hyperplane at once."""

from __future__ import annotations

import torch
from torch import Tensor


def reach(points: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    """Return the shortest moves that bring `points` onto their hyperplanes within the box [0, 1].

    `points` (P, N, D) share the normals `normal` (N, D); `gap` (P, N) is normal . point - offset, so the moves m
    (P, N, D) satisfy normal . m = -gap with the least `norm` (linf, l2, l1) among those that stay in the box. Where
    the box does not reach the hyperplane every entry goes to its nearest wall. Entries with a zero normal stay.

    In linf and l2 entry i moves by min(t * v_i, room_i), v = 1 or |normal|; the sum that t must meet is concave
    and piecewise linear in t, so Newton's method from the left ends at the exact root after a few passes and no sort
    is needed. In l1 the entries of largest |normal| move as far as they can, one after another.
    """
    weight = normal.abs()
    way = normal.sign() * torch.where(gap >= 0, -1.0, 1.0).unsqueeze(-1)
    room = torch.where(way > 0, 1.0 - points, points)
    need = gap.abs()
    if norm == "l1":
        return way * _greedy(room, weight, need)
    speed = (weight > 0).to(weight.dtype) if norm == "linf" else weight
    return way * _together(room, weight, speed, need)


def _together(room: Tensor, weight: Tensor, speed: Tensor, need: Tensor) -> Tensor:
    """Return min(t * speed, room) with weight . min(t * speed, room) = need, or the room where it does not suffice."""
    gain, stock = weight * speed, weight * room
    tiny, most = torch.finfo(need.dtype).tiny, torch.finfo(need.dtype).max
    time = (need / gain.sum(-1).clamp(min=tiny)).clamp_(max=most)
    pace = torch.minimum(time.unsqueeze(-1) * speed, room)
    stopped = torch.zeros_like(need)
    while True:
        halted = (pace >= room).to(weight.dtype)
        count = halted.sum(-1)
        if bool((count <= stopped).all()):
            return pace
        stopped = count
        left = need - (halted * stock).sum(-1)
        # Summed afresh: a difference of sums would leave a crumb of rounding where every entry has halted.
        free = ((1.0 - halted) * gain).sum(-1)
        time = torch.maximum(time, left / free.clamp(min=tiny)).clamp_(max=most)
        pace = torch.minimum(time.unsqueeze(-1) * speed, room)


def _greedy(room: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """Return moves that use up the room of the heaviest entries first until weight . moves = need."""
    heaviest = weight.argsort(dim=-1, descending=True)
    order = heaviest.expand_as(room)
    sorted_weight = weight.gather(-1, heaviest)
    sorted_room = room.gather(-1, order) * (sorted_weight > 0)
    gained = (sorted_weight * sorted_room).cumsum(-1)
    before = gained - sorted_weight * sorted_room
    left = (need.unsqueeze(-1) - before).clamp_(min=0.0)
    share = left / sorted_weight.clamp(min=torch.finfo(need.dtype).tiny)
    return torch.zeros_like(room).scatter_(-1, order, torch.minimum(share, sorted_room))
