"""Total-variation minimisation: the nearest image with little edge in it."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec


class TotalVariation(Defense):
    """Minimise 0.5 |u - x|^2 + weight * TV(u) over u, every channel by itself, in `steps` steps of Chambolle's method.

    TV is the isotropic one with forward differences; `weight` (default 0.1) is in [0, 1] units. The derivative is that
    of the steps themselves, one after the other; the BPDA partner is the identity. Same iteration as scikit-image's
    denoise_tv_chambolle. Source: Rudin, Osher and Fatemi, 1992; Chambolle, "An algorithm for total variation
    minimization and applications", 2004; as a defence Guo et al., ICLR 2018 (who also drop pixels at random; here
    nothing is dropped).
    """

    name = "total_variation"
    spec = DefenseSpec(inner_loop=True)

    def __init__(self, weight: float = 0.1, steps: int = 30) -> None:
        super().__init__()
        if weight <= 0:
            raise InputError(f"weight {weight}", "it must be positive", "use for example 0.1")
        if steps < 1:
            raise InputError(f"steps {steps}", "there must be at least one", "use for example 30")
        self.weight, self.steps = weight, steps

    def forward(self, x: Tensor) -> Tensor:
        """Return the smoothed images."""
        self.need_images(x)
        return self.minimise(x, self.steps).clamp(0.0, 1.0)

    def minimise(self, x: Tensor, steps: int) -> Tensor:
        """Return the minimiser's approximation after `steps` steps."""
        out, down, right = x, torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(steps):
            change_down, change_right = differences(out)
            # The square root has no derivative at zero; what is added is far below float32's rounding of an image.
            length = torch.sqrt(change_down**2 + change_right**2 + 1e-20)
            shrink = 1 + length * (0.25 / self.weight)
            down, right = (down - 0.25 * change_down) / shrink, (right - 0.25 * change_right) / shrink
            out = x - divergence(down, right)
        return out

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"weight={self.weight}, steps={self.steps}"


def differences(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the forward differences of N x C x H x W images down and to the right, zero at the last row and column."""
    down, right = torch.zeros_like(u), torch.zeros_like(u)
    down[..., :-1, :] = u[..., 1:, :] - u[..., :-1, :]
    right[..., :-1] = u[..., 1:] - u[..., :-1]
    return down, right


def divergence(down: Tensor, right: Tensor) -> Tensor:
    """Return p - (p shifted by one), summed over both directions: minus the adjoint of `differences` inside."""
    above, left = torch.zeros_like(down), torch.zeros_like(right)
    above[..., 1:, :] = down[..., :-1, :]
    left[..., 1:] = right[..., :-1]
    return down + right - above - left


def objective(u: Tensor, x: Tensor, weight: float) -> Tensor:
    """Return 0.5 |u - x|^2 + weight TV(u) of every image, (N,)."""
    down, right = differences(u)
    edges = torch.sqrt(down**2 + right**2).flatten(1).sum(1)
    return 0.5 * ((u - x) ** 2).flatten(1).sum(1) + weight * edges
