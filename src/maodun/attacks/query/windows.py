"""Where the square attack looks next: windows, signs and kernels of many queries drawn in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maodun.core.engine import State
from maodun.core.streams import Stream
from maodun.core.threat import Threat

# A plan is copied when samples leave, so it is kept small; it still spreads the price of drawing over many queries.
_MOST_AHEAD = 64
_MOST_CELLS = 2**18


@dataclass
class Windows(State):
    """The windows of the next `ahead` queries of every sample, of which `used` are spent.

    linf: `where` N x ahead x (C s s) are flat positions in the image and `value` their new pixels. l2 and l1: `where`
    and `second` N x ahead x (s s) are positions in a channel, `value` N x ahead x C x (s s) the signed kernels and
    `outside` 1 where the second window does not overlap the first.
    """

    where: Tensor
    value: Tensor
    second: Tensor | None
    outside: Tensor | None
    ahead: int
    used: int

    def now(self) -> tuple[Tensor, Tensor]:
        """Return positions and new pixels of the next query (linf)."""
        return self.where[:, self.used], self.value[:, self.used]

    def both(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return first and second window, kernels and the mask of the next query (l2, l1)."""
        if self.second is None or self.outside is None:
            raise TypeError("a linf plan has a single window per query")
        return self.where[:, self.used], self.second[:, self.used], self.value[:, self.used], self.outside[:, self.used]


def none(x: Tensor) -> Windows:
    """Return a plan without queries for the samples `x`."""
    empty = torch.zeros(x.shape[0], 0, device=x.device)
    return Windows(empty, empty > 0, empty, empty, None, None, 0, 0)


def block(x: Tensor, side: int, left: int) -> int:
    """Return how many queries to plan at once for images `x` and windows of `side`, at most `left`."""
    cells = max(1, x.shape[0] * x.shape[1] * side * side)
    return max(1, min(left, _MOST_AHEAD, _MOST_CELLS // cells))


def plan(x: Tensor, ids: Tensor, stream: Stream, query: int, ahead: int, side: int, threat: Threat) -> Windows:
    """Draw the windows of queries `query` to `query + ahead - 1`; each depends on (id, query) only."""
    n, channels, height, width = x.shape
    steps = torch.arange(query, query + ahead, device=x.device).repeat(n)
    lead = 2 if threat.norm == "linf" else 5
    words = stream.words(ids.repeat_interleave(ahead), lead + (channels + 31) // 32, steps).reshape(n, ahead, -1)
    signs = _signs(words[..., lead:], channels)
    top, left = (words[..., 0] * (height - side + 1)) >> 32, (words[..., 1] * (width - side + 1)) >> 32
    cell = torch.arange(side, device=x.device)
    offsets = (cell.unsqueeze(1) * width + cell).flatten()
    first = (top * width + left).unsqueeze(2) + offsets
    empty = torch.zeros(n, 0, device=x.device)
    if threat.norm == "linf":
        planes = torch.arange(channels, device=x.device).reshape(-1, 1) * (height * width)
        where = (first.unsqueeze(2) + planes).flatten(2)
        pixels = x.flatten(1).gather(1, where.flatten(1)).reshape(n, ahead, channels, -1)
        # From any point of the ball +-2 eps ends on its surface, so the new pixels do not depend on the best point.
        value = (pixels + threat.eps * signs.unsqueeze(3)).clamp_(0.0, 1.0).flatten(2)
        return Windows(empty, empty > 0, where, value, None, None, ahead, 0)
    top2, left2 = (words[..., 2] * (height - side + 1)) >> 32, (words[..., 3] * (width - side + 1)) >> 32
    second = (top2 * width + left2).unsqueeze(2) + offsets
    down = (top2 - top).unsqueeze(2) + cell
    across = (left2 - left).unsqueeze(2) + cell
    inside = ((down >= 0) & (down < side)).unsqueeze(3) & ((across >= 0) & (across < side)).unsqueeze(2)
    shapes = kernels(side, threat.norm).to(x)
    value = shapes[words[..., 4] & 1].unsqueeze(2) * signs.unsqueeze(3)
    return Windows(empty, empty > 0, first, value, second, (~inside).flatten(2).to(x), ahead, 0)


def stripes(x: Tensor, ids: Tensor, stream: Stream) -> Tensor:
    """Return N x C x 1 x W random signs: vertical stripes."""
    return stream.signs(ids, (x.shape[1], 1, x.shape[3])).to(x)


def tiling(x: Tensor, ids: Tensor, stream: Stream, norm: str) -> Tensor:
    """Return a perturbation N x C x H x W of side-by-side signed kernels, about five to a side."""
    n, channels, height, width = x.shape
    side = max(1, min(height, width) // 5)
    down, across = height // side, width // side
    signs = stream.signs(ids, (channels, down, across)).to(x)
    turned = stream.child("turn").integers(ids, (1, down, across), 2)
    tiles = kernels(side, norm).to(x)[turned].reshape(n, 1, down, across, side, side)
    tiles = tiles * signs.reshape(n, channels, down, across, 1, 1)
    delta = torch.zeros_like(x)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta[:, :, top : top + down * side, left : left + across * side] = tiles.permute(0, 1, 2, 4, 3, 5).reshape(
        n, channels, down * side, across * side
    )
    return delta


def kernels(side: int, norm: str) -> Tensor:
    """Return the 2 x (side side) kernels of length one in `norm`: a hill above a hollow, upright and turned."""
    power = 2.0 if norm == "l2" else 1.0
    upper = side // 2
    hill = torch.cat([_pyramid(upper, side, norm), -_pyramid(side - upper, side, norm)])
    hill = hill / torch.linalg.vector_norm(hill, power)
    return torch.stack([hill.flatten(), hill.T.flatten()])


def _pyramid(height: int, width: int, norm: str) -> Tensor:
    """Stacked rectangles around the middle, the k-th adding 1 / k**2 (l2) or 1 / k**4 (l1), scaled to length one."""
    if height == 0:
        return torch.zeros(0, width)
    power = 2.0 if norm == "l2" else 1.0
    layers = max(height // 2, width // 2) + 1
    steps = 1.0 / torch.arange(1, layers + 1, dtype=torch.float32) ** (2.0 * 2.0 / power)
    tail: Tensor = steps.flip(0).cumsum(0).flip(0)
    distance = torch.maximum(
        (torch.arange(height) - height // 2).abs().unsqueeze(1), (torch.arange(width) - width // 2).abs().unsqueeze(0)
    )
    hill = tail[distance]
    length: Tensor = torch.linalg.vector_norm(hill, power)
    return hill / length


def _signs(words: Tensor, channels: int) -> Tensor:
    """Return ... x C signs from the bits of ... x ceil(C / 32) words."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
    return (bits.flatten(-2)[..., :channels] * 2 - 1).to(torch.float32)
