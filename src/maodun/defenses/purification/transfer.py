"""Distribution transfer: a reverse process that the protected classifier guides, without ever seeing a label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError, nearest
from maodun.core.estimators import own_derivative
from maodun.defenses.preprocessing.base import DefenseSpec
from maodun.defenses.purification.denoiser import Denoiser
from maodun.defenses.purification.guided import Told, Watching, slope, unit, with_derivatives
from maodun.defenses.purification.levels import CLEAN, Levels
from maodun.defenses.purification.purifier import DiffusionFilter
from maodun.defenses.purification.samplers import Sampler, State

MODES = ("conf", "consensus", "repel", "feature")


class DistributionTransfer(Watching):
    """Carry an image from the adversarial to the normal distribution: diffusion, then a guided reverse process.

    After each reverse step from level t to s the image is moved by scale (sigma_t^2 - sigma_s^2) times the unit
    gradient (root mean square 1 per sample) of an objective J of the clean estimate x0, with q = softmax f(x0):

    - conf: log max q, the confidence of whatever the classifier sees;
    - consensus: sum qbar log q, qbar the mean answer to `copies` unguided purifications of the same input;
    - repel: -log q of the class of the input as it came, where the copies' consensus says otherwise, else nothing;
    - feature: minus the squared distance of f's last features to their mean over the copies.

    `scale` 0 is the plain DiffusionFilter to the bit. `through` takes the gradient through the network to u_t, else at
    x0 only. The other options are DiffusionFilter's. The guidance never sees a label, nor another sample. The exact
    gradient passes through everything: the second derivatives of the guidance and the copies. Costs 1 + copies
    times the filter's network evaluations (conf: as many), and a gradient of classifier and network per step.
    InputError for an unknown mode, a negative scale, no copies, or no classifier behind it.

    Reconstruction: the source (Adversarial defense based on distribution transfer, arXiv 2311.13841) says that the
    classifier's output guides the reverse process and leaves open how; modes, scale and normalisation are ours, the
    nearest published method is COUP, whose guidance is conf at the noisy image.
    """

    name = "distribution_transfer"
    noise_of = DiffusionFilter.name
    spec = DefenseSpec(stochastic=True, inner_loop=True)

    def __init__(
        self,
        score: str | Denoiser = "",
        mode: str = "consensus",
        scale: float = 0.5,
        copies: int = 4,
        through: bool = True,
        t_star: float = 0.1,
        steps: int = 10,
        sampler: str | Sampler = "ddim_eta1",
        rounds: int = 1,
        votes: int = 1,
        levels: str | Levels = "",
    ) -> None:
        super().__init__(score, t_star=t_star, steps=steps, sampler=sampler, rounds=rounds, votes=votes, levels=levels)
        if mode not in MODES:
            raise InputError(f"mode '{mode}'", "is no guidance", nearest(mode, list(MODES)))
        if scale < 0:
            raise InputError(f"scale {scale}", "guidance away from its own aim", "use 0 (none) or more")
        if copies < 1:
            raise InputError(
                f"copies {copies}", "there has to be at least one", "use 4, or mode conf, which needs none"
            )
        self.mode, self.scale, self.copies, self.through = mode, scale, copies, through
        asked = 1 if mode == "conf" or scale == 0 else 1 + copies
        nfe = asked * rounds * votes * self.sampler.nfe(steps)
        self.spec = DefenseSpec(stochastic=True, inner_loop=True, nfe=nfe, votes=votes)

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        """Return the noise of move `i`, drawn under the plain filter's name: scale 0 is that filter to the bit."""
        if t != CLEAN and not self.sampler.stochastic:
            return x.new_zeros(())
        return context.noise(x, f"{self.noise_of}-{i}").normal()

    def guide(self, x: Tensor) -> State:
        """Return what the objective compares with, a differentiable function of `x`."""
        if self.mode == "conf" or self.scale == 0:
            return ()
        if self.mode == "feature":
            features = [last_features(self.victim, copy) for copy in self.unguided(x)]
            return (torch.stack(features).mean(0),)
        shares = [self.victim(copy).softmax(1) for copy in self.unguided(x)]
        consensus = torch.stack(shares).mean(0)
        if self.mode == "consensus":
            return (consensus,)
        with torch.no_grad():
            first = self.victim(x).argmax(1)
            suspect = (consensus.argmax(1) != first).to(x.dtype)
            return (suspect.unsqueeze(1) * nn.functional.one_hot(first, consensus.shape[1]),)

    def unguided(self, x: Tensor) -> Iterator[Tensor]:
        """Yield `copies` purifications of `x` by the plain filter, each with noise of its own."""
        plain, moves = _Plain(self), tuple(self.moves())
        for j in range(self.copies):
            with context.part(f"copy-{j}"):
                u = self.gradient.run(plain, moves, (2.0 * x - 1.0,), ())
            yield ((u + 1.0) / 2.0).clamp(0.0, 1.0)

    def objective(self, x0: Tensor, guide: State) -> Tensor:
        """Return J (N,) of clean estimates `x0` in [0, 1]; what it compares with is a constant in here."""
        if self.mode == "feature":
            return -(last_features(self.victim, x0) - guide[0]).square().mean(1)
        shares: Tensor = self.victim(x0).log_softmax(1)
        if self.mode == "conf":
            return shares.amax(1)
        return (guide[0] * shares).sum(1) * (1.0 if self.mode == "consensus" else -1.0)

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State = ()) -> State:
        """Return the state after one move, guided on the way down."""
        if t == CLEAN or self.scale == 0:
            return super().advance(state, t, s, noise)
        (scale, sigma), (_, sigma_s) = self.levels.at(t), self.levels.at(s)

        def step(state: State) -> State:
            u = state[0]
            eps: Tensor = self.denoiser(u, t, self.levels)
            x0 = (u - sigma * eps) / scale
            with own_derivative():
                toward = self.objective(((x0 + 1.0) / 2.0).clamp(0.0, 1.0), guide)
            aim = slope(toward, u if self.through else x0)
            after = self.sampler.step(Told(self.denoiser, u, t, eps), self.levels, state, t, s, noise)
            return (after[0] + self.scale * (sigma**2 - sigma_s**2) * unit(aim), *after[1:])

        return with_derivatives(step, state)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        own = f"mode={self.mode!r}, scale={self.scale}, copies={self.copies}, through={self.through}, "
        return own + super().extra_repr()


class _Plain:
    """The same chain without guidance."""

    def __init__(self, filter_: DistributionTransfer) -> None:
        self.filter = filter_

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        return self.filter.draw(x, i, t)

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State) -> State:
        return DiffusionFilter.advance(self.filter, state, t, s, noise, guide)


def last_features(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the last linear layer of `model` sees of `x`, N x D; its logits where there is no such layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen: list[Any] = []
    if not layers:
        logits: Tensor = model(x)
        return logits
    handle = layers[-1].register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    try:
        model(x)
    finally:
        handle.remove()
    features: Tensor = seen[-1].flatten(1)
    return features


__all__ = ["MODES", "DistributionTransfer", "last_features"]
