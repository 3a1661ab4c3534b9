"""Counter-based random numbers: every draw is a pure function of (seed, purpose, sample id, step).

A sample therefore meets the same noise whatever batch, order, shard or worker it is processed in.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
vectorised over tensors; 32-bit words live in int64 because torch's unsigned arithmetic is incomplete.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Apply the ten rounds of Philox4x32 to four int64 tensors holding 32-bit words.

    The words broadcast against each other; returns four tensors of 32-bit words. Salmon et al. (2011).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps modulo 2**64, so its low and high words are those of the unsigned product.
        p0, p1 = c0 * _MUL0, c2 * _MUL1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL0) & _MASK, (k1 + _WEYL1) & _MASK
    return c0, c1, c2, c3


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """The normal's quantiles at the middles of 256 equal shares, scaled to variance one."""
    middles = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    values: Tensor = torch.special.ndtri(middles)
    scaled: Tensor = values / values.square().mean().sqrt()
    return scaled.to(device, torch.float32)


@dataclass(frozen=True)
class Stream:
    """A named family of random numbers under one run seed.

    `seed` is any integer, `purpose` any text ("pgd/start/0", "verdict"); two streams that differ in either are
    independent. `ids` are int64 sample ids (N,), `shape` is the shape of one sample's draw, and the results are
    N x shape. `step` separates successive draws of one purpose: one number for all rows or an int64 tensor (N,).
    """

    seed: int
    purpose: str

    @property
    def key(self) -> tuple[int, int]:
        """The two 32-bit key words derived from seed and purpose by BLAKE2b."""
        digest = hashlib.blake2b(f"{self.seed}\x1f{self.purpose}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def child(self, name: str | int) -> Stream:
        """Return the stream of a sub-purpose, independent of this one."""
        return Stream(self.seed, f"{self.purpose}/{name}")

    def words(self, ids: Tensor, count: int, step: int | Tensor = 0) -> Tensor:
        """Return N x count uniform 32-bit words as int64."""
        ids = ids.to(torch.int64).reshape(-1, 1)
        blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=ids.device).reshape(1, -1)
        low, high = ids & _MASK, (ids >> 32) & _MASK
        word = step.to(low).reshape(-1, 1) & _MASK if isinstance(step, Tensor) else torch.full_like(low, step & _MASK)
        out = torch.stack(philox4x32((blocks, word, low, high), self.key), dim=-1)
        return out.reshape(ids.shape[0], -1)[:, :count]

    def uniform(self, ids: Tensor, shape: tuple[int, ...], step: int | Tensor = 0) -> Tensor:
        """Return float32 draws in [0, 1), 24 random bits each."""
        count = math.prod(shape)
        bits = self.words(ids, count, step) >> 8
        return (bits.to(torch.float32) * 2.0**-24).reshape(-1, *shape)

    def normal(self, ids: Tensor, shape: tuple[int, ...], step: int | Tensor = 0) -> Tensor:
        """Return float32 standard normal draws (Box and Muller's transform in float64)."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        words = self.words(ids, 2 * pairs, step).to(torch.float64)
        uniform = (words + 0.5) * 2.0**-32
        radius = torch.sqrt(-2.0 * torch.log(uniform[:, :pairs]))
        angle = 2.0 * math.pi * uniform[:, pairs:]
        draws = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]
        return draws.to(torch.float32).reshape(-1, *shape)

    def coarse_normal(self, ids: Tensor, shape: tuple[int, ...], step: int | Tensor = 0) -> Tensor:
        """Return float32 draws of 256 equally likely values that stand for a standard normal.

        Mean zero, variance one, values the normal's quantiles within +-2.9: search directions at a fifth of the price
        of `normal`, whose tails a direction in many dimensions does not need.
        """
        count = math.prod(shape)
        words = self.words(ids, (count + 3) // 4, step).to(torch.int32)
        index = words.contiguous().view(torch.uint8)[:, :count].to(torch.int32)
        return _quantiles(index.device).index_select(0, index.flatten()).reshape(-1, *shape)

    def signs(self, ids: Tensor, shape: tuple[int, ...], step: int | Tensor = 0) -> Tensor:
        """Return float32 draws of -1 or +1 with equal probability."""
        count = math.prod(shape)
        bits = self.words(ids, count, step) & 1
        return (bits.to(torch.float32) * 2.0 - 1.0).reshape(-1, *shape)

    def integers(self, ids: Tensor, shape: tuple[int, ...], high: int, step: int | Tensor = 0) -> Tensor:
        """Return int64 draws in [0, high); the bias of the multiply-shift is below high / 2**32."""
        count = math.prod(shape)
        return ((self.words(ids, count, step) * high) >> 32).reshape(-1, *shape)
