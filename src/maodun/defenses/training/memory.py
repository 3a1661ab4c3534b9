"""What a training run must remember between epochs, and the checkpoint that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.files import load_checkpoint, save_whole
from maodun.defenses.training.objective import Learning, Objective
from maodun.defenses.training.settings import FitSettings


class Memory:
    """What a run must remember between epochs: weights, their running mean, momentum, history and the best so far."""

    def __init__(
        self, model: nn.Module, optimiser: Any, settings: FitSettings, identity: str, objective: Objective
    ) -> None:
        self.model, self.optimiser, self.decay, self.guard = model, optimiser, settings.average, settings.guard
        self.first = settings.first_averaged
        self.learning = objective if isinstance(objective, Learning) else None
        # Only what was chosen: a new setting leaves the checkpoints of those who do not use it good.
        chosen = sorted(item for item in asdict(settings).items() if item not in asdict(FitSettings()).items())
        self.signature = f"{chosen!r} {identity}"
        self.mean = _copy(model)
        self.best, self.best_epoch, self.best_score = _copy(model), -1, -math.inf
        self.history: list[dict[str, float]] = []
        self.steps = self.setbacks = self.gathered = 0

    @property
    def epoch(self) -> int:
        """The number of epochs that are over."""
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

    def gather(self, epoch: int) -> None:
        """Fold the weights that `epoch` has ended with into the plain mean, where one is kept (swa)."""
        if self.first is None or epoch < self.first:
            return
        self.gathered += 1
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.mean[name].lerp_(value, 1 / self.gathered)
                else:
                    self.mean[name].copy_(value)

    def score(self, validate: Callable[[nn.Module], float], refresh: Callable[[nn.Module], None]) -> float:
        """Return the validation score of the weights that would be kept; `refresh` takes a mean's norms anew."""
        own = _copy(self.model)
        if self.decay or self.gathered:
            self.model.load_state_dict(self.mean)
        if self.gathered:
            refresh(self.model)
        self.model.eval()
        value = validate(self.model)
        if value >= self.best_score:
            self.best, self.best_epoch, self.best_score = _copy(self.model), self.epoch, value
        self.model.load_state_dict(own)
        if self.guard and value < self.guard * self.best_score:
            self._undo()
        return value

    def _undo(self) -> None:
        """Go back to the best weights after a collapse: momentum is forgotten, and the rate will be halved."""
        self.model.load_state_dict(self.best)
        self.mean = {name: tensor.clone() for name, tensor in self.best.items()}
        self.gathered = min(self.gathered, 1)
        self.optimiser.state.clear()
        self.setbacks += 1

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
            "setbacks": self.setbacks,
            "gathered": self.gathered,
            "learnt": {} if self.learning is None else self.learning.state(),
        }
        save_whole(path, content)

    def load(self, path: Path) -> None:
        """Continue from `path`."""
        content = load_checkpoint(path)
        if content["signature"] != self.signature:
            raise InputError(
                f"checkpoint '{path}'", "it is of another recipe or other settings", "remove it, or use another folder"
            )
        self.model.load_state_dict(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.mean, self.best = content["mean"], content["best"]
        self.best_epoch, self.best_score = content["best_epoch"], content["best_score"]
        self.history, self.steps, self.setbacks = content["history"], content["steps"], content["setbacks"]
        self.gathered = content["gathered"]
        if self.learning is not None:
            self.learning.restore(content["learnt"])


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
