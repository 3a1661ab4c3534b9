"""Frozen proxies: the models a generator is trained against, their logits and, for agent heads, what lies before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.modes import conv_weights_channels_last, evaluation_mode


class Proxies:
    """K models in a fixed order, held in evaluation mode with frozen parameters while `ready`.

    All take the same images (N x C x H x W in [0, 1]) and know the same classes. They stay on their device, and get
    mode and flags back as they were. Errors: InputError for no proxy, for another number of classes, or for a model
    that cannot take the images.
    """

    def __init__(self, models: Sequence[nn.Module], example: Tensor) -> None:
        if not models:
            raise InputError("proxies", "there is none", "give at least one model to train against")
        self.models = list(models)
        with self.ready(), torch.no_grad():
            try:
                sizes = [int(model(example[:2]).shape[1]) for model in self.models]
            except RuntimeError as error:
                reason = f"a proxy cannot take inputs of shape {tuple(example.shape[1:])}"
                raise InputError(
                    "proxies", f"{reason} ({str(error).splitlines()[0]})", "use one for this data"
                ) from error
        if len(set(sizes)) > 1:
            raise InputError("proxies", f"know {', '.join(map(str, sizes))} classes", "use models of the same classes")
        self.classes, self.example = sizes[0], example[:1]

    def __len__(self) -> int:
        return len(self.models)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Hold every proxy in evaluation mode, frozen, conv weights laid out for speed."""
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(evaluation_mode(model))
                stack.enter_context(conv_weights_channels_last(model))
            yield

    def logits(self, x: Tensor) -> list[Tensor]:
        """Return the logits (N x C) of every proxy."""
        return [_wide(model(x)) for model in self.models]

    def logits_and_features(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits and the penultimate features (N x d_k) of every proxy: what its last linear layer reads."""
        logits, features = [], []
        for model in self.models:
            caught: list[Tensor] = []
            hook = _last_linear(model).register_forward_pre_hook(lambda _, inputs, box=caught: box.append(inputs[0]))
            try:
                logits.append(_wide(model(x)))
            finally:
                hook.remove()
            features.append(caught[-1].flatten(1))
        return logits, features

    def labels(self, x: Tensor, batch_size: int = 256) -> Tensor:
        """Return the class (N,) that the proxies' mean probability names for each clean image: no labels are needed."""
        with self.ready(), torch.no_grad():
            parts = [
                torch.stack([each.softmax(1) for each in self.logits(part)]).mean(0).argmax(1)
                for part in torch.split(x, batch_size)
            ]
        return torch.cat(parts)


def _wide(logits: Tensor) -> Tensor:
    """Return logits of half precision in float32, others as they are."""
    return logits.float() if logits.element_size() < 4 else logits


def _last_linear(model: nn.Module) -> nn.Linear:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError("proxies", "one has no linear layer to put an agent head before", "set agents to 0")
    return layers[-1]
