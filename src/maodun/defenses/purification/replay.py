"""The exact gradient of a long stochastic chain: keep the states only, replay the noise, recompute one step at a time.

The idea is DiffGrad's (DiffBreak, NeurIPS 2025), the formulation ours. Ordinary autograd keeps the activations of every
network evaluation; here the forward pass keeps nothing but the states between the steps, and the backward pass
goes through them from the last to the first, redraws the noise of each step, recomputes that one step and takes its
derivative. Noise is a function of (seed, sample, draw, purpose), levels are looked up by integer index and steps are
pure, so the recomputed states are the old ones bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.purification.samplers import State

PLACES = ("device", "cpu", "disk")
Move = tuple[int, int]


class Chain(Protocol):
    """What can be replayed: pure moves between states, whose noise can be drawn again.

    A state is a tuple of tensors, the first being the image. `guide` are tensors that every move may look at, functions
    of the input: the gradient flows through them as well, and through whatever derivative a move takes inside.
    """

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        """Return the noise of move `i`, which starts at level `t`, for rows like those of `x`."""

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State) -> State:
        """Return the state after the move from level `t` to level `s`."""


class Way(Protocol):
    """A way to run a chain and to differentiate it."""

    def run(self, chain: Chain, moves: Sequence[Move], start: State, guide: State) -> Tensor:
        """Return the first tensor of the last state."""


def move(chain: Chain, moves: Sequence[Move], i: int, state: State, guide: State) -> State:
    """Return the state after move `i`, with whatever graph the current mode of autograd records."""
    t, s = moves[i]
    return chain.advance(state, t, s, chain.draw(state[0].detach(), i, t), guide)


@dataclass(frozen=True)
class Plain:
    """Ordinary autograd through the whole chain: the same gradient, with memory that grows with every step."""

    def run(self, chain: Chain, moves: Sequence[Move], start: State, guide: State) -> Tensor:
        """Return the end of the chain."""
        state = start
        for i in range(len(moves)):
            state = move(chain, moves, i, state, guide)
        return state[0]


@dataclass(frozen=True)
class Replay:
    """The exact gradient at the memory of one step, for one recomputation more.

    `keep` says where the states wait for the backward pass: on the "device", in "cpu" memory or on "disk" (a temporary
    file that vanishes with the graph), always in their own precision, since a rounded state would be another state.
    `check` compares every recomputed state with the kept one and raises ReplayError unless they are equal bit for bit.
    Only the start and the guide receive gradients: parameters are taken as frozen, and a second derivative of
    the whole is refused by autograd. InputError for an unknown place.
    """

    keep: str = "device"
    check: bool = False

    def __post_init__(self) -> None:
        if self.keep not in PLACES:
            raise InputError(f"keep '{self.keep}'", "states are kept elsewhere", "use one of " + ", ".join(PLACES))

    def run(self, chain: Chain, moves: Sequence[Move], start: State, guide: State) -> Tensor:
        """Return the end of the chain; inside a draw the noise can be replayed, outside of any it gets one."""
        live = torch.is_grad_enabled() and any(each.requires_grad for each in (*start, *guide))
        with context.ensured(start[0]):
            if not live:
                return Plain().run(chain, moves, start, guide)
            out: Tensor = _Replayed.apply(self, chain, tuple(moves), len(start), *start, *guide)  # type: ignore[no-untyped-call]
        return out


class ReplayError(RuntimeError):
    """A recomputed state is not the one that the forward pass went through, so the gradient would be of another map."""


class _Kept:
    """The states of one forward pass, in the order of the chain."""

    def __init__(self, place: str) -> None:
        self.place = place
        # Closed, and thereby deleted, with the graph that holds it.
        self.file: Any = tempfile.TemporaryFile() if place == "disk" else None  # noqa: SIM115
        self.states: list[list[Any]] = []

    def put(self, state: State) -> None:
        """Keep a state."""
        tensors = [each.detach() for each in state]
        if self.place == "device":
            self.states.append(tensors)
        elif self.place == "cpu":
            self.states.append([each.to("cpu", copy=True) for each in tensors])
        else:
            self.states.append([self._write(each) for each in tensors])

    def get(self, number: int, like: Tensor) -> State:
        """Return a state on the device of `like`, with the values and strides it had."""
        kept = self.states[number]
        tensors = [self._read(*each) for each in kept] if self.place == "disk" else kept
        return tuple(each.detach() if each.device == like.device else each.to(like.device) for each in tensors)

    def _write(self, tensor: Tensor) -> tuple[int, Tensor]:
        place: int = self.file.tell()
        self.file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return place, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def _read(self, place: int, form: Tensor) -> Tensor:
        self.file.seek(place)
        data = np.frombuffer(bytearray(self.file.read(form.numel() * form.element_size())), dtype=np.uint8)
        self.file.seek(0, 2)
        flat = torch.from_numpy(data).view(form.dtype).reshape(form.shape)
        return torch.empty_strided(form.shape, form.stride(), dtype=form.dtype).copy_(flat)


class Scene:
    """The surroundings of a forward pass that a backward pass has to find again: the draw and autocast."""

    def __init__(self, x: Tensor) -> None:
        self.draw, self.kind = context.current(), x.device.type
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind)

    @contextmanager
    def set(self) -> Iterator[None]:
        """Be in the same surroundings.

        Autocast's cache of casts would tie steps together: memory that grows with them, and sums in another order.
        """
        with ExitStack() as stack:
            if self.draw is not None:
                stack.enter_context(context.draw(self.draw.stream, self.draw.ids, self.draw.number))
            stack.enter_context(torch.autocast(self.kind, self.dtype, enabled=self.autocast, cache_enabled=False))
            yield


class _Replayed(torch.autograd.Function):
    """The chain as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, how: Replay, chain: Chain, moves: tuple[Move, ...], width: int, *inputs: Tensor) -> Tensor:
        start, guide = inputs[:width], inputs[width:]
        ctx.how, ctx.chain, ctx.moves, ctx.width = how, chain, moves, width
        ctx.scene, ctx.kept = Scene(start[0]), _Kept(how.keep)
        ctx.save_for_backward(*guide)
        state: State = start
        ctx.kept.put(state)
        with ctx.scene.set():
            for i in range(len(moves)):
                state = move(chain, moves, i, state, guide)
                if i + 1 < len(moves) or how.check:
                    ctx.kept.put(state)
        # A chain without moves would hand back its own input, which autograd does not take for an output.
        return state[0].clone() if state[0] is start[0] else state[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        guide = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in ctx.saved_tensors)
        grads: tuple[Tensor | None, ...] = (grad,)
        sums: list[Tensor | None] = [None] * len(guide)
        with ctx.scene.set():
            for i in reversed(range(len(ctx.moves))):
                state = tuple(each.requires_grad_(each.is_floating_point()) for each in ctx.kept.get(i, grad))
                grads, more = _step_back(ctx, i, state, guide, grads)
                sums = [
                    new if old is None else old if new is None else old + new
                    for old, new in zip(sums, more, strict=True)
                ]
        return None, None, None, None, *grads, *sums


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if old is None else old if new is None else old + new


def _step_back(
    ctx: Any, i: int, state: State, guide: State, grads: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Return the gradients of the state before move `i` and of the guide, from those of the state after it."""
    with torch.enable_grad():
        after = move(ctx.chain, ctx.moves, i, state, guide)
    if ctx.how.check:
        for old, new in zip(ctx.kept.get(i + 1, state[0]), after, strict=True):
            if not torch.equal(old, new.detach()):
                gap = float((old - new).abs().max())
                raise ReplayError(f"move {i} {ctx.moves[i]}: the recomputed state differs by up to {gap:.3g}")
    pairs = [(out, g) for out, g in zip_longest(after, grads) if out is not None and g is not None]
    pairs = [(out, g) for out, g in pairs if out.requires_grad]
    if not pairs:
        return (None,) * len(state), (None,) * len(guide)
    wanted = [each for each in (*state, *guide) if each.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    by_id = {id(each): g for each, g in zip(wanted, found, strict=True)}
    return tuple(by_id.get(id(each)) for each in state), tuple(by_id.get(id(each)) for each in guide)


__all__ = ["Chain", "Plain", "Replay", "ReplayError", "Scene", "Way", "move"]
