"""Likelihood maximisation: an image is moved to where the diffusion model finds it likely, by a few steps of Adam."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec
from maodun.defenses.purification.denoiser import Denoiser, clean_estimate
from maodun.defenses.purification.guided import slope, with_derivatives
from maodun.defenses.purification.levels import Levels, parse_levels, vp_discrete
from maodun.defenses.purification.loading import load_score
from maodun.defenses.purification.purifier import refuse_bounds, vote
from maodun.defenses.purification.replay import Replay, Way
from maodun.defenses.purification.samplers import State

_DECAY = (0.9, 0.999)


class LikelihoodMaximisation(Defense):
    """Move each image to a lower denoising error by `steps` steps of Adam, at most `radius` away from where it came.

    The error of u in [-1, 1] at the noise level tau is ||D(u + tau n) - u||^2 with fresh n in every step (the diffusion
    loss, a bound of -log p; Chen et al., Robust Classification via a Single Diffusion Model, ICML 2024). tau, sigma /
    scale of the levels, runs evenly from `least` to `most`, step by step, where the source draws it at random: a draw
    would be one for the batch, not the sample's. `rate` is Adam's, in [-1, 1] units; `radius` an linf bound in [0, 1]
    units, whose published code leaves it open in effect. `votes` averages as in DiffusionFilter. Keyed noise: no result
    depends on the batch. The exact gradient differentiates the optimiser: Hessians of the error and Adam's averages,
    replayed step by step. Adam's first step is the sign of the gradient, so little derivative is left of it but the
    identity's: that is masking, not robustness. Costs a gradient of the network per step and vote. InputError for no
    steps or votes, a rate or radius that is not positive, and noise that is not positive or beyond the network's
    training.
    """

    name = "likelihood"
    spec = DefenseSpec(stochastic=True, inner_loop=True)
    gradient: Way = Replay()

    def __init__(
        self,
        score: str | Denoiser = "",
        steps: int = 5,
        rate: float = 0.1,
        radius: float = 8 / 255,
        least: float = 0.4,
        most: float = 0.6,
        votes: int = 1,
        levels: str | Levels = "",
    ) -> None:
        super().__init__()
        for word, count in (("steps", steps), ("votes", votes)):
            if count < 1:
                raise InputError(f"{word} {count}", "there has to be at least one", "use 1 or more")
        for word, value in (("rate", rate), ("radius", radius), ("least", least), ("most", most)):
            if value <= 0:
                raise InputError(f"{word} {value:g}", "has to be positive", "rate 0.1, radius 8/255, noise 0.4 to 0.6")
        if most < least:
            raise InputError(f"least {least:g}", f"is more noise than most {most:g}", "swap them")
        self.denoiser = load_score(score).freeze()
        own = getattr(self.denoiser, "levels", None) or vp_discrete()
        self.levels: Levels = (parse_levels(levels) if levels else own) if isinstance(levels, str) else levels
        self.denoiser.need_range(self.levels, self.levels.nearest(most))
        self.steps, self.rate, self.radius, self.votes = steps, rate, radius, votes
        self.least, self.most = least, most
        self.spec = DefenseSpec(stochastic=True, inner_loop=True, nfe=votes * steps, votes=votes)

    @property
    def replays(self) -> int:
        """How many network evaluations one after the other need the memory of one."""
        return self.spec.nfe

    def moves(self) -> Iterator[tuple[int, int]]:
        """Yield (level, number) of every step."""
        for k in range(self.steps):
            yield self.levels.nearest(self.least + (self.most - self.least) * (k + 0.5) / self.steps), k

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        """Return the noise of step `i`."""
        del t
        return context.noise(x, f"{self.name}-{i}").normal()

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State = ()) -> State:
        """Return image, mean and square after step number `s` of Adam at level `t`."""

        def step(state: State) -> State:
            u, mean, square = state
            scale, sigma = self.levels.at(t)
            seen = clean_estimate(self.denoiser, self.levels, scale * u + sigma * noise, t)
            aim = slope((seen - u).flatten(1).square().sum(1), u)
            mean = _DECAY[0] * mean + (1 - _DECAY[0]) * aim
            square = _DECAY[1] * square + (1 - _DECAY[1]) * aim.square()
            # Adam's epsilon under the root, where a gradient of exactly zero has a derivative.
            size = (square / (1 - _DECAY[1] ** (s + 1)) + 1e-16).sqrt()
            u = u - self.rate * mean / (1 - _DECAY[0] ** (s + 1)) / size
            far = 2.0 * self.radius
            return u.clamp(guide[0] - far, guide[0] + far), mean, square

        return with_derivatives(step, state)

    def forward(self, x: Tensor) -> Tensor:
        """Return the images of higher likelihood, N x C x H x W in [0, 1]."""
        self.need_images(x)
        self.denoiser.need_shape(x)
        start = 2.0 * x - 1.0
        zero = start.new_zeros(start.shape)
        with context.ensured(x):
            u = self.gradient.run(self, tuple(self.moves()), (start, zero, zero), (start,))
        return ((u + 1.0) / 2.0).clamp(0.0, 1.0)

    def attach(self, model: nn.Module) -> None:
        """Refuse a classifier that declares inputs outside of [0, 1]."""
        refuse_bounds(model)

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of `model` behind it; with votes, the log of the mean probabilities."""
        return super().answer(model, x) if self.votes == 1 else vote(self, model, x)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        noise = f"least={self.least}, most={self.most}"
        return f"steps={self.steps}, rate={self.rate}, radius={self.radius:g}, {noise}, votes={self.votes}"


__all__ = ["LikelihoodMaximisation"]
