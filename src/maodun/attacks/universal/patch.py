"""Adversarial patches: a small picture that, wherever it lies in the image, decides the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from maodun.attacks.artifacts import TrainedAttack, TrainedState
from maodun.attacks.universal.placement import Placement
from maodun.attacks.universal.training import Line, Task, UniversalFit, learn, provenance, training_set
from maodun.attacks.universal.uap import refuse_other_targets
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.problem import Problem
from maodun.core.streams import Stream
from maodun.core.threat import Threat


@dataclass(frozen=True, kw_only=True)
class Patch(TrainedAttack):
    """A picture, trained beforehand, covers a small part of every image (Brown et al., 2017).

    `train_patch` makes it. Images N x C x H x W in [0, 1]. The threat is l0, the entries (pixels times channels) that
    may be changed at will: the ball holds every patch of that many entries at every place, and more, so a defence that
    withstands it withstands the patch. `eps` is the most entries the patch can cover; a threat that allows fewer is
    refused. `side`, `form`, `scale`, `rotation`, `lighting` and `at` are those of `Placement` and may be changed after
    training; placements are drawn per image. `draws` is the most placements tried per image: with 1, success is the
    share of images at random placements. `target` is the class it was trained for (None: any other). Costs a forward
    per draw.
    """

    name: ClassVar[str] = "patch"
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    images_only: ClassVar[bool] = True

    norm: str = "l0"
    side: int
    form: str = "square"
    scale: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    lighting: float = 0.0
    at: tuple[float, float] | None = None
    draws: int = 1
    target: int | None = None

    def __post_init__(self) -> None:
        self.placement.check(tuple(self.shape))
        wanted, patch = (self.shape[0], self.side, self.side), self.tensors.get("patch")
        if patch is None or tuple(patch.shape) != wanted:
            given = "none" if patch is None else str(tuple(patch.shape))
            raise InputError("attack 'patch'", f"needs a tensor patch of {wanted}, got {given}", "train it again")
        if self.draws < 1:
            raise InputError(f"draws {self.draws}", "makes no candidate", "give at least 1")
        super().__post_init__()

    @cached_property
    def placement(self) -> Placement:
        """Where and how it may stand."""
        return Placement(
            side=self.side,
            form=self.form,
            scale=self.scale,
            rotation=self.rotation,
            lighting=self.lighting,
            at=self.at,
        )

    @property
    def entries(self) -> int:
        """The most entries of an image that the patch can cover."""
        return self.shape[0] * self.placement.pixels

    @property
    def tries(self) -> int:
        """As many placements as `draws`."""
        return self.draws

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse another shape or norm, fewer entries than it covers, and targets unless it was trained for one."""
        super().check(x, replace(threat, targeted=False) if self.target is not None else threat)
        if threat.eps < self.entries:
            reason = f"covers up to {self.entries} entries and the threat allows {threat.eps:g}"
            raise InputError("attack 'patch'", reason, f"give --norm l0 --eps {self.entries}, or train a smaller one")

    def init(self, problem: Problem) -> TrainedState:
        """Start at the clean image; refuse to be asked for another class than its own."""
        refuse_other_targets(self.name, problem.targets, self.target)
        return super().init(problem)

    def craft(self, x: Tensor, ids: Tensor, stream: Stream, eps: float, number: int) -> Tensor:  # noqa: ARG002
        """Return the images with the patch on them, placed by the `number`-th draw of each id."""
        return self.placement.put(self.tensors["patch"].to(x), x, stream, ids, number)


def train_patch(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    placement: Placement,
    fit: UniversalFit | None = None,
    *,
    target: int | None = None,
    ids: Tensor | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Line], None] | None = None,
    about: dict[str, Any] | None = None,
) -> Patch:
    """Train a patch over random images and placements (Brown et al., 2017; EOT of Athalye et al., ICML 2018).

    `x` N x C x H x W in [0, 1] with labels `y` (N,). `placement` is drawn anew for every image, epoch and draw.
    `target` makes it a targeted one: images of that class are left out. The first starts are the corners of the box
    towards single classes (`class_starts`, ours), further ones uniform noise, keyed by `seed`. Judge the result on
    other images. Errors: InputError for a patch larger than the image, and for data, models and settings that cannot be
    meant.
    """
    fit = fit or UniversalFit()
    if x.ndim == 4:
        placement.check(tuple(x.shape[1:]))
    entries = placement.pixels * (x.shape[1] if x.ndim == 4 else 1)
    data = training_set(oracle, x, y, ids, Threat("l0", float(entries)), target, seed)
    shape = tuple(data.x.shape[1:])
    placement.check(shape)
    stream, zero = Stream(seed, "patch/train"), torch.zeros((1,), dtype=torch.int64)
    task = Task(
        name="patch",
        start=lambda number: stream.child("start").uniform(zero, (shape[0], placement.side, placement.side), number)[0],
        place=lambda value, images, names, number: placement.put(value, images, stream, names, number),
        bound=lambda value: value.clamp(0.0, 1.0),
        neutral=torch.full((shape[0], placement.side, placement.side), 0.5),
        leap=lambda gradient: 0.5 * gradient.sign(),
        reach=1.0,
    )
    learnt = learn(oracle, data, task, fit, seed=seed, checkpoint=checkpoint, on_epoch=on_epoch)
    return Patch(
        shape=shape,
        eps=float(entries),
        target=target,
        **asdict(placement),
        tensors={"patch": learnt.value},
        about=provenance(learnt, data, fit, seed, about),
    )
