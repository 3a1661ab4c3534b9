"""Looking at, and changing, what a layer of a model says during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.modes import evaluation_mode


def feature_layer(model: nn.Module, x: Tensor, name: str | None = None) -> nn.Module:
    """Return the layer whose output is taken as the model's features.

    `name` is a path of `model.named_modules()`. None takes the last leaf module that finishes with feature maps larger
    than one pixel (N x C x H x W), or, where there are none, the last but one leaf that finishes. Costs one forward
    of the first row of `x`. InputError for a path that does not exist.
    """
    if name is not None:
        modules = dict(model.named_modules())
        # A view of a model (at moved weights, say) puts a word before every path.
        paths = [path for path in modules if path == name or path.endswith("." + name)]
        if not paths:
            some = ", ".join(list(modules)[1:9])
            raise InputError(f"layer '{name}'", "is not a module of the model", f"use one of {some}, ...")
        found: nn.Module = modules[min(paths, key=len)]
        return found
    finished: list[tuple[nn.Module, bool]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            finished.append((module, output.ndim == 4 and output.shape[2] * output.shape[3] > 1))

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    maps = [module for module, is_map in finished if is_map]
    if maps:
        return maps[-1]
    if len(finished) < 2:
        raise InputError("model", "has no layer before its logits", "name a layer, or switch the resampling off")
    return finished[-2][0]


@contextmanager
def tapped(layer: nn.Module, change: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Collect the outputs of `layer` while the context lasts, each before `change` replaces it."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        seen.append(output)
        return None if change is None else change(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Hold every submodule in eval mode, so batch norm neither mixes nor learns; parameters keep their gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def pooled(h: Tensor) -> Tensor:
    """Return one vector per sample (N x D): the mean over the positions of feature maps, vectors as they are."""
    return h.flatten(2).mean(2) if h.ndim > 2 else h
