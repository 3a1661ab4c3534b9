"""Models that tests hand to the command line by `module:factory`: one that is right, and the ways of being wrong.

All are built on one linear classifier of the digits in closed form (nearest class mean), so nothing is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Nearest(nn.Module):
    """Logits that grow as the squared distance to a class's mean falls; about 90 % right on the digits."""

    def __init__(self, sharpness: float = 4.0) -> None:
        super().__init__()
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
        means = torch.stack([x[y == label].mean(0) for label in range(10)])
        self.score = nn.Linear(64, 10)
        with torch.no_grad():
            self.score.weight.copy_(2 * sharpness * means)
            self.score.bias.copy_(-sharpness * means.pow(2).sum(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x.flatten(1))


class OneClass(nn.Module):
    """A binary score instead of a logit per class."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True)


class Guess(Nearest):
    """A model whose classes are in another order than the labels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, dims=1)


def linear() -> nn.Module:
    """The model that is right, in inference mode."""
    return Nearest().eval()


def probabilities() -> nn.Module:
    """Softmax at the end."""
    return nn.Sequential(Nearest(), nn.Softmax(dim=1)).eval()


def training_batchnorm() -> nn.Module:
    """Batch statistics instead of running ones."""
    return nn.Sequential(nn.BatchNorm2d(1), Nearest()).train()


def one_class() -> nn.Module:
    """One output."""
    return OneClass().eval()


def shuffled() -> nn.Module:
    """No better than chance."""
    return Guess().eval()


def not_a_model() -> str:
    """A factory that returns something else."""
    return "not a module"
