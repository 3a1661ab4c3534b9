"""One training loop for every objective, on Lightning Fabric: deterministic, resumable, never looking at test data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.defenses.training.augment import NoAugmentation, ShiftFlip
from maodun.defenses.training.objective import Batch, Learning, Objective, Replaying


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to train: SGD with Nesterov momentum under a one-cycle rate (linear up for `warmup` of the steps, then down).

    `rate` is the peak learning rate, `decay` the weight decay (biases and norms included), `clip` the largest gradient
    norm (None for none), `precision` "32-true" or "bf16-mixed", `average` the decay of the running mean of the weights
    that is validated and kept (0 keeps the weights themselves).
    """

    epochs: int = 30
    batch_size: int = 128
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    warmup: float = 0.2
    clip: float | None = None
    average: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    channels_last: bool = False


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
    augment: NoAugmentation | ShiftFlip | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitReport:
    """Train `model` in place on x (N x ... in [0, 1]) and y (N,), and leave the best epoch's weights in it.

    `validate` scores a model in evaluation mode, higher is better; it must use samples held out of `x`, never the test
    set. `checkpoint` is a file written whole after every epoch (temporary name, then renamed); a second call with the
    same arguments continues after the last one. Order, augmentation and inner attacks are functions of `seed` and the
    epoch, so a continued run equals an undisturbed one. Returns a FitReport.
    Errors: InputError when lightning-fabric is missing, the loss turns NaN, or the checkpoint is of other settings.
    """
    fabric = _fabric(settings.precision)
    augment = augment or NoAugmentation()
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped, optimiser = fabric.setup(model, _optimiser(model, settings))
    state = _State(model, optimiser, settings, seed, objective)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
    per_epoch = math.ceil(x.shape[0] / settings.batch_size)
    replays = objective.replays if isinstance(objective, Replaying) else 1
    for epoch in range(state.epoch, settings.epochs):
        began, total = time.perf_counter(), 0.0
        model.train()
        order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        for number, rows in enumerate(torch.split(order, settings.batch_size)):
            place = epoch * per_epoch + number
            _set_rate(optimiser, settings, place / (settings.epochs * per_epoch))
            inputs = augment(x[rows], rows, epoch, seed)
            for replay in range(replays):
                batch = Batch(inputs, y[rows], rows, place * replays + replay)
                loss = objective(wrapped, batch)
                optimiser.zero_grad()
                fabric.backward(loss)
                if isinstance(objective, Replaying):
                    objective.after_backward(batch)
                if settings.clip is not None:
                    fabric.clip_gradients(wrapped, optimiser, max_norm=settings.clip)
                value = float(loss.detach())
                if not math.isfinite(value):
                    # Before the step, so that the weights of the last good one are still whole.
                    where = f"epoch {epoch}, step {batch.step}"
                    raise InputError(where, f"the loss is {value}", "lower the rate, or set clip; --resume goes on")
                optimiser.step()
                state.follow(model)
            total += value * rows.numel()
        line = {"epoch": float(epoch), "loss": total / x.shape[0]}
        line |= {"score": state.score(validate), "seconds": time.perf_counter() - began}
        state.record(line)
        if checkpoint is not None:
            state.save(checkpoint)
        if on_epoch is not None:
            on_epoch(line)
    model.load_state_dict(state.best)
    model.eval()
    return FitReport(tuple(state.history), state.best_epoch, state.best_score)


class _State:
    """What a run must remember between epochs: weights, their running mean, momentum, history and the best so far."""

    def __init__(
        self, model: nn.Module, optimiser: Any, settings: FitSettings, seed: int, objective: Objective
    ) -> None:
        self.model, self.optimiser, self.decay = model, optimiser, settings.average
        self.learning = objective if isinstance(objective, Learning) else None
        self.signature = repr(sorted(asdict(settings).items())) + f" seed {seed}"
        self.mean = _copy(model)
        self.best, self.best_epoch, self.best_score = _copy(model), -1, -math.inf
        self.history: list[dict[str, float]] = []
        self.steps = 0

    @property
    def epoch(self) -> int:
        return len(self.history)

    def follow(self, model: nn.Module) -> None:
        """Move the running mean towards the weights; buffers and the first steps are followed closely."""
        self.steps += 1
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    self.mean[name].lerp_(value, 1 - decay)
                else:
                    self.mean[name].copy_(value)

    def score(self, validate: Callable[[nn.Module], float]) -> float:
        """Return the validation score of the weights that would be kept."""
        own = _copy(self.model)
        if self.decay:
            self.model.load_state_dict(self.mean)
        self.model.eval()
        value = validate(self.model)
        if value >= self.best_score:
            self.best, self.best_epoch, self.best_score = _copy(self.model), self.epoch, value
        self.model.load_state_dict(own)
        return value

    def record(self, line: dict[str, float]) -> None:
        """Append one epoch's line to the history."""
        self.history.append(line)

    def save(self, path: Path) -> None:
        """Write everything to `path` at once: whole or not at all."""
        content = {
            "signature": self.signature,
            "model": self.model.state_dict(),
            "mean": self.mean,
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "history": self.history,
            "steps": self.steps,
            "learnt": {} if self.learning is None else self.learning.state(),
        }
        temporary = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from `path`."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["signature"] != self.signature:
            raise InputError(
                f"checkpoint '{path}'", "it was written under other settings", "remove it, or use another file"
            )
        self.model.load_state_dict(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.mean, self.best = content["mean"], content["best"]
        self.best_epoch, self.best_score = content["best_epoch"], content["best_score"]
        self.history, self.steps = content["history"], content["steps"]
        if self.learning is not None:
            self.learning.restore(content["learnt"])


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _fabric(precision: Literal["32-true", "bf16-mixed"]) -> Any:
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise InputError("training", "lightning-fabric is not installed", "pip install 'maodun[train]'") from error
    return Fabric(accelerator="cpu", devices=1, precision=precision)


def _optimiser(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.decay,
    )


def _set_rate(optimiser: Any, settings: FitSettings, done: float) -> None:
    """Set the one-cycle learning rate after the share `done` in [0, 1) of all steps."""
    up, down = done / max(settings.warmup, 1e-9), (1 - done) / max(1 - settings.warmup, 1e-9)
    for group in optimiser.param_groups:
        group["lr"] = settings.rate * min(1.0, up + 1e-3, down)
