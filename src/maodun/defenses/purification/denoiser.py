"""What knows the data: a network that predicts the noise, whatever form it was trained in."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.defenses.purification.levels import Levels

Form = Literal["eps", "x0", "score", "velocity"]
FORMS: tuple[str, ...] = get_args(Form)


class Denoiser(nn.Module):
    """Predicts the noise n in u = scale u_0 + sigma n: `forward(u, t, levels)` with u N x C x H x W, t an index >= 0.

    The prediction of the noise is the canonical form; networks that predict the clean image, the score or the velocity
    are wrapped by `Converted`, EDM networks by their own class. `shape` (C, H, W) is the only input it takes, None for
    any. Deterministic, in evaluation mode and with frozen parameters while it purifies.
    """

    shape: tuple[int, int, int] | None = None

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        """Return the predicted noise, shaped like `u`."""
        raise NotImplementedError("a subclass predicts the noise")

    def freeze(self) -> Denoiser:
        """Put it in evaluation mode with parameters that collect no gradient, and return it."""
        self.eval().requires_grad_(False)
        return self

    def need_range(self, levels: Levels, t: int) -> None:
        """Raise InputError when index `t` holds more noise than the network knows; by default it knows all."""

    def need_shape(self, x: Tensor) -> None:
        """Raise InputError unless `x` is N x C x H x W of the size the network was built for."""
        found = tuple(x.shape[1:])
        if len(found) != 3 or (self.shape is not None and found != self.shape):
            wanted = "N x C x H x W" if self.shape is None else f"N x {' x '.join(map(str, self.shape))}"
            reason = f"takes images {wanted}, not N x {' x '.join(map(str, found))}"
            raise InputError("score network", reason, "use one trained on data of this size and channel count")


def to_eps(form: str, output: Tensor, u: Tensor, scale: float, sigma: float) -> Tensor:
    """Return the noise that an `output` in `form` implies at u = scale u_0 + sigma n.

    x0: (u - scale x0) / sigma; score: -sigma score; velocity v = scale n - sigma u_0 (Salimans and Ho, 2022):
    (scale v + sigma u) / (scale^2 + sigma^2). InputError for an unknown form.
    """
    if form == "eps":
        return output
    if form == "x0":
        return (u - scale * output) / sigma
    if form == "score":
        return -sigma * output
    if form == "velocity":
        return (scale * output + sigma * u) / (scale**2 + sigma**2)
    raise InputError(f"parametrisation '{form}'", "there is none of that name", "known: " + ", ".join(FORMS))


def from_eps(form: str, eps: Tensor, u: Tensor, scale: float, sigma: float) -> Tensor:
    """Return the predicted noise `eps` in another form; the inverse of `to_eps`, with the same errors."""
    if form == "eps":
        return eps
    if form == "x0":
        return (u - sigma * eps) / scale
    if form == "score":
        return -eps / sigma
    if form == "velocity":
        return ((scale**2 + sigma**2) * eps - sigma * u) / scale
    raise InputError(f"parametrisation '{form}'", "there is none of that name", "known: " + ", ".join(FORMS))


def clean_estimate(denoiser: Denoiser, levels: Levels, u: Tensor, t: int) -> Tensor:
    """Return Tweedie's estimate of the clean image at index `t`, (u - sigma eps) / scale, shaped like `u`."""
    scale, sigma = levels.at(t)
    eps: Tensor = denoiser(u, t, levels)
    return (u - sigma * eps) / scale


class Converted(Denoiser):
    """A denoiser made of one that answers in another form: x0, score or velocity (`form`), with the same call."""

    def __init__(self, inner: Denoiser, form: str) -> None:
        super().__init__()
        to_eps(form, torch.zeros(1), torch.zeros(1), 1.0, 1.0)
        self.inner, self.form, self.shape = inner, form, inner.shape

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        """Return the noise that the inner answer implies."""
        return to_eps(self.form, self.inner(u, t, levels), u, *levels.at(t))
