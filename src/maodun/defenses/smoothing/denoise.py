"""Denoised smoothing: a diffusion model takes the smoothing noise away before the classifier looks."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec
from maodun.defenses.purification.denoiser import Denoiser
from maodun.defenses.purification.levels import Levels, parse_levels, vp_discrete
from maodun.defenses.purification.loading import load_score
from maodun.defenses.purification.purifier import refuse_bounds, vote
from maodun.defenses.purification.samplers import DDIM, Sampler, State, Tweedie
from maodun.defenses.smoothing.bounds import check_sigma


def matching_level(levels: Levels, sigma: float) -> int:
    """Return the smallest index t with sigma_t / scale_t >= 2 `sigma`: the level whose noise the input already holds.

    Noise of `sigma` in [0, 1] is noise of 2 sigma in the diffusion's [-1, 1]. InputError when the table ends below.
    Source: Carlini et al., "(Certified!!) adversarial robustness for free!", ICLR 2023.
    """
    check_sigma(sigma)
    enough = (levels.ratios >= 2 * sigma).nonzero()
    if enough.numel() == 0:
        most = float(levels.ratios.max()) / 2
        raise InputError(f"sigma {sigma}", f"is more than the noise levels reach, {most:.3g}", "use a smaller one")
    return int(enough[0])


class Denoise(Defense):
    """Remove Gaussian noise of `sigma` (in [0, 1] input units) that the input already holds, by a diffusion model.

    x becomes u = scale_t (2x - 1) at the level t of `matching_level`; with `steps` 1 one evaluation of the `score`
    network (a Denoiser, or what `load_score` reads) gives Tweedie's estimate of the clean image (Carlini et al.,
    ICLR 2023), with more the stochastic reverse chain of so many steps draws one from the posterior. `votes` > 1
    averages the classifier's probabilities over so many draws of it (DensePure, ICLR 2023, counts their classes
    instead). It adds no noise of its own to the input: certify it, or put gaussian_noise in front. `levels` is as for
    DiffusionFilter. InputError for sigma, steps or votes that cannot be, and a sigma beyond the network's training.
    """

    name = "denoise"
    spec = DefenseSpec(nfe=1)

    def __init__(
        self, score: str | Denoiser = "", sigma: float = 0.25, steps: int = 1, votes: int = 1, levels: str | Levels = ""
    ) -> None:
        super().__init__()
        if votes < 1 or (votes > 1 and steps == 1):
            reason = "there has to be at least one" if votes < 1 else "one step draws nothing, so all votes would agree"
            raise InputError(f"votes {votes}", reason, "use votes 1, or more steps")
        self.denoiser = load_score(score).freeze()
        own = getattr(self.denoiser, "levels", None) or vp_discrete()
        self.levels: Levels = (parse_levels(levels) if levels else own) if isinstance(levels, str) else levels
        self.sampler: Sampler = Tweedie() if steps == 1 else DDIM(eta=1.0)
        self.path = self.sampler.grid(matching_level(self.levels, sigma), steps)
        self.denoiser.need_range(self.levels, self.path[0])
        self.sigma, self.steps, self.votes = sigma, steps, votes
        self.spec = DefenseSpec(stochastic=steps > 1, nfe=votes * self.sampler.nfe(steps), votes=votes)
        self.stochastic = steps > 1  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Return the denoised images, N x C x H x W in [0, 1]; `x` may lie outside, as noisy inputs do."""
        self.need_images(x)
        self.denoiser.need_shape(x)
        state: State = self.sampler.init(self.levels.at(self.path[0])[0] * (2.0 * x - 1.0))
        for i, (t, s) in enumerate(pairwise(self.path)):
            noise = context.noise(x, f"{self.name}-{i}").normal() if self.sampler.stochastic else x.new_zeros(())
            state = self.sampler.step(self.denoiser, self.levels, state, t, s, noise)
        return ((state[0] + 1.0) / 2.0).clamp(0.0, 1.0)

    def attach(self, model: nn.Module) -> None:
        """Refuse a classifier that declares inputs outside of [0, 1]."""
        refuse_bounds(model)

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of `model` on denoised inputs; with votes, the log of the mean probabilities."""
        return super().answer(model, x) if self.votes == 1 else vote(self, model, x)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"sigma={self.sigma}, steps={self.steps}, votes={self.votes}, levels={self.levels.name}"
