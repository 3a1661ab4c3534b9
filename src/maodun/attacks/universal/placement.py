"""Where and how a patch stands on an image: location, scale, rotation and lighting, drawn per image or held fixed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.streams import Stream

FORMS = ("square", "circle")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The transformations over which a patch is meant to work (EOT, Athalye et al., ICML 2018).

    A patch of `side` x `side` pixels (a "circle" `form` cuts its corners) is turned by an angle in +- `rotation`
    degrees, scaled by a factor in `scale`, put where it fits wholly into the image, at the place `at` (row, column;
    shares of the free room, (0, 0) top left) or anywhere, in whole pixels, and lit: its values times 1 +- `lighting`
    plus +- `lighting`, clipped. All are uniform. Errors: InputError for a negative or empty range.
    """

    side: int
    form: str = "square"
    scale: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    lighting: float = 0.0
    at: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        low, high = self.scale
        place = (0.0, 0.0) if self.at is None else self.at
        for wrong, thing, reason, remedy in (
            (self.side < 1, f"side {self.side}", "is no patch", "give at least one pixel"),
            (self.form not in FORMS, f"form '{self.form}'", "is not known", "use square or circle"),
            (not 0 < low <= high, f"scale {self.scale}", "is no range of factors", "give 0 < low <= high"),
            (not 0 <= self.rotation <= 180, f"rotation {self.rotation:g}", "is no angle", "give 0 to 180 degrees"),
            (not 0 <= self.lighting <= 1, f"lighting {self.lighting:g}", "is no share", "give 0 to 1"),
            (not all(0 <= share <= 1 for share in place), f"at {self.at}", "is no place", "give shares from 0 to 1"),
        ):
            if wrong:
                raise InputError(thing, reason, remedy)

    @property
    def still(self) -> bool:
        """Whether the patch keeps its size and angle."""
        return self.scale == (1.0, 1.0) and self.rotation == 0.0

    @property
    def width(self) -> float:
        """The width of the widest box that the patch, scaled and turned, can fill, in pixels."""
        turn = 1.0
        if self.form == "square":
            angle = math.radians(min(self.rotation, 45.0))
            turn = math.cos(angle) + math.sin(angle)
        return self.side * self.scale[1] * turn

    @property
    def pixels(self) -> int:
        """The most pixels of an image that the patch can cover.

        Exact for a square that is neither scaled nor turned; otherwise Nosarzewska's bound (1948) on the grid points
        in a convex figure: area + half the circumference + 1.
        """
        if self.still and self.form == "square":
            return self.side**2
        size = self.side * self.scale[1]
        area, half = (size**2, 2 * size) if self.form == "square" else (math.pi * size**2 / 4, math.pi * size / 2)
        return min(int(area + half + 1), math.ceil(self.width + 1) ** 2)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images (C x H x W) into which the patch, at its largest, does not fit."""
        if len(shape) != 3:
            raise InputError(
                "a patch", f"needs images C x H x W, got {shape}", "use an attack without spatial structure"
            )
        if self.width > min(shape[1:]) + 1e-9:
            raise InputError(
                f"a patch of side {self.side}",
                f"fills up to {self.width:.3g} pixels and is larger than the image of {shape[1]} x {shape[2]}",
                "give a smaller side, scale or rotation",
            )

    def put(self, patch: Tensor, x: Tensor, stream: Stream, ids: Tensor, number: Tensor | int = 0) -> Tensor:
        """Return `x` (N x C x H x W) with `patch` (C x side x side) on it, differentiable in the patch.

        Drawn by `stream` from the sample ids (N,) and the draw's number, (N,) or one for all. Pixels are covered wholly
        or not at all. Without scale, rotation and lighting the patch arrives to the bit.
        """
        draw = stream.uniform(ids, (6,), number).to(x)
        size = self.side * (self.scale[0] + (self.scale[1] - self.scale[0]) * draw[:, 0])
        angle = torch.deg2rad(self.rotation * (2.0 * draw[:, 1] - 1.0))
        corner, width = self._corner(x, size, angle, draw[:, 2:4])
        shown = patch
        if self.lighting:
            gain, glare = (self.lighting * (2.0 * draw[:, k].reshape(-1, 1, 1, 1) - 1.0) for k in (4, 5))
            shown = (patch * (1.0 + gain) + glare).clamp(0.0, 1.0)
        shown = shown.expand(x.shape[0], -1, -1, -1)
        across, down = self._inner(x, corner + (width / 2).unsqueeze(1), size, angle)
        covered = (across.abs() <= 1.0) & (down.abs() <= 1.0)
        if self.form == "circle":
            covered = across.square() + down.square() <= 1.0
        covered = covered.unsqueeze(1)
        if self.still:
            # Whole pixels on whole pixels: nothing is read between them.
            half, grid = self.side / 2, (self.side - 1)
            column = (across * half + half - 0.5).round().clamp(0, grid).long()
            row = (down * half + half - 0.5).round().clamp(0, grid).long()
            place = (row * self.side + column).flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
            seen = shown.flatten(2).gather(2, place).reshape(x.shape)
        else:
            seen = F.grid_sample(
                shown, torch.stack([across, down], dim=3), mode="bilinear", padding_mode="border", align_corners=False
            )
        return torch.where(covered, seen, x)

    def _corner(self, x: Tensor, size: Tensor, angle: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the upper left corner (N x 2: row, column) of the patch's bounding box and the box's width (N,)."""
        width = size if self.form == "circle" else size * (angle.cos().abs() + angle.sin().abs())
        room = torch.tensor(x.shape[2:], device=x.device) - width.unsqueeze(1)
        if self.at is not None:
            draw = torch.tensor(self.at, device=x.device, dtype=x.dtype).expand_as(draw)
        # A draw below 1 falls into one of the whole steps 0 .. room.
        steps = room.clamp(min=0.0).floor()
        corner = (draw * (steps + 1.0)).floor() if self.at is None else (draw * steps).round()
        return torch.minimum(corner, steps), width

    @staticmethod
    def _inner(x: Tensor, centre: Tensor, size: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Return every pixel's place in the patch (N x H x W, across and down), -1 to 1 from edge to edge."""
        rows = torch.arange(x.shape[2], device=x.device, dtype=x.dtype).reshape(1, -1, 1) + 0.5
        columns = torch.arange(x.shape[3], device=x.device, dtype=x.dtype).reshape(1, 1, -1) + 0.5
        down, across = rows - centre[:, 0].reshape(-1, 1, 1), columns - centre[:, 1].reshape(-1, 1, 1)
        cos, sin, half = angle.cos().reshape(-1, 1, 1), angle.sin().reshape(-1, 1, 1), size.reshape(-1, 1, 1) / 2
        return (across * cos + down * sin) / half, (down * cos - across * sin) / half
