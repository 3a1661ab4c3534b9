"""Networks by name. All take [0, 1] inputs and return logits; what normalisation they need is inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError, nearest
from maodun.zoo.architectures.digits_cnn import DigitsCNN
from maodun.zoo.architectures.families import CCT, VGG, ConvMixer, DenseNet, Inception, MobileNet
from maodun.zoo.architectures.preact_resnet import PreActResNet, preact_resnet18, small_preact_resnet
from maodun.zoo.architectures.wide_resnet import WideResNet
from maodun.zoo.architectures.witnesses import ResNet4b, ResNetOptionA, TradesMnistCNN

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": DigitsCNN,
    "preact-resnet8": partial(small_preact_resnet, (1, 1, 1)),
    "preact-resnet20": partial(small_preact_resnet, (3, 3, 3)),
    "preact-resnet18": preact_resnet18,
    "wide-resnet-28-10": WideResNet,
    "trades-mnist-cnn": TradesMnistCNN,
    "resnet4b": ResNet4b,
    "resnet56": ResNetOptionA,
    "vgg-small": VGG,
    "inception-small": Inception,
    "densenet-small": DenseNet,
    "mobilenet-small": MobileNet,
    "cct-small": CCT,
    "convmixer-small": ConvMixer,
}


def ensemble(of: str = "digits-cnn", members: int = 3, fusion: str = "probabilities", **options: Any) -> nn.Module:
    """Return `members` fresh networks of the architecture `of` that answer as one; `options` are each member's."""
    if members < 1 or of not in ARCHITECTURES or of == "ensemble":
        others = [name for name in ARCHITECTURES if name != "ensemble"]
        raise InputError(f"ensemble of {members} '{of}'", "cannot be built", nearest(of, others))
    return Ensemble([ARCHITECTURES[of](**options) for _ in range(members)], fusion=fusion)


ARCHITECTURES["ensemble"] = ensemble


def build_architecture(name: str, options: Mapping[str, Any] | None = None, *, seed: int = 0) -> nn.Module:
    """Return a freshly initialised network in train mode; equal seeds give equal weights.

    `options` are keyword arguments of the architecture. Convolutions and linear layers are drawn from He et al.'s
    normal distribution by a generator of their own, biases are zero, so the global random state is left as it was.
    Errors: InputError for an unknown name or option.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"architecture '{name}'", "there is none of that name", nearest(name, list(ARCHITECTURES)))
    try:
        with torch.random.fork_rng(devices=[]):
            model = ARCHITECTURES[name](**dict(options or {}))
    except TypeError as error:
        raise InputError(f"options of '{name}'", str(error), "see the architecture's docstring") from error
    initialise(model, seed)
    return model


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every convolution and linear weight of `model` anew, in place, as a function of `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            last = isinstance(module, nn.Linear)
            nn.init.kaiming_normal_(
                module.weight,
                mode="fan_in" if last else "fan_out",
                nonlinearity="linear" if last else "relu",
                generator=generator,
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)


__all__ = [
    "ARCHITECTURES",
    "CCT",
    "VGG",
    "ConvMixer",
    "DenseNet",
    "DigitsCNN",
    "Inception",
    "MobileNet",
    "PreActResNet",
    "ResNet4b",
    "ResNetOptionA",
    "TradesMnistCNN",
    "WideResNet",
    "build_architecture",
    "initialise",
    "preact_resnet18",
    "small_preact_resnet",
]
