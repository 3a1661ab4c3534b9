"""What the generative attacks minimise, term by term, each a plain function of tensors.

Images are N x C x H x W in [0, 1], codes N x ..., scores and margins (N,), and every result is a mean over the batch
unless said otherwise. The terms and their sum are AdvGAN's (Xiao et al., IJCAI 2018) and a reconstruction of a
multi-proxy network whose published form could not be found: the shape of the latent-data terms is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.losses import margin

Game = Literal["lsgan", "hinge"]
Weighting = Literal["uniform", "softmax", "adaea"]


def proxy_margins(logits: Sequence[Tensor], y: Tensor, kappa: float) -> Tensor:
    """Return the K x N margins max(z_y - max of the others, -kappa) of K proxies' logits (N x C each).

    On logits, as Carlini and Wagner (2017) define it. On probabilities, which a well-known implementation of AdvGAN
    takes, the gradient vanishes exactly where the proxy is surest.
    """
    return torch.stack([margin(each, y, None).neg().clamp(min=-kappa) for each in logits])


def hardness(margins: Tensor, weighting: Weighting, temperature: float) -> Tensor:
    """Return the weights (K,) of K proxies with mean margins `margins` (K,); they sum to one and carry no gradient.

    softmax: the proxy that stands most firmly weighs most, the more so the lower `temperature` (in logits).
    """
    if weighting == "uniform":
        return torch.full_like(margins, 1.0 / margins.shape[0]).detach()
    return torch.softmax(margins.detach() / temperature, 0)


def agreement(ratios: Tensor, beta: float) -> Tensor:
    """Return AdaEA's weights (K,) from `ratios` (K x K): entry i, j is how far proxy i's step moves proxy j's loss,
    over how far proxy j's own step moves it.

    w = softmax(beta * mean over j != i of the ratios) (Chen et al., ICCV 2023, its gradient modulation); no gradient.
    """
    count = ratios.shape[0]
    off = ratios.detach() * (1.0 - torch.eye(count, dtype=ratios.dtype, device=ratios.device))
    return torch.softmax(beta * off.sum(1) / max(1, count - 1), 0)


def critic_loss(game: Game, real: Tensor, fakes: Sequence[Tensor]) -> Tensor:
    """Return what the critic minimises on the scores of real images and of each kind of made ones (N,) each.

    lsgan: (D(x) - 1)^2 + D(x')^2 (Mao et al., 2017). hinge: max(0, 1 - D(x)) + max(0, 1 + D(x')). The kinds of made
    images weigh alike and together as much as the real ones.
    """
    if game == "lsgan":
        return (real - 1.0).square().mean() + torch.stack([fake.square().mean() for fake in fakes]).mean()
    return F.relu(1.0 - real).mean() + torch.stack([F.relu(1.0 + fake).mean() for fake in fakes]).mean()


def realism_loss(game: Game, fakes: Sequence[Tensor]) -> Tensor:
    """Return what the generator minimises on the critic's scores: (D(x') - 1)^2, or -D(x') in the hinge game."""
    if game == "lsgan":
        return torch.stack([(fake - 1.0).square().mean() for fake in fakes]).mean()
    return torch.stack([-fake.mean() for fake in fakes]).mean()


def cycle_term(code_of_data: Tensor, latent: Tensor) -> Tensor:
    """Return ||E(x_d) - sg(z~)||^2 / d: the data branch's image must map back to the latent that made its partner."""
    return (code_of_data - latent.detach()).square().mean()


def shift_term(code_of_latent: Tensor, code: Tensor, noise: Tensor) -> Tensor:
    """Return ||E(x_l) - sg(E(x)) - zeta||^2 / d: a moved latent must move its image's code by as much.

    It is what keeps all latents from ending in one universal pattern.
    """
    return (code_of_latent - code.detach() - noise).square().mean()


def consistency_term(x_data: Tensor, x_latent: Tensor, eps: float) -> Tensor:
    """Return the mean of |x_d - x_l| over entries, in units of `eps`: 0 for equal images, at most 2."""
    return (x_data - x_latent).abs().mean() / eps


def diversity_term(x_first: Tensor, x_second: Tensor, z_first: Tensor, z_second: Tensor, least: float) -> Tensor:
    """Return max(0, least - |x_1 - x_2| / |z_1 - z_2|), mean absolute differences per sample, averaged over the batch.

    Mode seeking (Mao et al., CVPR 2019): images from two draws of noise must differ by `least` per unit of latent.
    """
    apart = (x_first - x_second).flatten(1).abs().mean(1)
    drawn = (z_first - z_second).flatten(1).abs().mean(1)
    return F.relu(least - apart / drawn.clamp(min=1e-12)).mean()


def norm_term(delta: Tensor, slack: float) -> Tensor:
    """Return max(0, ||delta||_2 - slack), the length of each perturbation beyond `slack` input units (AdvGAN)."""
    # The root's slope at zero is infinite; a perturbation of exact zeros gets the slope zero instead.
    squares = delta.flatten(1).square().sum(1)
    length = torch.where(squares > 0, squares.clamp(min=1e-30).sqrt(), torch.zeros_like(squares))
    return F.relu(length - slack).mean()
