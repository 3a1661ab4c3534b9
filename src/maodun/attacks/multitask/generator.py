"""Generators trained without labels: on the latent objective, or on a surrogate's features as LTP trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maodun.attacks.feature.layers import catching, find_layer
from maodun.attacks.generative.attack import GeneratorAttack
from maodun.attacks.generative.networks import Generator, initialise
from maodun.attacks.multitask.attack import Weights, displacement, relation_objective
from maodun.attacks.multitask.module import RelationModule
from maodun.attacks.multitask.relations import total_variation
from maodun.core.errors import InputError
from maodun.core.modes import evaluation_mode

Objective = Callable[[Tensor, Tensor], Tensor]
"""From x_adv and x, both N x C x H x W, to (N,) values to climb."""


@dataclass(frozen=True, kw_only=True)
class RelationGenerator(GeneratorAttack):
    """A generator trained without labels on the latent objective of the relation attack (reconstruction)."""

    name: ClassVar[str] = "relation-generator"


@dataclass(frozen=True, kw_only=True)
class FeatureGenerator(GeneratorAttack):
    """A generator trained to separate a surrogate's mid-level features (LTP, Nakka and Salzmann, NeurIPS 2021)."""

    name: ClassVar[str] = "ltp"


def relation_value(module: RelationModule, weights: Weights, smooth: float = 0.1, levels: float = 0.0) -> Objective:
    """Return the latent objective of whole images, less `smooth` times the perturbation's total variation.

    `levels` weighs the displacement of the module's earlier maps, as in `Relation`.
    """
    names = module.maps if levels else ()

    def value(x_adv: Tensor, x: Tensor) -> Tensor:
        with ExitStack() as stack:
            caught = {name: stack.enter_context(catching(module, name)) for name in names}
            with torch.no_grad():
                clean = module.codes(x)
                before = {name: each.take(name).flatten(1) for name, each in caught.items()}
            climbed = relation_objective(module, module.codes(x_adv), clean, weights)
            for name, each in caught.items():
                climbed = climbed + levels * displacement(each.take(name).flatten(1), before[name])
        return climbed - smooth * total_variation(x_adv - x)

    return value


def separation_value(model: nn.Module, layer: str) -> Objective:
    """Return the mean square distance of a layer's outputs between adversarial and clean images; no label is used."""
    find_layer(model, layer)

    def value(x_adv: Tensor, x: Tensor) -> Tensor:
        with catching(model, layer) as caught:
            with torch.no_grad():
                model(x)
            clean = caught.take(layer)
            model(x_adv)
            return (caught.take(layer) - clean).square().flatten(1).mean(1)

    return value


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """Adam's steps on batches of unlabelled images, its rate, and the generator's size."""

    steps: int = 200
    batch_size: int = 32
    rate: float = 2e-3
    width: int = 8
    blocks: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise InputError("generator training", "needs steps >= 1 and batch_size >= 1", "correct the settings")


def train_generator(
    kind: type[GeneratorAttack],
    model: nn.Module,
    objective: Objective,
    images: Tensor,
    eps: float,
    settings: GeneratorSettings,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> GeneratorAttack:
    """Return a generator trained to climb `objective`, which asks `model`, on images N x C x H x W in [0, 1].

    `eps` is the linf radius; every random choice follows from `seed`; `on_step` gets the step and the value, every 25
    steps. The network takes images of any size: `replace(shape=...)` gives the same attack for another.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        network = Generator(images.shape[1], settings.width, settings.blocks)
    initialise(network, seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    with evaluation_mode(model):
        for step in range(settings.steps):
            x = images[torch.randint(images.shape[0], (settings.batch_size,), generator=generator)]
            value = objective((x + eps * network(x)).clamp(0.0, 1.0), x).mean()
            optimiser.zero_grad(set_to_none=True)
            (-value).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if on_step is not None and (step + 1) % 25 == 0:
                on_step(step + 1, float(value.detach()))
    return kind(
        shape=tuple(images.shape[1:]), eps=eps, width=settings.width, blocks=settings.blocks,
        tensors=network.state_dict(), about={"seed": seed, "steps": settings.steps, **dict(about or {})},
    )  # fmt: skip
