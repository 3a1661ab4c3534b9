"""Which sample, in which draw, is passing through the model right now.

A stochastic module must draw noise that depends only on (seed, sample id, purpose, draw). The Oracle and the verdict
open a context around every call; modules ask it for noise by `noise(x, purpose)`. No module signature changes, so
stochastic modules nest freely inside ordinary ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.streams import Stream


@dataclass(frozen=True)
class Draw:
    """One evaluation of a model: the stream it may use, the ids of its rows (N,) and each row's draw number (N,)."""

    stream: Stream
    ids: Tensor
    number: Tensor


_current: ContextVar[Draw | None] = ContextVar("maodun_draw", default=None)


@contextmanager
def draw(stream: Stream, ids: Tensor, number: Tensor) -> Iterator[None]:
    """Let the stochastic modules called inside draw from `stream` for rows `ids` (N,) in draws `number` (N,)."""
    token = _current.set(Draw(stream, ids, number))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Draw | None:
    """Return the evaluation that is under way, None outside of any."""
    return _current.get()


@contextmanager
def part(name: str) -> Iterator[None]:
    """Give the modules called inside their own randomness: the current draw's, under the sub-purpose `name`.

    For one answer that takes several passes through the same stochastic module. Outside of any draw it changes nothing.
    """
    source = _current.get()
    if source is None:
        yield
        return
    with draw(source.stream.child(name), source.ids, source.number):
        yield


@contextmanager
def ensured(x: Tensor) -> Iterator[None]:
    """Give the modules called inside a draw: the current one, or outside of any a new one for the rows of `x`.

    The new draw's seed comes from torch's default generator. For modules that must be able to draw the same noise
    again, which torch's generators do not offer.
    """
    if _current.get() is not None:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    ids = torch.arange(x.shape[0], device=x.device)
    with draw(Stream(seed, "alone"), ids, torch.zeros_like(ids)):
        yield


@dataclass(frozen=True)
class Noise:
    """Random numbers for the rows of one input; `shape` arguments are per row and default to the input's own."""

    x: Tensor
    purpose: str
    source: Draw | None

    def uniform(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return N x shape draws in [0, 1)."""
        shape = tuple(self.x.shape[1:]) if shape is None else shape
        if self.source is None:
            return torch.rand((self.x.shape[0], *shape), device=self.x.device, dtype=self.x.dtype)
        drawn = self.source.stream.child(self.purpose).uniform(self.source.ids, shape, self.source.number)
        return drawn.to(self.x.device, self.x.dtype)

    def normal(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return N x shape standard normal draws."""
        shape = tuple(self.x.shape[1:]) if shape is None else shape
        if self.source is None:
            return torch.randn((self.x.shape[0], *shape), device=self.x.device, dtype=self.x.dtype)
        drawn = self.source.stream.child(self.purpose).normal(self.source.ids, shape, self.source.number)
        return drawn.to(self.x.device, self.x.dtype)

    def integers(self, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return N x shape int64 draws in [0, high)."""
        if self.source is None:
            return torch.randint(high, (self.x.shape[0], *shape), device=self.x.device)
        drawn = self.source.stream.child(self.purpose).integers(self.source.ids, shape, high, self.source.number)
        return drawn.to(self.x.device)


def noise(x: Tensor, purpose: str) -> Noise:
    """Return the noise source of the rows of `x` (N x ...) for `purpose`.

    Inside an Oracle or verdict call the draws are keyed by (seed, sample id, purpose, draw); outside any call they come
    from torch's default generator, as in an ordinary module. Rows must be those of the call, in its order;
    an InputError says so otherwise.
    """
    source = _current.get()
    if source is not None and source.ids.shape[0] != x.shape[0]:
        raise InputError(
            f"noise '{purpose}'",
            f"asked for {x.shape[0]} rows while {source.ids.shape[0]} samples pass through the model",
            "draw the noise before rows are repeated or dropped, so that it stays keyed to its sample",
        )
    return Noise(x, purpose, source)
