"""The one training loop of the generative attacks, on Lightning Fabric: repeats itself, and resumes mid-epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from maodun.attacks.artifacts import TrainedAttack
from maodun.attacks.generative.contest import Batch, Contest
from maodun.attacks.generative.proxies import Proxies
from maodun.core.errors import InputError
from maodun.core.files import load_checkpoint, save_whole

_SAVE_EVERY = 20.0


@dataclass(frozen=True, kw_only=True)
class GeneratorFit:
    """How to train: Adam (0.5, 0.999) for both sides, one critic step per generator step.

    `rate` is the generator's learning rate, `critic_rate` the critic's; both fall to zero along half a cosine. `clip`
    is the largest gradient norm of the generator (None for none).
    """

    epochs: int = 5
    batch_size: int = 64
    rate: float = 1e-3
    critic_rate: float = 2e-4
    clip: float | None = 1.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


@dataclass(frozen=True)
class GeneratorReport:
    """`attack` is what was kept: the best epoch's by `score`, or the last one's (score nan) without a validation.

    `history` holds the mean of every term per epoch, the score and the seconds; epochs count from 0.
    """

    attack: TrainedAttack
    history: tuple[dict[str, float], ...]
    best_epoch: int
    score: float


def fit_generator(
    contest: Contest,
    x: Tensor,
    y: Tensor,
    settings: GeneratorFit,
    *,
    proxies: Proxies | None = None,
    validate: Callable[[TrainedAttack], float] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> GeneratorReport:
    """Train `contest` in place on x (N x C x H x W in [0, 1]) and labels y (N,), and return the attack kept.

    `proxies` are held frozen in evaluation mode for the whole run. `validate` scores an attack, higher is better; it
    must use a model that is neither proxy nor target. `checkpoint` is a file written whole every 20 seconds
    and after every epoch; a second call with the same arguments continues after the last step written. Order and noise
    are functions of `seed`, epoch and step, so a continued run equals an undisturbed one.
    `on_epoch` gets an epoch's line, `on_step` (steps done, steps in all).
    Errors: InputError when lightning-fabric is missing, a loss is not finite, or the checkpoint is of other settings.
    """
    if x.shape[0] == 0:
        raise InputError("training data", "holds no images", "give at least one")
    run = _Run(contest, settings, seed, x.shape[0])
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    with nullcontext() if proxies is None else proxies.ready():
        while run.epoch < settings.epochs:
            order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed * 100_003 + run.epoch))
            batches = torch.split(order, settings.batch_size)
            while run.number < len(batches):
                rows = batches[run.number]
                run.step(Batch(x[rows], y[rows], run.random()))
                if on_step is not None:
                    on_step(run.steps_done, run.steps)
                if checkpoint is not None and time.monotonic() - run.saved > _SAVE_EVERY:
                    run.save(checkpoint)
            line = run.close_epoch(validate)
            if checkpoint is not None:
                run.save(checkpoint)
            if on_epoch is not None:
                on_epoch(line)
    if run.best:
        contest.generator.load_state_dict(run.best)
    return GeneratorReport(contest.attack(), tuple(run.history), run.best_epoch, run.best_score)


class _Run:
    """What a training must remember from step to step."""

    def __init__(self, contest: Contest, settings: GeneratorFit, seed: int, samples: int) -> None:
        self.contest, self.settings, self.seed = contest, settings, seed
        self.fabric = _fabric(settings.precision)
        self.signature = repr(sorted(asdict(settings).items())) + f" seed {seed} samples {samples} {_shapes(contest)}"
        self.per_epoch = math.ceil(samples / settings.batch_size)
        self.networks = {"generator": contest.generator, "critic": contest.critic}
        self.optimisers: dict[str, Any] = {}
        for name, rate in (("generator", settings.rate), ("critic", settings.critic_rate)):
            adam = torch.optim.Adam(self.networks[name].parameters(), lr=rate, betas=(0.5, 0.999))
            _, self.optimisers[name] = self.fabric.setup(self.networks[name], adam)
        self.number, self.totals, self.seconds = 0, dict[str, float](), 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.best_score = -1, math.nan
        self.saved = self.began = time.monotonic()

    @property
    def epoch(self) -> int:
        return len(self.history)

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.per_epoch

    @property
    def steps_done(self) -> int:
        return self.epoch * self.per_epoch + self.number

    def random(self) -> torch.Generator:
        """Return the noise source of this step, a function of the seed and the step alone."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.steps_done) * 2 + 1)

    def step(self, batch: Batch) -> None:
        """One step of the critic, one of the generator, on the same images."""
        fall = 0.5 * (1.0 + math.cos(math.pi * self.steps_done / self.steps))
        for name, rate in (("generator", self.settings.rate), ("critic", self.settings.critic_rate)):
            for group in self.optimisers[name].param_groups:
                group["lr"] = rate * fall
        for network in self.networks.values():
            network.train()
        with self.fabric.autocast():
            made = self.contest.play(batch)
            judged = self.contest.critic_loss(batch, made)
        self.optimisers["critic"].zero_grad()
        self.fabric.backward(judged)
        self.optimisers["critic"].step()
        # The critic is frozen here, so the generator's pass does not pay for gradients nobody uses.
        self.contest.critic.requires_grad_(False)
        with self.fabric.autocast():
            parts = self.contest.losses(batch, made)
        self.optimisers["generator"].zero_grad()
        self.fabric.backward(parts["loss"])
        self.contest.critic.requires_grad_(True)
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.contest.generator.parameters(), self.settings.clip)
        self.optimisers["generator"].step()
        self._count({"critic": judged, **parts}, batch.y.shape[0])

    def _count(self, parts: dict[str, Tensor], n: int) -> None:
        names = list(parts)
        values = torch.stack([parts[name].detach().double() for name in names]).tolist()
        for name, value in zip(names, values, strict=True):
            if not math.isfinite(value):
                raise InputError(f"epoch {self.epoch}", f"the term '{name}' is not finite", "lower the rate")
            key = name.removeprefix("log ")
            self.totals[key] = self.totals.get(key, 0.0) + value * n
        self.totals["n"] = self.totals.get("n", 0.0) + n
        self.number += 1

    def close_epoch(self, validate: Callable[[TrainedAttack], float] | None) -> dict[str, float]:
        """Return the epoch's line and keep its weights when they are the best."""
        n = self.totals.pop("n", 1.0)
        line = {"epoch": float(self.epoch), **{name: total / n for name, total in self.totals.items()}}
        self.contest.generator.eval()
        score = math.nan if validate is None else validate(self.contest.attack())
        if validate is not None:
            line["score"] = score
        if validate is None or not self.best or score >= self.best_score:
            self.best = {name: value.detach().clone() for name, value in self.contest.generator.state_dict().items()}
            self.best_epoch, self.best_score = self.epoch, score
        now = time.monotonic()
        line["seconds"] = self.seconds + now - self.began
        self.number, self.totals, self.seconds, self.began = 0, {}, 0.0, now
        self.history.append(line)
        return line

    def save(self, path: Path) -> None:
        """Write everything to `path` at once: whole or not at all."""
        self.saved = time.monotonic()
        content = {
            "signature": self.signature,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "number": self.number,
            "totals": self.totals,
            "seconds": self.seconds + self.saved - self.began,
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
        }
        save_whole(path, content)

    def load(self, path: Path) -> None:
        """Continue from `path`."""
        content = load_checkpoint(path)
        if content["signature"] != self.signature:
            raise InputError(f"checkpoint '{path}'", "it was written under other settings", "remove it, or --restart")
        for name, network in self.networks.items():
            network.load_state_dict(content["networks"][name])
            self.optimisers[name].load_state_dict(content["optimisers"][name])
        self.number, self.totals, self.seconds = content["number"], content["totals"], content["seconds"]
        self.history, self.best = content["history"], content["best"]
        self.best_epoch, self.best_score = content["best_epoch"], content["best_score"]


def _shapes(contest: Contest) -> str:
    sizes = [tuple(value.shape) for network in (contest.generator, contest.critic) for value in network.parameters()]
    return f"{hash(tuple(sizes)):x} {getattr(contest, 'options', '')!r}"


def _fabric(precision: Literal["32-true", "bf16-mixed"]) -> Any:
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise InputError("training", "lightning-fabric is not installed", "pip install 'maodun[train]'") from error
    return Fabric(accelerator="cpu", devices=1, precision=precision)
