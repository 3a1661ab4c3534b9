"""What is done, without being asked, about gradients that mislead: other losses, other scales, other ways to one.

Every remedy is an attack whose candidates are judged on the shield itself, so none of them can claim too much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maodun.arena.laboratory import STEPS, Laboratory, RandomNoise, Way
from maodun.arena.plan import estimator
from maodun.arena.recipe import SpearSpec
from maodun.arena.strategy import derive
from maodun.attacks.gradient.pgd import PGD
from maodun.core import context
from maodun.core.engine import Attack
from maodun.core.estimators import EOT, Estimator, Exact

_DRAWS = 8
_MORE = 5
_CONTRAST = 0.75
_LIMIT = 1.0
_RESTARTS = 10
_LONG = 2000
_ROUNDING = frozenset(
    {
        torch.round, torch.floor, torch.ceil, torch.trunc, torch.fix, torch.sign, torch.sgn,
        Tensor.round, Tensor.floor, Tensor.ceil, Tensor.trunc, Tensor.fix, Tensor.sign, Tensor.sgn,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Remedy:
    """One trial against a suspicion: `name`, what it mends in words, and who fell (n,) when it was run."""

    name: str
    mends: str
    run: Callable[[], Tensor]


class _Rounding(TorchFunctionMode):
    """Let the gradient pass rounding functions as if they were the identity; `hits` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.hits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ROUNDING and isinstance(args[0], Tensor) and args[0].requires_grad:
            self.hits += 1
            return args[0] + (out - args[0]).detach()
        return out


class StraightThrough(nn.Module):
    """A model whose rounding functions (round, floor, ceil, trunc, sign) have the derivative of the identity.

    Its values are the model's. Bengio, Leonard and Courville (2013); as an attack Athalye et al. (ICML 2018).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.hits = model, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x ... inputs in [0, 1]."""
        with _Rounding() as mode:
            logits: Tensor = self.model(x)
        self.hits += mode.hits
        return logits


class _Carry(torch.autograd.Function):
    """To float64 and back: a gradient too small for float32 is brought to length 1 on its way, per sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - torch's shape
        return x.double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        size = grad.flatten(1).abs().amax(1).reshape(-1, *([1] * (grad.ndim - 1)))
        return torch.where(size > 0, grad / size.clamp(min=1e-300), grad).float()


class Double(nn.Module):
    """A copy of a model in float64 whose gradients come back in float32 with their direction and length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x ... inputs in [0, 1]."""
        logits: Tensor = self.model(_Carry.apply(x))  # type: ignore[no-untyped-call]
        return logits


class Shaken(nn.Module):
    """A model whose inputs are shaken by normal noise of size `sigma`: its mean is a smoothed model."""

    stochastic: ClassVar[bool] = True

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of shaken inputs."""
        logits: Tensor = self.model((x + self.sigma * context.noise(x, "shaken").normal()).clamp(0.0, 1.0))
        return logits


class Contrast(nn.Module):
    """A model that sees its inputs with the contrast reduced to a share."""

    def __init__(self, model: nn.Module, share: float) -> None:
        super().__init__()
        self.model, self.share = model, share

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of 0.5 + share (x - 0.5)."""
        logits: Tensor = self.model(0.5 + self.share * (x - 0.5))
        return logits


def remedies(lab: Laboratory) -> Iterator[Remedy]:
    """Yield the remedies that apply to a shield, cheap ones first."""
    model, plain = lab.shield.model, estimator(lab.spec)
    best = PGD(steps=STEPS, loss="margin")
    yield Remedy("margin", "the loss is the margin, which does not saturate", lambda: lab.fell(best))
    adaptive = _adaptive(lab, plain)
    if adaptive is not None:
        words = "every part gives the gradient it declares (" + _spelt(adaptive.gradient) + ")"
        yield Remedy("adaptive", words, lambda: lab.fell(best, way=adaptive))
    through = _straight(lab)
    if through is not None:
        yield Remedy("straight through", "rounding passes gradients on", lambda: lab.fell(best, way=through))
    double = _double(lab)
    if double is not None:
        words = "the model runs in float64, where small gradients do not underflow"
        yield Remedy("float64", words, lambda: lab.fell(best, way=double))
    sigma = min(lab.threat.eps, _LIMIT) / 4 if lab.threat.norm == "linf" else 0.02
    shaken = Way("shaken", Shaken(model, sigma), EOT(_inner(plain), _DRAWS))
    words = f"gradients are averaged over {_DRAWS} points within noise of {sigma:.2g}"
    yield Remedy("smoothing", words, lambda: lab.fell(best, way=shaken))
    pale = Way("contrast", Contrast(model, _CONTRAST), lab.estimator)
    words = f"gradients are taken at {_CONTRAST:g} of the input's contrast"
    yield Remedy("input scale", words, lambda: lab.fell(best, way=pale))
    longer = PGD(steps=_MORE * STEPS, loss="margin")
    yield Remedy("more steps", f"there are {_MORE * STEPS} steps instead of {STEPS}", lambda: lab.fell(longer))


def beyond_jumps(lab: Laboratory) -> Iterator[Remedy]:
    """Yield what is tried where the answer jumps, and gradients say nothing of a step: other starts, and values."""
    again = PGD(steps=STEPS, loss="margin", restarts=_RESTARTS)
    yield Remedy("restarts", f"there are {_RESTARTS} random starts", lambda: lab.fell(again))
    blind = blind_attack(lab, _LONG)
    words = f"gradients are not used at all, with {_LONG} queries"
    yield Remedy(f"long {blind.name}", words, lambda: lab.fell(blind))


def blind_attack(lab: Laboratory, queries: int) -> Attack[Any]:
    """Return Square with so many queries where it can be used, else random points of the ball."""
    from maodun.attacks.registry import build_attack

    square = build_attack("square", queries=queries)
    if lab.threat.norm in square.norms and (lab.x.ndim == 4 or not square.images_only):
        return square
    return RandomNoise()


def twin_attack(lab: Laboratory) -> Remedy | None:
    """Return the transfer from the twin: a search on another model, every sample to the last step; None without one."""
    if lab.twin is None:
        return None
    way = Way("twin", lab.twin, Exact())
    attack: Attack[Any] = PGD(steps=STEPS, loss="margin")
    return Remedy("twin", "the search sees an undefended twin instead", lambda: lab.fell(attack, way=way))


def _inner(gradient: Estimator) -> Any:
    return getattr(gradient, "inner", gradient)


def _spelt(gradient: Estimator) -> str:
    inner = type(_inner(gradient)).__name__.lower()
    return inner if not isinstance(gradient, EOT) else f"{inner}, mean of {gradient.draws} draws"


def _adaptive(lab: Laboratory, plain: Estimator) -> Way | None:
    """Return the gradient that the plan would choose, None where the spear's is the same."""
    strategy = derive(lab.shield.model)
    if strategy.gradient not in ("exact", "bpda"):
        return None
    options = dict(strategy.options)
    chosen = SpearSpec(attack="pgd", gradient=strategy.gradient, gradient_options=options, eot=strategy.eot)
    gradient = estimator(chosen)
    return None if gradient == plain else Way("adaptive", lab.shield.model, gradient)


def _straight(lab: Laboratory) -> Way | None:
    """Return the model with straight-through rounding, None where it rounds nothing that gradients pass."""
    model = StraightThrough(lab.shield.model)
    with torch.enable_grad():
        model(lab.x[:1].detach().requires_grad_(True))
    lab.forwards += 1
    return Way("straight through", model, lab.estimator) if model.hits else None


def _double(lab: Laboratory) -> Way | None:
    """Return the model in float64, None where it has parts that insist on float32."""
    try:
        model = Double(lab.shield.model).eval()
        with torch.no_grad():
            model(lab.x[:1])
    except (RuntimeError, TypeError, ValueError):
        return None
    lab.forwards += 1
    return Way("float64", model, lab.estimator)


__all__ = [
    "Contrast",
    "Double",
    "Remedy",
    "Shaken",
    "StraightThrough",
    "beyond_jumps",
    "blind_attack",
    "remedies",
    "twin_attack",
]
