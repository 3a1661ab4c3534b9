"""Images bent by a flow: warping, its slopes, and which images a flow of bounded displacement can make.

A flow f (N x 2 x H x W, pixels: columns first, rows second) makes the image x'(p) = x(p + f(p)), read between the
pixels by bilinear interpolation, and at the nearest edge pixel outside the image. A radius is the largest
displacement along either axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError

ROUNDING = 1e-5
"""How far, in pixel values, an image may lie outside what flows reach: float32 rounding of the interpolation."""

_FINE = 4
_BISECTIONS = 12


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Return `x` (N x C x H x W) bent by `flow` (N x 2 x H x W, pixels); a zero flow returns `x` to the bit."""
    (a, b, c, d), across, down = _corners(x, flow)
    return torch.lerp(torch.lerp(a, b, across), torch.lerp(c, d, across), down)


def secants(x: Tensor, flow: Tensor, gradient: Tensor, width: float, radius: float) -> Tensor:
    """Return how fast sum(gradient * warp(x, flow)) grows along each displacement (N x 2 x H x W), over `width` pixels.

    Symmetric differences over `width` to both sides, cut at the displacements -radius and radius. A derivative would
    see one cell only: on a pixel, where every search begins, it has two values, and a better place behind a worse one
    stays unseen.
    """
    found = []
    for axis in (0, 1):
        ends = []
        for way in (-1.0, 1.0):
            moved = flow.clone()
            moved[:, axis] = (moved[:, axis] + way * width).clamp_(-radius, radius)
            ends.append(((gradient * warp(x, moved)).sum(1), moved[:, axis]))
        (low, near), (high, far) = ends
        found.append((high - low) / (far - near).clamp(min=1e-12))
    return torch.stack(found, dim=1)


def _corners(x: Tensor, flow: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the four pixels around every place the flow points to, and its position between them (N x 1 x H x W)."""
    check_images(x)
    height, width = x.shape[2:]
    column = torch.arange(width, dtype=x.dtype, device=x.device) + flow[:, 0]
    row = torch.arange(height, dtype=x.dtype, device=x.device).unsqueeze(1) + flow[:, 1]
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    left, top = column.floor(), row.floor()
    # Where the right or lower neighbour would lie outside, its weight is zero and the pixel stands for it.
    columns = (left.long(), (left + 1).clamp_(max=width - 1).long())
    rows = (top.long() * width, (top + 1).clamp_(max=height - 1).long() * width)
    flat = x.flatten(2)
    found = []
    for line in rows:
        for place in columns:
            index = (line + place).flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
            found.append(flat.gather(2, index).view_as(x))
    return found, (column - left).unsqueeze(1), (row - top).unsqueeze(1)


def reach(x: Tensor, radius: float | Tensor, whole: int) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value (N x C x H x W) that each pixel finds within `radius` pixels of itself.

    `radius`, a number or (N,), lies in [whole, whole + 1]. Exact: between pixels the image is bilinear, so over a
    square window it is extreme at the pixels inside and where the window's edges cross the lines of pixels.
    """
    rest = radius - whole
    share = rest.to(x).reshape(-1, 1, 1, 1) if isinstance(rest, Tensor) else torch.tensor(float(rest)).to(x)
    low, high = x, x
    for _ in range(whole):
        low, high = _widen(low, high)
    margin, (height, width) = whole + 1, (x.shape[2], x.shape[3])
    padded = F.pad(x, [margin] * 4, mode="replicate")

    def cut(image: Tensor, offset: int, axis: int) -> Tensor:
        return image.narrow(axis, margin + offset, height if axis == 2 else width)

    def between(image: Tensor, way: int, axis: int) -> Tensor:
        return torch.lerp(cut(image, way * whole, axis), cut(image, way * margin, axis), share)

    inside = range(-whole, whole + 1)
    for way in (-1, 1):
        side, end = between(padded, way, 3), between(padded, way, 2)
        ring = [cut(side, offset, 2) for offset in inside] + [between(side, other, 2) for other in (-1, 1)]
        ring += [cut(end, offset, 3) for offset in inside]
        for values in ring:
            low, high = torch.minimum(low, values), torch.maximum(high, values)
    return low, high


def _widen(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the extremes over windows that are a pixel wider on every side."""
    return -F.max_pool2d(-low, 3, 1, 1), F.max_pool2d(high, 3, 1, 1)


def reach_within(x: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value that each pixel finds within `radius` >= 0 pixels (infinite: anywhere)."""
    check_images(x)
    most = max(x.shape[2:]) - 1
    if radius >= most:
        return x.amin((2, 3), True).expand_as(x), x.amax((2, 3), True).expand_as(x)
    return reach(x, radius, int(radius))


def inside(x_adv: Tensor, x: Tensor, radius: float) -> Tensor:
    """Return (N,) booleans: every value of `x_adv` is found in `x` within `radius` pixels, up to rounding."""
    low, high = reach_within(x, radius)
    return _between(x_adv, low, high)


def _between(x_adv: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ((x_adv >= low - ROUNDING) & (x_adv <= high + ROUNDING)).flatten(1).all(1)


def displacement(x_adv: Tensor, x: Tensor) -> Tensor:
    """Return (N,) the least radius in pixels at which `x_adv` is inside; infinite where no displacement explains it.

    To about 1/4000 pixel up to four pixels, in whole pixels, rounded up, beyond.
    """
    check_images(x)
    most = max(1, max(x.shape[2:]) - 1)
    whole = torch.full((x.shape[0],), math.inf, device=x.device)
    low = high = x
    for radius in range(most + 1):
        if radius:
            low, high = _widen(low, high)
        passed = _between(x_adv, low, high)
        whole = torch.where(passed, whole.clamp(max=radius), whole)
        if bool(passed.all()):
            break
    found = whole.to(x.dtype)
    for radius in range(1, _FINE + 1):
        rows = (whole == radius).nonzero().squeeze(1)
        if rows.numel():
            found[rows] = _bisect(x_adv[rows], x[rows], radius)
    return found


def _bisect(x_adv: Tensor, x: Tensor, radius: int) -> Tensor:
    least = torch.full((x.shape[0],), radius - 1.0, dtype=x.dtype, device=x.device)
    most = least + 1.0
    for _ in range(_BISECTIONS):
        middle = (least + most) / 2
        passed = _between(x_adv, *reach(x, middle, radius - 1))
        least, most = torch.where(passed, least, middle), torch.where(passed, middle, most)
    return most


def check_images(x: Tensor) -> None:
    """Raise InputError unless `x` is a batch of images N x C x H x W."""
    if x.ndim != 4:
        raise InputError(
            "a flow threat", f"needs images N x C x H x W, got {tuple(x.shape)}", "use linf, l2, l1 or l0 here"
        )
