"""One training loop for every objective, on Lightning Fabric: deterministic, resumable, never looking at test data."""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.training.augment import CutMix, NoAugmentation, ShiftFlip
from maodun.defenses.training.memory import Memory
from maodun.defenses.training.norms import refresh_norms
from maodun.defenses.training.objective import Batch, Objective, Replaying, takes_mixed
from maodun.defenses.training.settings import FitSettings, Precision, optimiser_of, set_rate


@dataclass(frozen=True)
class FitReport:
    """What came of a training run: `history` holds per epoch the mean loss, the validation score and the seconds;
    `best_epoch` counts from 0 and is the epoch whose weights the model holds now; `score` is its validation score.
    """

    history: tuple[dict[str, float], ...]
    best_epoch: int
    score: float


def split_holdout(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return (kept rows, held-out rows) of `y` (N,), stratified: `share` in (0, 1) of every class is held out."""
    if not 0 < share < 1:
        raise InputError(f"validation share {share}", "it must leave samples on both sides", "use for example 0.1")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(y.shape[0], dtype=torch.bool)
    for label in torch.unique(y):
        members = (y == label).nonzero()[:, 0]
        order = torch.randperm(members.numel(), generator=generator)
        held[members[order[: max(1, round(share * members.numel()))]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    settings: FitSettings,
    *,
    validate: Callable[[nn.Module], float],
    augment: NoAugmentation | ShiftFlip | CutMix | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    label: str = "",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> FitReport:
    """Train `model` in place on x (N x ... in [0, 1]) and y (N,), and leave the best epoch's weights in it.

    `validate` scores a model in evaluation mode, higher is better; it must use samples held out of `x`, never the test
    set. `checkpoint` is a file written whole after every epoch (temporary name, then renamed); a second call with the
    same arguments continues after the last one; `label` tells runs apart whose settings agree. Order, augmentation,
    inner attacks and dropout are functions of `seed` and the epoch, so a continued run equals an undisturbed one.
    Started by torchrun, every process takes its share of each batch and gradients are averaged: the same steps up to
    rounding, except that batch norm, and objectives with a memory, see the shares; the first process validates and
    writes. A GPU is used where there is one; on a CPU the convolutions' weights are laid out channels-last for the
    length of the run. `on_epoch` gets each epoch's line, `on_step` how many batches are done and how many there are.
    Returns a FitReport. Errors: InputError when lightning-fabric is missing, the loss is not finite, the checkpoint is
    of other settings, or the objective cannot do what `settings` or `augment` ask.
    """
    _refuse(objective, settings, augment)
    fabric = _fabric(settings.precision)
    home = next(model.parameters()).device
    laid_out = _prepare(model, settings, fabric.device)
    wrapped, optimiser = fabric.setup(model, optimiser_of(model, settings))
    memory = Memory(model, optimiser, settings, f"seed {seed} {label}", objective)
    if checkpoint is not None and checkpoint.exists():
        memory.load(checkpoint)
    stepper = _Stepper(fabric, wrapped, model, optimiser, objective, settings, memory)
    samples = min(settings.samples or x.shape[0], x.shape[0])
    least = 2 * int(fabric.world_size)
    per_epoch = len(_batches(torch.arange(samples), settings.batch_size, least))
    for epoch in range(memory.epoch, settings.epochs):
        began, total = time.perf_counter(), 0.0
        model.train()
        order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed * 100_003 + epoch))[:samples]
        for number, rows in enumerate(_batches(order, settings.batch_size, least)):
            place = epoch * per_epoch + number
            set_rate(optimiser, settings.rate_at(place / (settings.epochs * per_epoch)) * 0.5**memory.setbacks)
            total += stepper.batch(x, y, rows, place, epoch, augment or NoAugmentation(), seed) * rows.numel()
            if on_step is not None and fabric.is_global_zero:
                on_step(place + 1, settings.epochs * per_epoch)
        line = {"epoch": float(epoch), "loss": total / samples}
        memory.gather(epoch)
        line["score"] = memory.score(
            lambda net: fabric.broadcast(validate(net) if fabric.is_global_zero else 0.0),
            partial(refresh_norms, x=x, batch_size=settings.batch_size),
        )
        if settings.guard:
            line["setbacks"] = float(memory.setbacks)
        line["seconds"] = time.perf_counter() - began
        memory.record(line)
        if fabric.is_global_zero:
            if checkpoint is not None:
                memory.save(checkpoint)
            if on_epoch is not None:
                on_epoch(line)
        fabric.barrier()
    model.load_state_dict(memory.best)
    for weight in laid_out:
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    model.to(home).eval()
    return FitReport(tuple(memory.history), memory.best_epoch, memory.best_score)


def _batches(order: Tensor, size: int, least: int) -> list[Tensor]:
    """Return the rows `order` in parts of `size`; a last one of fewer than `least` goes with the one before it.

    A batch norm has nothing to say of one sample, and no process may be left without any.
    """
    parts = list(torch.split(order, size))
    return parts if len(parts) < 2 or parts[-1].numel() >= least else [*parts[:-2], torch.cat(parts[-2:])]


def _prepare(model: nn.Module, settings: FitSettings, device: torch.device) -> list[Tensor]:
    """Arrange the model for speed; return the weights whose layout is changed for the length of the run only."""
    laid_out = []
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif device.type == "cpu":
        # Both passes of a step are cheaper so, those of the inner attacks too (docs/measured.md, speed of training).
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
        laid_out = [weight for weight in dict.fromkeys(weights) if weight.is_contiguous()]
        for weight in laid_out:
            weight.data = weight.data.to(memory_format=torch.channels_last)
    if settings.compile is not None:
        # In place: the names of the weights stay, and inner attacks call the compiled model too.
        model.compile(backend=settings.compile)
    return laid_out


def _refuse(objective: Objective, settings: FitSettings, augment: NoAugmentation | ShiftFlip | CutMix | None) -> None:
    """Refuse, before any work, settings that the objective cannot follow."""
    if isinstance(objective, Replaying) and settings.accumulate > 1:
        raise InputError("accumulate", "an objective that replays its batch keeps it whole", "leave accumulate at 1")
    if isinstance(augment, CutMix) and not takes_mixed(objective):
        name = type(objective).__name__
        raise InputError("cutmix", f"it mixes labels, and {name} asks whether one is answered rightly", "leave it out")
    if settings.compile is not None and getattr(objective, "reaches_inside", False):
        name = type(objective).__name__
        raise InputError("compile", f"{name} reaches into the model, which a compiled one hides", "leave compile out")


@dataclass(frozen=True)
class _Stepper:
    """One optimiser step after another: a batch shared out over processes and parts, replays, clipping, averaging."""

    fabric: Any
    wrapped: nn.Module
    model: nn.Module
    optimiser: Any
    objective: Objective
    settings: FitSettings
    memory: Memory

    def batch(
        self,
        x: Tensor,
        y: Tensor,
        rows: Tensor,
        place: int,
        epoch: int,
        augment: NoAugmentation | ShiftFlip | CutMix,
        seed: int,
    ) -> float:
        """Take the steps of one batch, the `place`-th of the run, and return its (last) mean loss."""
        fabric, replays = self.fabric, self.objective.replays if isinstance(self.objective, Replaying) else 1
        mine = rows[fabric.global_rank :: fabric.world_size]
        parts = []
        for part in torch.split(mine, max(1, math.ceil(mine.numel() / self.settings.accumulate))):
            if isinstance(augment, CutMix):
                inputs, mixed = augment.mix(x, y, part, epoch, seed)
                labels, shares = mixed.argmax(1), mixed.to(fabric.device)
            else:
                inputs, labels, shares = augment(x[part], part, epoch, seed), y[part], None
            # A mean over processes of sums over parts of weighted means is the mean over the batch.
            share = part.numel() * fabric.world_size / rows.numel()
            inputs, labels, ids = (each.to(fabric.device) for each in (inputs, labels, part))
            parts.append((Batch(inputs, labels, ids, place * replays, shares), share))
        value = 0.0
        for replay in range(replays):
            value = self._step(parts, replay, seed)
            if not math.isfinite(value):
                # Before the step, so that the weights of the last good one are still whole.
                where = f"epoch {epoch}, step {place * replays + replay}"
                raise InputError(where, f"the loss is {value}", "lower the rate, or set clip; --resume goes on")
            if self.settings.clip is not None:
                fabric.clip_gradients(self.wrapped, self.optimiser, max_norm=self.settings.clip)
            self.optimiser.step()
            self.memory.follow(self.model)
        return value

    def _step(self, parts: list[tuple[Batch, float]], replay: int, seed: int) -> float:
        """Add up the gradients of all parts and return the mean loss over parts and processes."""
        self.optimiser.zero_grad()
        value = torch.zeros((), device=self.fabric.device)
        for number, (first, share) in enumerate(parts):
            batch = replace(first, step=first.step + replay)
            wait = self.fabric.no_backward_sync(self.wrapped, enabled=number + 1 < len(parts))
            place = f"{batch.step}/{number}/{self.fabric.global_rank}"
            with wait, _drawing(Stream(seed, f"train/torch/{place}"), self.fabric.device):
                loss = self.objective(self.wrapped, batch)
                self.fabric.backward(loss * share if share != 1.0 else loss)
            if isinstance(self.objective, Replaying):
                self.objective.after_backward(batch)
            value += loss.detach() * share
        return float(self.fabric.all_reduce(value, reduce_op="mean"))


@contextmanager
def _drawing(stream: Stream, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators, which dropout draws from, with the key of `stream`, and give them back.

    So a step draws what it would have drawn in a run that was never stopped.
    """
    high, low = stream.key
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(high << 32 | low)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(high << 32 | low)
        yield


def _fabric(precision: Precision) -> Any:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise InputError("training", "lightning-fabric is not installed", "pip install 'maodun[train]'") from error
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Fabric(accelerator=kind, devices=1, precision=precision)
    nodes = int(os.environ["WORLD_SIZE"]) // processes
    # Buffers stay each process's own: an objective passes through the model several times before it goes back.
    strategy = DDPStrategy(broadcast_buffers=False)
    fabric = Fabric(accelerator=kind, devices=processes, num_nodes=nodes, strategy=strategy, precision=precision)
    fabric.launch()
    # gloo's threads hold tensors; torn down with the interpreter they abort the process and torchrun calls it failed.
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
