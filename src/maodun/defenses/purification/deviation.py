"""How far the way back strays from the way there: what DiffAttack makes large besides the classifier's loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maodun.core import context
from maodun.defenses.purification.levels import CLEAN, Levels
from maodun.defenses.purification.replay import Chain, Move
from maodun.defenses.purification.samplers import State


class Observed:
    """Runs a chain in ordinary autograd and keeps, for every run, how far it strayed: `deviations`, each (N,).

    At every level s the chain comes down to, the state u_s is compared with scale_s u_0 + sigma_s n, the diffusion of
    the image the round began with by the very noise it began with: the mean square over the entries, the mean over
    the levels. Source: Kang, Song and Li, "DiffAttack", NeurIPS 2023 (its code is not public: a reconstruction).
    """

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self.deviations: list[Tensor] = []

    def run(self, chain: Chain, moves: Sequence[Move], start: State, guide: State) -> Tensor:
        """Return the end of the chain."""
        state, origin, noise_there = start, start[0], start[0]
        total, count = start[0].new_zeros(start[0].shape[0]), 0
        with context.ensured(start[0]):
            for i, (t, s) in enumerate(moves):
                noise = chain.draw(state[0].detach(), i, t)
                if t == CLEAN:
                    origin, noise_there = state[0], noise
                state = chain.advance(state, t, s, noise, guide)
                if t != CLEAN:
                    scale, sigma = self.levels.at(s)
                    apart = state[0] - (scale * origin + sigma * noise_there)
                    total, count = total + apart.square().flatten(1).mean(1), count + 1
        self.deviations.append(total / max(1, count))
        return state[0]
