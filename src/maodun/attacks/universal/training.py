"""Stochastic ascent on one tensor shared by all images: the training loop of universal perturbations and patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maodun.core import admission
from maodun.core.errors import InputError
from maodun.core.files import load_checkpoint, save_whole
from maodun.core.losses import get_loss
from maodun.core.oracle import Budget, Oracle, Session
from maodun.core.streams import Stream
from maodun.core.threat import Threat

_MOMENTUM, _SQUARES, _TINY = 0.9, 0.99, 1e-12
_LAST_RATE = 0.05
_FEW, _CLASSES = 256, 20

Line = dict[str, float]
"""What an epoch came to: start and epoch (from 0), loss (mean), fooled (share of the images met)."""


@dataclass(frozen=True, kw_only=True)
class UniversalFit:
    """How a universal attack is trained: stochastic ascent with clipped losses (Shafahi et al., AAAI 2020).

    `epochs` passes over the images in minibatches of `batch_size`, in an order keyed by seed, epoch and sample id.
    Every image stands `draws` times in its minibatch, each time under another random placement where the attack has
    any. `loss` (ce, margin, dlr, probability) is cut at `clip`, so that images already lost stop pulling; the paper
    cuts cross-entropy there. Adam's steps of `rate`, as a share of the largest change allowed, fall to a twentieth
    along the way. Of `starts` runs from other starts the one that fooled most images in its last pass is kept: there is
    a good optimum per class that images can be driven to, and a run finds one of them. Costs `starts` * `epochs` *
    `draws` forwards and backwards per image, and a clean pass.
    """

    epochs: int = 10
    batch_size: int = 32
    draws: int = 1
    loss: str = "margin"
    clip: float = 9.0
    rate: float = 0.1
    starts: int = 3

    def __post_init__(self) -> None:
        get_loss(self.loss)
        for option, least in (("epochs", 1), ("batch_size", 1), ("draws", 1), ("starts", 1), ("rate", 0.0)):
            if not getattr(self, option) >= least:
                raise InputError(f"{option} {getattr(self, option)}", "is too small", f"give at least {least}")


@dataclass(frozen=True)
class TrainingSet:
    """The images (N x ..., [0, 1]) a universal attack learns from, their labels, targets (N,) or None, and ids (N,)."""

    x: Tensor
    y: Tensor
    targets: Tensor | None
    ids: Tensor


@dataclass(frozen=True)
class Learnt:
    """The trained tensor, a line per epoch, and what the training cost in all."""

    value: Tensor
    history: tuple[Line, ...]
    forwards: int
    backwards: int


@dataclass(frozen=True)
class Task:
    """What is climbed: `start` makes the tensor, `place` puts it on images and `bound` keeps it allowed.

    `start(number)` is a tensor to begin with at random; `neutral` is the tensor that does least, and `leap(gradient)`
    its best change for a linear model, from which `class_starts` come. `place(value, x, ids, number)` returns the
    images (B x ...) with the tensor on them, differentiable in `value`; `number` (B,) numbers the draws of each id.
    `reach` is the largest change of an entry, which the rate is a share of; `even` gives all entries one rate, as an l2
    ball wants, instead of Adam's one each, which leads to a box's corners. `name` keys the random numbers.
    """

    name: str
    start: Callable[[int], Tensor]
    place: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    bound: Callable[[Tensor], Tensor]
    neutral: Tensor
    leap: Callable[[Tensor], Tensor]
    reach: float
    even: bool = False


def training_set(
    oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor | None, threat: Threat, target: int | None, seed: int
) -> TrainingSet:
    """Return checked samples, without those of class `target`; refuses what no training should start on.

    Errors: InputError for inputs, labels and models that cannot be meant, a budget, an infinite eps, or when nothing is
    left.
    """
    if oracle.budget != Budget():
        raise InputError(
            "budget", "is per sample, and a universal training learns from all", "bound the epochs instead"
        )
    x, y, _, ids = admission.check_samples(x, y, None, ids, Threat(threat.norm, threat.eps))
    if not math.isfinite(threat.eps):
        raise InputError("eps", "is infinite: everything would be allowed", "give a radius")
    if target is not None and target < 0:
        raise InputError(f"target {target}", "classes are numbered from 0", "give a class of the model")
    if x.shape[0]:
        with oracle.ready():
            logits = oracle.session(x, ids, seed).logits(x, torch.arange(x.shape[0], device=x.device))
        aims = None if target is None else torch.full_like(y, target)
        admission.check_outputs(logits, y, aims, oracle.access)
    if target is not None:
        keep = y != target
        x, y, ids = x[keep], y[keep], ids[keep]
    if not x.shape[0]:
        reason = "holds no images" if target is None else f"holds no images of a class other than {target}"
        raise InputError("training set", reason, "give at least one")
    return TrainingSet(x, y, None if target is None else torch.full_like(y, target), ids)


def learn(
    oracle: Oracle,
    data: TrainingSet,
    task: Task,
    fit: UniversalFit,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Line], None] | None = None,
) -> Learnt:
    """Climb the mean clipped loss of the images with the task's tensor on them.

    The result is a function of the arguments, whatever the order in which the images are given. `checkpoint` is a file
    written after every epoch (another per start); a second call continues from it. Errors: InputError for another
    run's checkpoint.
    """
    runs = []
    with oracle.ready():
        starts, first = class_starts(oracle, data, task, seed)
        for start in range(fit.starts):
            value = starts[start] if start < len(starts) else task.start(start)
            run = _Run(oracle, data, task, fit, seed, start, value.to(data.x))
            file = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{start}")
            if file is not None and file.exists():
                run.load(file)
            while len(run.history) < fit.epochs:
                line = run.epoch()
                if file is not None:
                    run.save(file)
                if on_epoch is not None:
                    on_epoch(line)
            runs.append(run)
    best = max(runs, key=lambda run: run.history[-1]["fooled"])
    meters = [first.meter, *(run.session.meter for run in runs)]
    forwards = sum(int(meter.forwards.sum()) for meter in meters)
    backwards = sum(int(meter.backwards.sum()) for meter in meters)
    return Learnt(best.value, tuple(best.history), forwards, backwards)


def class_starts(oracle: Oracle, data: TrainingSet, task: Task, seed: int) -> tuple[list[Tensor], Session]:
    """Return, for single classes, the tensor that is best to first order for driving images to them; the best first.

    Every class counts (with more than 20, the 20 that most often come second), or the target alone. The gradient of
    each class's margin is averaged over 256 images under a placement each; the order is by the images fooled. Costs
    two forwards per image, one more and a backward per class, counted by the session returned beside them.
    """
    rows = Stream(seed, f"{task.name}/few").uniform(data.ids, ()).argsort()[:_FEW]
    x, y, ids = data.x[rows], data.y[rows], data.ids[rows]
    session, at = oracle.session(x, ids, seed), torch.arange(x.shape[0], device=x.device)
    number = torch.zeros_like(ids)
    logits = session.logits(x, at)
    if data.targets is None:
        rivals = logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
        classes = torch.bincount(rivals, minlength=logits.shape[1]).argsort(descending=True, stable=True)[:_CLASSES]
    else:
        classes = data.targets[:1]

    def heads(answer: Tensor, index: Tensor) -> Tensor:
        return answer[:, classes] - answer.gather(1, y[index].unsqueeze(1))

    with torch.enable_grad():
        neutral = task.neutral.to(x).requires_grad_()
        placed = task.place(neutral, x, ids, number)
    _, _, gradients = session.estimate(placed.detach(), at, heads)
    found = []
    for gradient in gradients:
        (climb,) = torch.autograd.grad(placed, neutral, gradient, retain_graph=True)
        value = task.bound(neutral.detach() + task.leap(climb))
        forced = session.logits(task.place(value, x, ids, number), at).argmax(1)
        fooled = (forced != y) if data.targets is None else (forced == classes)
        found.append((int(fooled.sum()), value))
    return [value for _, value in sorted(found, key=lambda each: -each[0])], session


@dataclass
class _Run:
    """What the training remembers: the tensor, Adam's moments, and the epochs so far."""

    oracle: Oracle
    data: TrainingSet
    task: Task
    fit: UniversalFit
    seed: int
    start: int
    value: Tensor
    history: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self.session: Session = self.oracle.session(self.data.x, self.data.ids, self.seed)
        self.per_epoch = math.ceil(self.data.x.shape[0] / self.fit.batch_size)

    def epoch(self) -> Line:
        """Pass once over all images and return what it came to."""
        number, stream = len(self.history), Stream(self.seed, f"{self.task.name}/order")
        order = (
            stream.uniform(self.data.ids, (), self.start * self.fit.epochs + number).to(torch.float64)
            + self.data.ids * 1e-12
        )
        total = torch.zeros(2, dtype=torch.float64, device=self.value.device)
        for turn, rows in enumerate(torch.split(order.argsort(), self.fit.batch_size)):
            total += self._step(rows, number * self.per_epoch + turn)
        loss, fooled = (total / (self.data.x.shape[0] * self.fit.draws)).tolist()
        self.history.append({"start": float(self.start), "epoch": float(number), "loss": loss, "fooled": fooled})
        return self.history[-1]

    def _step(self, rows: Tensor, step: int) -> Tensor:
        """Take one step; return the minibatch's sums of losses and of images fooled."""
        fit, data = self.fit, self.data
        wide = rows.repeat_interleave(fit.draws)
        draw = torch.arange(fit.draws, device=rows.device).repeat(rows.shape[0]) + len(self.history) * fit.draws
        function, y = get_loss(fit.loss), data.y[wide]
        targets = None if data.targets is None else data.targets[wide]

        def heads(logits: Tensor, index: Tensor) -> Tensor:
            values = function(logits, y[index], None if targets is None else targets[index])
            return values.clamp(max=fit.clip).unsqueeze(1)

        with torch.enable_grad():
            value = self.value.detach().requires_grad_()
            placed = self.task.place(value, data.x[wide], data.ids[wide], draw)
        logits, values, gradients = self.session.estimate(placed.detach(), wide, heads)
        (climb,) = torch.autograd.grad(placed, value, gradients[0] / wide.shape[0])
        self._climb(climb, step)
        predicted = logits.argmax(1)
        fooled = predicted != y if targets is None else predicted == targets
        return torch.stack([values.sum(), fooled.sum()]).to(torch.float64)

    def _climb(self, gradient: Tensor, step: int) -> None:
        self.mean = torch.lerp(gradient, self.mean, _MOMENTUM)
        power = gradient.square()
        self.square = torch.lerp(power.mean().expand_as(power) if self.task.even else power, self.square, _SQUARES)
        mean, square = self.mean / (1 - _MOMENTUM ** (step + 1)), self.square / (1 - _SQUARES ** (step + 1))
        left = 1.0 - step / (self.fit.epochs * self.per_epoch)
        rate = self.fit.rate * self.task.reach * max(_LAST_RATE, left)
        self.value = self.task.bound(self.value + rate * mean / (square.sqrt() + _TINY))

    @property
    def signature(self) -> str:
        """What must agree for a checkpoint to be of this run."""
        ids = self.data.ids
        what = f"{self.task.name} {sorted(asdict(self.fit).items())} seed {self.seed} start {self.start}"
        size = f"{tuple(self.value.shape)} reach {self.task.reach:g}"
        return f"{what} of {size} on {ids.shape[0]} images, ids {int(ids.min())} to {int(ids.max())}"

    def save(self, path: Path) -> None:
        """Write everything to `path`: whole or not at all."""
        meter = self.session.meter
        content = {
            "signature": self.signature,
            "tensors": [self.value, self.mean, self.square],
            "counts": [meter.forwards, meter.backwards, meter.queries],
            "history": self.history,
        }
        save_whole(path, content)

    def load(self, path: Path) -> None:
        """Continue from `path`."""
        content = load_checkpoint(path, self.value.device)
        if content["signature"] != self.signature:
            raise InputError(f"checkpoint '{path}'", "it was written by another run", "remove it, or --restart")
        self.value, self.mean, self.square = content["tensors"]
        for count, kept in zip(("forwards", "backwards", "queries"), content["counts"], strict=True):
            getattr(self.session.meter, count).copy_(kept)
        self.history = list(content["history"])


def provenance(
    learnt: Learnt, data: TrainingSet, fit: object, seed: int, about: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what a trained attack's file says about its training, with what the caller adds."""
    return {
        "images": int(data.x.shape[0]),
        "seed": seed,
        "fit": asdict(fit),  # type: ignore[call-overload]
        "history": [dict(line) for line in learnt.history],
        "forwards": learnt.forwards,
        "backwards": learnt.backwards,
        **(about or {}),
    }
