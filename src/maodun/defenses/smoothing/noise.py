"""The smoothed classifier as a defence that an arena can attack: Gaussian noise before every answer."""

from __future__ import annotations

from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec
from maodun.defenses.purification.purifier import vote
from maodun.defenses.smoothing.bounds import check_sigma


class GaussianNoise(Defense):
    """Add Gaussian noise of standard deviation `sigma` ([0, 1] input units, default 0.25), keyed by sample and draw.

    What one draw answers is one vote of the smoothed classifier of Cohen et al. (ICML 2019); a verdict by the majority
    of K draws is its prediction from K votes. `votes` > 1 averages the probabilities of so many draws within one
    answer instead, which has a derivative. The output is not clipped to [0, 1], as the certificate assumes; it is
    smooth in the input for a given draw, so exact gradients with EOT are the attack it deserves.
    InputError for a sigma that is not positive and for no votes.
    """

    name = "gaussian_noise"
    spec = DefenseSpec(stochastic=True)

    def __init__(self, sigma: float = 0.25, votes: int = 1) -> None:
        super().__init__()
        check_sigma(sigma)
        if votes < 1:
            raise InputError(f"votes {votes}", "there has to be at least one", "use 1")
        self.sigma, self.votes = sigma, votes
        self.spec = DefenseSpec(stochastic=True, votes=votes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the noisy inputs, shaped like `x`, values also outside [0, 1]."""
        return x + self.sigma * context.noise(x, self.name).normal()

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of `model` on noisy inputs; with votes, the log of the mean probabilities."""
        return super().answer(model, x) if self.votes == 1 else vote(self, model, x)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"sigma={self.sigma}, votes={self.votes}"
