"""The latent attack: out of an image's own neighbourhood, into that of its opposites, in a space no task has shaped."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.feature.base import FeatureAttack, FeatureState, normalised, parts
from maodun.attacks.feature.layers import catching, features
from maodun.attacks.multitask.module import RelationModule
from maodun.attacks.multitask.relations import total_variation
from maodun.core.errors import InputError
from maodun.core.problem import Problem
from maodun.core.threat import Threat


@dataclass(frozen=True)
class Weights:
    """How much the parts of the latent objective count; `temperature`, `near` and `far` anchors are the steering's."""

    repel: float = 1.0
    shatter: float = 1.0
    steer: float = 0.5
    temperature: float = 0.2
    near: int = 15
    far: int = 64


def relation_objective(module: RelationModule, moved: Tensor, clean: Tensor, weights: Weights) -> Tensor:
    """Return (B,) values to climb, the mean over windows; codes `moved` and `clean` are B x width x h x w.

    repel: the squared distance to the own clean code. shatter: KL of the clean neighbourhood among the bank's anchors
    from that of the moved code. steer: InfoNCE with its roles swapped, towards the `far` least similar anchors and
    away from the `near` most similar ones.
    """
    now, then = (each.flatten(2).transpose(1, 2) for each in (moved, clean))
    similar, before = now @ module.bank.T, then @ module.bank.T
    repel = (now - then).square().sum(-1)
    log_p = (module.sharpness * before).log_softmax(-1)
    kernel = 1.0 / (1.0 + module.scale * (2.0 - 2.0 * similar).clamp(min=0.0))
    log_q = (kernel / kernel.sum(-1, keepdim=True)).clamp(min=1e-12).log()
    shatter = (log_p.exp() * (log_p - log_q)).sum(-1)
    near = similar.gather(-1, before.topk(weights.near, -1).indices)
    far = similar.gather(-1, before.topk(weights.far, -1, largest=False).indices)
    heat = weights.temperature
    steer = torch.logsumexp(far / heat, -1) - torch.logsumexp(near / heat, -1)
    return (weights.repel * repel + weights.shatter * shatter + weights.steer * steer).mean(-1)


@dataclass(frozen=True, kw_only=True)
class Relation(FeatureAttack):
    """Latent attack on preserved relations, per image, without labels, task losses or task-trained surrogates.

    A reconstruction of a thesis abstract. The Oracle's model must be a `RelationModule` (its controls count too).
    Signed steps climb `repel`, `shatter` and `steer` (see `relation_objective`), plus `levels` times the displacement
    of the module's earlier maps (`RelationModule.maps`, each relative to their size: smaller windows than a code's),
    less `disperse` times the spread of the first layer's answers and `smooth` times the perturbation's
    total variation. Starts in `start_share` of the ball, as the clean image has no slope. `layer` and `depth` are not
    used. Labels are not used.
    """

    name: ClassVar[str] = "relation"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    images_only: ClassVar[bool] = True

    repel: float = 1.0
    shatter: float = 1.0
    steer: float = 0.5
    levels: float = 0.0
    disperse: float = 0.1
    smooth: float = 0.0
    temperature: float = 0.2
    near: int = 15
    far: int = 64
    start_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.near < 1 or self.far < 1 or self.temperature <= 0 or not 0.0 < self.start_share <= 1.0:
            reason = "needs near >= 1, far >= 1, temperature > 0 and start_share in (0, 1]"
            raise InputError("attack 'relation'", reason, "correct the options")

    @property
    def weights(self) -> Weights:
        """The weights of the latent objective."""
        return Weights(self.repel, self.shatter, self.steer, self.temperature, self.near, self.far)

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse what has no windows."""
        super().check(x, threat)
        if x.shape[1] != 3 or min(x.shape[2:]) < 32:
            reason = f"needs colour images of at least 32 pixels, got {tuple(x.shape[1:])}"
            raise InputError("attack 'relation'", reason, "resize them")

    def init(self, problem: Problem) -> FeatureState:
        """Take the clean codes and start a little beside the clean image."""
        aims = []
        for member, model in parts(problem):
            module = _module(model)
            if max(self.near, self.far) > module.bank.shape[0]:
                raise InputError("attack 'relation'", f"has only {module.bank.shape[0]} anchors", "lower near and far")
            aims.append(self._clean(member, module))
        far = problem.threat.random_start(problem.x, problem.stream(f"{self.name}/start"), problem.ids)
        x = problem.threat.project(problem.x + self.start_share * (far - problem.x), problem.x)
        done = torch.zeros(len(problem), dtype=torch.bool, device=x.device)
        return FeatureState(x=x, done=done, velocity=torch.zeros_like(x), layers=(), aims=aims, step=0)

    def finish(self, problem: Problem, state: FeatureState) -> None:
        """Codes are no classes: there is nothing to look at where the search ends."""

    def slope(self, problem: Problem, state: FeatureState) -> Tensor:
        """Return the gradient of the objective, summed over the members with each l1-normalised."""
        total = torch.zeros_like(state.x)
        for (member, model), aim in zip(parts(problem), state.aims, strict=True):
            total += normalised(self._climb(member, _module(model), state.x, aim))
        if self.smooth:
            with torch.enable_grad():
                x = state.x.detach().requires_grad_(True)
                (rough,) = torch.autograd.grad(total_variation(x - problem.x).sum(), x)
            total -= self.smooth * normalised(rough)
        return total

    def _clean(self, problem: Problem, module: RelationModule) -> Tensor:
        """Return the clean codes and, where `levels` counts, the clean maps: one row of numbers per image."""
        rows = [features(problem, module, name, problem.x).flatten(1) for name in self._maps(module)]
        return torch.cat([*rows, problem.logits(problem.x)], 1)

    def _maps(self, module: RelationModule) -> tuple[str, ...]:
        return module.maps if self.levels else ()

    def _climb(self, problem: Problem, module: RelationModule, x: Tensor, aim: Tensor) -> Tensor:
        names = self._maps(module)
        with ExitStack() as stack:
            caught = {name: stack.enter_context(catching(module, name)) for name in dict.fromkeys(("filters", *names))}

            def heads(logits: Tensor, index: Tensor) -> Tensor:
                maps = {name: each.take(name) for name, each in caught.items()}
                wanted = torch.split(aim[index], [maps[name][0].numel() for name in names] + [logits.shape[1]], 1)
                moved, clean = (each.reshape(each.shape[0], module.width, -1, 1) for each in (logits, wanted[-1]))
                value = relation_objective(module, moved, clean, self.weights)
                for name, before in zip(names, wanted[:-1], strict=True):
                    value = value + self.levels * displacement(maps[name].flatten(1), before)
                return (value - self.disperse * maps["filters"].std(1).flatten(1).mean(1)).unsqueeze(1)

            return problem.values_and_gradients(x, heads)[2][0]


def displacement(moved: Tensor, clean: Tensor) -> Tensor:
    """Return (B,) mean square distances of rows, relative to the mean square of the clean ones."""
    return (moved - clean).square().mean(1) / clean.square().mean(1).clamp(min=1e-6)


def _module(model: torch.nn.Module) -> RelationModule:
    if not isinstance(model, RelationModule):
        reason = f"searches in the codes of a RelationModule, not in a {type(model).__name__}"
        raise InputError("attack 'relation'", reason, "give the oracle a relation module as its model")
    return model


def without_relations(attack: Relation) -> Relation:
    """Return the attack with the own code alone to flee from: what is left when no relation is used."""
    return replace(attack, shatter=0.0, steer=0.0, disperse=0.0)
