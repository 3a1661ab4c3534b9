"""What the adversary may ask: a model behind an access level, a gradient estimator, a meter and a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.ensemble import price_of
from maodun.core.errors import InputError
from maodun.core.estimators import BPDA, EOT, NES, SPSA, Adjoint, Estimate, Estimator, Exact, Heads, Surrogate
from maodun.core.modes import affine_norms, conv_weights_channels_last, evaluation_mode, refuse_training_batchnorm
from maodun.core.rejection import fold, may_reject
from maodun.core.sizing import automatic_batch_size, refuse_unless_smaller_fits, release
from maodun.core.streams import Stream

__all__ = [
    "BPDA",
    "EOT",
    "NES",
    "SPSA",
    "Adjoint",
    "Budget",
    "BudgetExceededError",
    "Exact",
    "Meter",
    "Oracle",
    "Session",
    "Surrogate",
    "evaluation_mode",
]

Answer = TypeVar("Answer")

ACCESS = ("gradient", "scores", "decision")


@dataclass(frozen=True)
class Budget:
    """The most forwards, backwards and queries one sample may cost an attack; None means unlimited."""

    forwards: int | None = None
    backwards: int | None = None
    queries: int | None = None


class BudgetExceededError(Exception):
    """Raised before a call that some rows cannot pay for; `rows` are their row numbers. The engine catches it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        super().__init__("budget exceeded")


@dataclass
class Meter:
    """Per-sample counts (int64, N): all forwards, all backwards, and the forwards asked without gradient (queries)."""

    forwards: Tensor
    backwards: Tensor
    queries: Tensor

    def copy(self) -> Meter:
        """Return these counts as they stand now."""
        return Meter(self.forwards.clone(), self.backwards.clone(), self.queries.clone())

    def restore(self, counts: Meter) -> None:
        """Set the counts back, in place, to what a copy remembers."""
        for name in ("forwards", "backwards", "queries"):
            getattr(self, name).copy_(getattr(counts, name))

    @staticmethod
    def zeros(n: int, device: torch.device) -> Meter:
        """Return a meter for `n` samples at zero."""
        return Meter(*(torch.zeros(n, dtype=torch.int64, device=device) for _ in range(3)))


def is_stochastic(model: nn.Module) -> bool:
    """Tell whether any submodule declares `stochastic = True`."""
    return any(getattr(module, "stochastic", False) is True for module in model.modules())


def granted(model: nn.Module) -> str:
    """Return the most that a model can be asked for: the narrowest `access` that any submodule declares."""
    declared = [getattr(module, "access", None) for module in model.modules()]
    return max((each for each in declared if each in ACCESS), key=ACCESS.index, default="gradient")


@dataclass(frozen=True)
class Oracle:
    """A model as the adversary meets it.

    `model` maps [0, 1] inputs (N x ...) to logits (N x C). `access` is gradient, scores or decision. `gradient` is
    Exact(), BPDA(), Surrogate(), Adjoint(), EOT(), NES() or SPSA(). `budget` bounds each sample's cost. `batch_size` is
    the micro-batch of one model call (None: chosen from the model's activations; either is halved when memory runs
    out, and InputError when not even one sample fits). `precision` "bf16" searches under autocast (verdicts
    stay in float32). `channels_last` False leaves convolution weights in their layout, and batch norms to torch's own
    kernel, on a CPU. `compile` uses torch.compile. `stochastic` None means: declared by a module or seen in two
    different answers. `keep_mode` leaves the modules' training flags alone. `surrogate` says that the model only stands
    in for another: to fool it is no success, so every search goes its whole way and hands over where it ends. A model
    that declares a narrower access (a remote service, an ONNX file) narrows `access`. InputError when access and
    estimator do not fit, or BatchNorm is in train mode.
    """

    model: nn.Module
    access: str = "gradient"
    gradient: Estimator = field(default_factory=Exact)
    budget: Budget = field(default_factory=Budget)
    batch_size: int | None = None
    precision: str = "float32"
    channels_last: bool = True
    compile: bool = False
    stochastic: bool | None = None
    keep_mode: bool = False
    surrogate: bool = False

    def __post_init__(self) -> None:
        if self.access not in ACCESS:
            raise InputError(f"access '{self.access}'", "is not an access level", "use gradient, scores or decision")
        if self.precision not in ("float32", "bf16"):
            raise InputError(f"precision '{self.precision}'", "is not offered", "use float32 or bf16")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size}", "must be at least 1", "leave it out to have it chosen")
        if not isinstance(self.model, nn.Module):
            raise InputError(
                "model", f"is a {type(self.model).__name__}, not a torch.nn.Module", "wrap it in an nn.Module"
            )
        object.__setattr__(self, "access", max(self.access, granted(self.model), key=ACCESS.index))
        if not self.keep_mode:
            refuse_training_batchnorm(self.model)

    def refuse(self, access: str) -> None:
        """Raise InputError when an attack that needs `access` cannot be run on this oracle, before it costs a query.

        So is any attack on a budget of no queries or no forwards.
        """
        if 0 in (self.budget.queries, self.budget.forwards):
            raise InputError("budget 0", "does not pay for a single query", "give 1 or more, or None for no limit")
        needs = self.gradient.needs if access == "gradient" else access
        if ACCESS.index(needs) >= ACCESS.index(self.access):
            return
        whose = "the model" if granted(self.model) == self.access else "this oracle"
        remedy = "NES() or SPSA(), or a query attack" if self.access == "scores" else "an attack by decisions"
        raise InputError(f"access '{needs}'", f"is needed, and {whose} grants {self.access} only", f"use {remedy}")

    @property
    def reference(self) -> bool:
        """Whether the search runs in the reference numerics (float32, not compiled)."""
        return self.precision == "float32" and not self.compile

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Hold the model in evaluation mode with frozen parameters, conv nets arranged for speed, for a run."""
        layout = conv_weights_channels_last(self.model) if self.channels_last else nullcontext()
        norms = affine_norms(self.model) if self.channels_last and not self.compile else nullcontext()
        with nullcontext() if self.keep_mode else evaluation_mode(self.model), layout, norms:
            yield

    def session(self, x: Tensor, ids: Tensor, seed: int, y: Tensor | None = None) -> Session:
        """Open a run on samples `x` (N x ...) with ids `ids` (N,); models that may reject need the labels `y` (N,)."""
        return Session(self, x, ids, seed, y)


class Session:
    """One run's live connection: counts, budget, micro-batches, precision and keyed randomness.

    With labels `y` (N,) the logits of a model that may reject come as an adversary counts them (core.rejection.fold);
    `apart` hands them over as the model gives them.
    """

    def __init__(self, oracle: Oracle, x: Tensor, ids: Tensor, seed: int, y: Tensor | None = None) -> None:
        self.oracle, self.sample_ids, self.seed = oracle, ids, seed
        self.model: nn.Module = cast(nn.Module, torch.compile(oracle.model)) if oracle.compile else oracle.model
        self.meter = Meter.zeros(x.shape[0], x.device)
        self.keyed = is_stochastic(oracle.model)
        self.stochastic = self.keyed if oracle.stochastic is None else oracle.stochastic
        self.batch_size = oracle.batch_size or automatic_batch_size(oracle.model, x)
        self.price = price_of(oracle.model)
        self.purpose = "search"
        self.labels = y if y is not None and may_reject(oracle.model) else None
        self.apart = False
        self._limited = oracle.budget != Budget()
        self._ones = torch.ones(0, dtype=torch.int64, device=x.device)

    # -- what estimators see (the Port) ------------------------------------------------------------------------------

    def forward(self, x: Tensor, index: Tensor, draws: int = 1, query: bool = False) -> Tensor:
        """Return float32 logits of one micro-batch whose rows are `index`, counted once per row and appearance."""
        number = index
        if self.stochastic:
            number = self.meter.forwards[index]
            if draws > 1:
                ahead = self.price * torch.arange(draws, device=index.device)
                number = number + ahead.repeat(index.shape[0] // draws)
        rows = index if draws == 1 else index[::draws]
        cost = draws * self.price
        if self._limited:
            self._afford(rows, self.oracle.budget.forwards, self.meter.forwards, cost)
            self._afford(rows, self.oracle.budget.queries if query else None, self.meter.queries, cost)
        self._charge(self.meter.forwards, rows, cost)
        if query:
            self._charge(self.meter.queries, rows, cost)
        return self.call(x, index, number)

    def call(self, x: Tensor, index: Tensor, number: Tensor) -> Tensor:
        """Pass `x` through the model in the oracle's numerics, draws keyed by id and `number`; counts nothing."""
        with ExitStack() as stack:
            if self.stochastic:
                stack.enter_context(randomness(self.noise(self.purpose), self.sample_ids[index], number, self.keyed))
            if self.oracle.precision == "bf16":
                stack.enter_context(torch.autocast(x.device.type, dtype=torch.bfloat16))
            logits: Tensor = self.model(x)
        logits = logits.float()
        return logits if self.labels is None or self.apart else fold(logits, self.labels[index])

    def count_backward(self, index: Tensor, passes: int, draws: int = 1) -> None:
        """Note `passes` backward passes for each row (times the draws) before they are made."""
        rows = index if draws == 1 else index[::draws]
        cost = passes * draws * self.price
        if self._limited:
            self._afford(rows, self.oracle.budget.backwards, self.meter.backwards, cost)
        self._charge(self.meter.backwards, rows, cost)

    def member(self, model: nn.Module) -> Session:
        """Return this session with one member of its ensemble for a model: meter, budget and draws stay shared."""
        part = copy.copy(self)
        part.model, part.price = model, price_of(model)
        return part

    def _charge(self, counter: Tensor, rows: Tensor, price: int) -> None:
        if self._ones.shape[0] < rows.shape[0]:
            self._ones = torch.ones_like(rows)
        counter.index_add_(0, rows, self._ones[: rows.shape[0]], alpha=price)

    def noise(self, purpose: str) -> Stream:
        """Return the stream of a purpose under the run's seed."""
        return Stream(self.seed, purpose)

    def ids(self, index: Tensor) -> Tensor:
        """Return the sample ids of rows."""
        return self.sample_ids[index]

    def calls(self, index: Tensor) -> Tensor:
        """Return the forwards each row has had so far."""
        return self.meter.forwards[index]

    # -- what problems ask -------------------------------------------------------------------------------------------

    def logits(self, x: Tensor, rows: Tensor, draws: int = 1) -> Tensor:
        """Return the logits of every row without gradients (mean over `draws`), in micro-batches."""
        if self.oracle.access == "decision":
            raise InputError("scores", "this oracle only tells decisions", "use an attack that needs decisions only")
        scores = self._score(x, rows, draws)
        return scores[:, 0] if draws == 1 else scores.mean(1)

    def draws(self, x: Tensor, rows: Tensor, draws: int) -> Tensor:
        """Return the logits of `draws` fresh draws of every row: N x draws x C."""
        return self._score(x, rows, draws)

    def decisions(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the predicted class of every row."""
        return self._score(x, rows, 1)[:, 0].argmax(1)

    def _score(self, x: Tensor, rows: Tensor, draws: int) -> Tensor:
        def ask(part: slice) -> Tensor:
            some, index, answers, done = x[part], rows[part], [], 0
            while done < draws:
                ahead = min(draws - done, max(1, self.batch_size // some.shape[0]))
                wide = index.repeat_interleave(ahead)
                told = self.forward(some.repeat_interleave(ahead, 0) if ahead > 1 else some, wide, ahead, query=True)
                answers.append(told.reshape(some.shape[0], ahead, -1))
                done += ahead
            return answers[0] if len(answers) == 1 else torch.cat(answers, 1)

        with torch.no_grad():
            parts = self._fitting(x.shape[0], draws, ask)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def affords(self, rows: Tensor, queries: int) -> Tensor | None:
        """Return (N,) booleans: the budget of `rows` allows `queries` more; None without a limit on queries."""
        budget = self.oracle.budget
        limits = ((budget.queries, self.meter.queries), (budget.forwards, self.meter.forwards))
        able = [spent[rows] + queries <= limit for limit, spent in limits if limit is not None]
        return None if not able else torch.stack(able).all(0)

    def estimate(self, x: Tensor, rows: Tensor, heads: Heads, estimator: Estimator | None = None) -> Estimate:
        """Return logits, values (N x K) and K gradients of `heads`; `heads` gets positions into this call's rows.

        `estimator` takes the place of the oracle's own (attacks that bring theirs).
        """
        estimator = estimator or self.oracle.gradient
        if estimator.needs == "gradient" and self.oracle.access != "gradient":
            raise InputError(
                f"gradient by {type(estimator).__name__}",
                f"needs gradient access while the oracle grants {self.oracle.access}",
                "use NES() or SPSA() as gradient, or a query attack",
            )
        port = _Offset(self, rows, estimator)

        def ask(part: slice) -> Estimate:
            if part.stop - part.start == x.shape[0]:
                return estimator.estimate(port, x, port.positions, heads)
            return estimator.estimate(port, x[part], port.positions[part], heads)

        parts = self._fitting(x.shape[0], estimator.draws, ask)
        if len(parts) == 1:
            return parts[0]
        return (
            torch.cat([part[0] for part in parts]),
            torch.cat([part[1] for part in parts]),
            [torch.cat(grads) for grads in zip(*(part[2] for part in parts), strict=True)],
        )

    def _fitting(self, n: int, draws: int, ask: Callable[[slice], Answer]) -> list[Answer]:
        """Return what `ask` says of `n` rows, micro-batch by micro-batch; when memory runs out, with smaller ones.

        What failed costs nothing and leaves the numbers of its draws to the next try.
        """
        parts: list[Answer] = []
        start = 0
        while start < n:
            part = slice(start, min(n, start + max(1, self.batch_size // draws)))
            counts = self.meter.copy()
            try:
                parts.append(ask(part))
                start = part.stop
                continue
            except (RuntimeError, MemoryError) as error:
                refuse_unless_smaller_fits(error, used := min(self.batch_size, draws * (part.stop - part.start)))
            # Only here, where the error no longer holds on to what did not fit.
            self.batch_size = used // 2
            self.meter.restore(counts)
            release(self._ones.device)
        return parts

    @staticmethod
    def _afford(rows: Tensor, limit: int | None, spent: Tensor, price: int) -> None:
        if limit is not None:
            times = torch.bincount(rows, minlength=spent.shape[0])[rows]
            short = spent[rows] + price * times > limit
            if bool(short.any()):
                raise BudgetExceededError(rows[short])


class _Offset:
    """The session seen from one call: estimators index the call's rows, the session the run's."""

    def __init__(self, session: Session, rows: Tensor, estimator: Estimator) -> None:
        self.session, self.rows, self.model = session, rows, session.model
        self.positions = torch.arange(rows.shape[0], device=rows.device)
        self.query = estimator.needs == "scores"

    @property
    def batch_size(self) -> int:
        return self.session.batch_size

    def forward(self, x: Tensor, index: Tensor, draws: int = 1) -> Tensor:
        return self.session.forward(x, self._rows(index), draws, self.query)

    def count_backward(self, index: Tensor, passes: int, draws: int = 1) -> None:
        self.session.count_backward(self._rows(index), passes, draws)

    def _rows(self, index: Tensor) -> Tensor:
        return self.rows if index is self.positions else self.rows[index]

    def noise(self, purpose: str) -> Stream:
        return self.session.noise(purpose)

    def ids(self, index: Tensor) -> Tensor:
        return self.session.ids(self.rows[index])

    def calls(self, index: Tensor) -> Tensor:
        return self.session.calls(self.rows[index])


@contextmanager
def randomness(stream: Stream, ids: Tensor, number: Tensor, keyed: bool) -> Iterator[None]:
    """Key a stochastic model's draws; a model that uses torch's own generators gets them seeded and given back.

    Unkeyed modules cannot draw per sample, so their noise depends on the batch they pass in; the seed still follows
    from the first row's id and draw number, so a run repeats itself.
    """
    if keyed:
        with context.draw(stream, ids, number):
            yield
        return
    seed = int(stream.words(ids[:1], 1, number[:1]).item())
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), context.draw(stream, ids, number):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.default_generators[ids.device.index or 0].manual_seed(seed)
        yield
