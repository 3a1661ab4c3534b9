"""How the adversary gets a gradient: exactly, through randomness, around broken pieces, or from scores alone.

An estimator turns `heads(logits, index) -> (B, K)`, scalar functions of one micro-batch's logits, into their values and
their gradients with respect to the input. It calls the model only through the Port it is handed, which counts
every pass, checks the budget and keys the randomness. `index` (B,) are row numbers, so heads can look up their
own per-sample tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maodun.core.ensemble import member_answers
from maodun.core.errors import InputError
from maodun.core.streams import Stream

Heads = Callable[[Tensor, Tensor], Tensor]
Estimate = tuple[Tensor, Tensor, list[Tensor]]


class Port(Protocol):
    """What an estimator may do with the model for one micro-batch."""

    model: nn.Module

    @property
    def batch_size(self) -> int:
        """Return how many rows may pass through the model at once."""

    def forward(self, x: Tensor, index: Tensor, draws: int = 1) -> Tensor:
        """Return float32 logits of `x` for rows `index`; counts one forward per row (rows repeat `draws` times)."""

    def count_backward(self, index: Tensor, passes: int, draws: int = 1) -> None:
        """Note backward passes per row, before they are made."""

    def noise(self, purpose: str) -> Stream:
        """Return the search stream of a purpose."""

    def ids(self, index: Tensor) -> Tensor:
        """Return the sample ids of rows."""

    def calls(self, index: Tensor) -> Tensor:
        """Return how many forwards each row has had: the number of its next draw."""


class Estimator(Protocol):
    """A way to obtain gradients."""

    @property
    def needs(self) -> str:
        """The access level this estimator requires."""

    @property
    def draws(self) -> int:
        """How many times a row stands in one call of the model."""

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return logits (B x C), values (B x K) and K gradients shaped like `x`."""


def _autograd(values: Tensor, x: Tensor) -> list[Tensor]:
    heads = values.shape[1]
    grads = []
    for k in range(heads):
        total = values.sum() if heads == 1 else values[:, k].sum()
        (grad,) = torch.autograd.grad(total, x, retain_graph=k + 1 < heads, allow_unused=True)
        grads.append(torch.zeros_like(x) if grad is None else grad)
    return grads


def _value_and_grads(port: Port, x: Tensor, index: Tensor, heads: Heads, draws: int, members: bool = False) -> Estimate:
    collected: AbstractContextManager[list[Tensor]] = member_answers(port.model) if members else nullcontext([])
    with torch.enable_grad(), collected as answers:
        x = x.detach().requires_grad_(True)
        logits = port.forward(x, index, draws)
        values = torch.stack([heads(each.float(), index) for each in answers or [logits]]).mean(0)
        if not values.requires_grad:
            # The graph is broken (a non-differentiable model): the honest gradient is zero, and diagnostics say so.
            return logits.detach(), values.detach(), [torch.zeros_like(x) for _ in range(values.shape[1])]
        port.count_backward(index, values.shape[1], draws)
        grads = _autograd(values, x)
    return logits.detach(), values.detach(), grads


@dataclass(frozen=True)
class Exact:
    """Backpropagation through the model as it is: one forward, one backward per head.

    With `members` the loss is the mean of the losses of every member of the ensemble that the model is or holds,
    instead of the loss of what they answer together (loss fusion; Dong et al., CVPR 2018).
    """

    members: bool = False
    needs: str = field(default="gradient", init=False)
    draws: int = field(default=1, init=False)

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return what has to surround a call of `model`: nothing."""
        del model
        return nullcontext()

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return logits, values and exact gradients."""
        return _value_and_grads(port, x, index, heads, 1, self.members)


@dataclass(frozen=True)
class BPDA:
    """Backward pass differentiable approximation (Athalye et al., ICML 2018).

    Every module with a `bpda_partner(x)` method (or named in `partners`: module name -> function of its input) keeps
    its own forward value but takes its derivative from the partner. With `every` False only those do that declare
    themselves `broken` (or are named): the derivative of the others is their own. A module that declares itself
    `lifted` hides gradients and nothing else, so its partner's value is taken as well. `members` as for Exact.
    """

    partners: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    every: bool = True
    members: bool = False
    needs: str = field(default="gradient", init=False)
    draws: int = field(default=1, init=False)

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return what has to surround a call of `model`: the partners in their places."""
        return straight_through(model, self.partners or {}, self.every)

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return logits, values and gradients through the partners."""
        with self.around(port.model):
            return _value_and_grads(port, x, index, heads, 1, self.members)


_own: ContextVar[bool] = ContextVar("maodun_own_derivative", default=False)


@contextmanager
def own_derivative() -> Iterator[None]:
    """Leave every module its own derivative, whatever an adversary takes in its place, while the context lasts.

    For defences that differentiate what stands behind them: what they do must not depend on who is looking.
    """
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)


@contextmanager
def straight_through(
    model: nn.Module, partners: Mapping[str, Callable[[Tensor], Tensor]], every: bool = True
) -> Iterator[None]:
    """Give every module that has a partner its partner's derivative for as long as the context lasts.

    With `every` False only those that declare themselves `broken`, besides the ones named in `partners`.
    """

    def hook(partner: Callable[[Tensor], Tensor]) -> Callable[..., Tensor | None]:
        def replace(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if _own.get():
                return None
            smooth = partner(inputs[0])
            return smooth if getattr(module, "lifted", False) else smooth + (output - smooth).detach()

        return replace

    with ExitStack() as stack:
        for name, module in model.named_modules():
            own = getattr(module, "bpda_partner", None) if every or getattr(module, "broken", False) else None
            partner = partners.get(name, own)
            if partner is not None:
                stack.callback(module.register_forward_hook(hook(partner)).remove)
        yield


@dataclass(frozen=True)
class Surrogate:
    """The gradient of a cheaper process: every module that offers one runs it, and is differentiated exactly.

    A module offers it as a context manager `surrogate_process(steps)`; modules without stand as they are. `steps` 0
    leaves the number to the module. The logits are the cheaper process's as well, so what the search finds is confirmed
    on the model itself (Lee and Kim, ICCV 2023).
    """

    steps: int = 0
    members: bool = False
    needs: str = field(default="gradient", init=False)
    draws: int = field(default=1, init=False)

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return what has to surround a call of `model`: the cheaper processes."""
        return _processes(model, "surrogate_process", self.steps)

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return logits, values and gradients of the cheaper process."""
        with self.around(port.model):
            return _value_and_grads(port, x, index, heads, 1, self.members)


@dataclass(frozen=True)
class Adjoint(Surrogate):
    """The continuous adjoint of every module that has one (a context manager `adjoint_process(steps)`).

    It solves an equation backwards instead of differentiating what was computed, so on coarse grids it is wrong: kept
    to reproduce how purification used to be evaluated, not to be relied on.
    """

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return what has to surround a call of `model`: the adjoint processes."""
        return _processes(model, "adjoint_process", self.steps)


@contextmanager
def _processes(model: nn.Module, name: str, steps: int) -> Iterator[None]:
    """Let every module that offers the process `name` run it for as long as the context lasts."""
    with ExitStack() as stack:
        for module in model.modules():
            offer = getattr(module, name, None)
            if offer is not None:
                stack.enter_context(offer(steps))
        yield


@dataclass(frozen=True)
class EOT:
    """Expectation over transformation: the mean gradient of the loss over `draws` draws (Athalye et al., ICML 2018).

    The mean is of losses and gradients, not the loss of mean logits; the logits returned are the mean. `inner` is
    Exact(), BPDA(), Surrogate() or Adjoint(). As many draws pass through the model at once as fit a micro-batch.
    """

    inner: Exact | BPDA | Surrogate = field(default_factory=Exact)
    draws: int = 20
    needs: str = field(default="gradient", init=False)

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return mean logits, mean values and mean gradients over the draws."""
        rows, done, sums = x.shape[0], 0, None
        with self.inner.around(port.model):
            while done < self.draws:
                ahead = min(self.draws - done, max(1, port.batch_size // rows))
                wide = index.repeat_interleave(ahead)
                logits, values, grads = _value_and_grads(
                    port, x.repeat_interleave(ahead, 0), wide, heads, ahead, self.inner.members
                )
                found = [each.reshape(rows, ahead, *each.shape[1:]).sum(1) for each in (logits, values, *grads)]
                sums = found if sums is None else [old + new for old, new in zip(sums, found, strict=True)]
                done += ahead
        if sums is None:
            raise InputError(f"eot {self.draws}", "there has to be at least one draw", "use 20")
        logits, values, *grads = [each / self.draws for each in sums]
        return logits, values, grads


@dataclass(frozen=True)
class _FiniteDifferences:
    samples: int = 64
    sigma: float = 0.001
    needs: str = field(default="scores", init=False)
    draws: int = field(default=1, init=False)

    def _directions(self, stream: Stream, ids: Tensor, shape: tuple[int, ...], step: Tensor) -> Tensor:
        raise NotImplementedError("a subclass draws the directions")

    @property
    def pairs(self) -> int:
        """The antithetic pairs of one estimate."""
        return max(1, self.samples // 2)

    def _slopes(self, port: Port, x: Tensor, index: Tensor, heads: Heads, u: Tensor, ahead: int) -> Tensor:
        """Return B x ahead x K differences between the heads at x + sigma u and x - sigma u, in one forward."""
        step = (self.sigma * u).reshape(x.shape[0], ahead, *x.shape[1:])
        probes = torch.stack([x.unsqueeze(1) + step, x.unsqueeze(1) - step], dim=2).flatten(0, 2).clamp_(0.0, 1.0)
        wide = index.repeat_interleave(2 * ahead)
        values = heads(port.forward(probes, wide, 2 * ahead), wide).reshape(x.shape[0], ahead, 2, -1)
        slopes: Tensor = values[:, :, 0] - values[:, :, 1]
        return slopes

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return logits, values and gradients estimated from 2 * (samples // 2) further queries per row."""
        with torch.no_grad():
            logits = port.forward(x, index)
            values = heads(logits, index)
            grads = [torch.zeros_like(x) for _ in range(values.shape[1])]
            stream, ids, first = port.noise(type(self).__name__), port.ids(index), port.calls(index)
            done, pairs = 0, self.pairs
            while done < pairs:
                # As many pairs at once as fill a micro-batch: a few rows do not wait for as many calls as draws.
                ahead = min(pairs - done, max(1, port.batch_size // (2 * max(1, x.shape[0]))))
                steps = first.repeat_interleave(ahead) + 2 * torch.arange(done, done + ahead, device=x.device).repeat(
                    x.shape[0]
                )
                u = self._directions(stream, ids.repeat_interleave(ahead), tuple(x.shape[1:]), steps).to(x)
                weight = self._slopes(port, x, index, heads, u, ahead) / (2.0 * self.sigma * pairs)
                u = u.reshape(x.shape[0], ahead, *x.shape[1:])
                for pair in range(ahead):
                    for k, grad in enumerate(grads):
                        grad.addcmul_(u[:, pair], weight[:, pair, k].reshape(-1, *([1] * (x.ndim - 1))))
                done += ahead
        return logits, values, grads


@dataclass(frozen=True)
class NES(_FiniteDifferences):
    """Natural evolution strategies: antithetic Gaussian finite differences (Ilyas et al., ICML 2018).

    `samples` queries per estimate (in pairs), smoothing `sigma` in input units. Each row's loss is its own: nothing
    is summed over the batch. Probes are clipped to [0, 1], as a deployed model would insist.
    """

    def _directions(self, stream: Stream, ids: Tensor, shape: tuple[int, ...], step: Tensor) -> Tensor:
        return stream.coarse_normal(ids, shape, step)


@dataclass(frozen=True)
class SPSA(_FiniteDifferences):
    """Simultaneous perturbation: antithetic Rademacher finite differences (Spall, 1992; Uesato et al., ICML 2018)."""

    samples: int = 128
    sigma: float = 0.01

    def _directions(self, stream: Stream, ids: Tensor, shape: tuple[int, ...], step: Tensor) -> Tensor:
        return stream.signs(ids, shape, step)
