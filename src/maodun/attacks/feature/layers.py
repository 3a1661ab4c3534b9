"""Looking inside a surrogate: which layer, and what leaves it, for as long as a search needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError, nearest
from maodun.core.problem import Problem

AUTO = "auto"


@dataclass
class Caught:
    """What left a layer in the last calls of a model: one tensor per call, in order."""

    outputs: list[Tensor] = field(default_factory=list)

    def take(self, layer: str) -> Tensor:
        """Return the output of the last call and forget all; InputError when the layer was not called."""
        if not self.outputs:
            raise InputError(f"layer '{layer}'", "the model never calls it", "name another layer")
        last = self.outputs[-1]
        self.outputs.clear()
        return last


@contextmanager
def catching(model: nn.Module, layer: str) -> Iterator[Caught]:
    """Catch what leaves `layer` (a module path of `model`) while the context lasts; the hook goes whatever happens."""
    caught = Caught()

    def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(f"layer '{layer}'", "what leaves it is no tensor of numbers", "name another layer")
        caught.outputs.append(value)

    handle = find_layer(model, layer).register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """Return the module at the path `layer`; InputError with the nearest path when there is none."""
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        known = [name for name in modules if name]
        raise InputError(f"layer '{layer}'", "the surrogate has none of that name", nearest(layer, known))
    found: nn.Module = modules[layer]
    return found


def called_layers(problem: Problem, model: nn.Module) -> list[str]:
    """Return the paths of the convolutions and linear layers in the order in which `model` calls them.

    Costs one query per row.
    """
    order: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv1d | nn.Linear):
                stack.callback(module.register_forward_hook(lambda *_, name=name: order.append(name)).remove)
        problem.logits(problem.x)
    return list(dict.fromkeys(order))


def choose_layer(problem: Problem, model: nn.Module, layer: str, depth: float) -> str:
    """Return `layer`, or for "auto" the convolution or linear layer at the share `depth` of all, in calling order.

    Depth 0 is the first layer, 1 the last. Where convolutions exist they alone count (a transformer's blocks are linear
    layers, so there both do as soon as linear layers are the majority). InputError when there is nothing to choose.
    """
    if layer != AUTO:
        find_layer(model, layer)
        return layer
    order = called_layers(problem, model)
    modules = dict(model.named_modules())
    convolutions = [name for name in order if not isinstance(modules[name], nn.Linear)]
    names = convolutions if 2 * len(convolutions) >= len(order) else order
    if not names:
        raise InputError("layer 'auto'", "the surrogate has no convolution and no linear layer", "name a layer")
    return names[round(depth * (len(names) - 1))]


def features(problem: Problem, model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Return what leaves `layer` for every row of `x`: one forward per row, no gradient; the mean over draws."""
    with catching(model, layer) as caught:
        problem.logits(x)
        if not caught.outputs:
            caught.take(layer)
        found = torch.cat(caught.outputs).detach()
    rows = x.shape[0]
    if found.shape[0] % rows:
        raise InputError(
            f"layer '{layer}'", f"its output has {found.shape[0]} rows for {rows} inputs", "name another layer"
        )
    return found if found.shape[0] == rows else found.reshape(rows, -1, *found.shape[1:]).mean(1)
