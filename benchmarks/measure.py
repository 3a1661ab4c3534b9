"""Run the contenders of one case against one batch: count once, then time in interleaved, rotated rounds."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import Prepare, contenders
from benchmarks.job import Job, reset
from benchmarks.meter import Bare, Calls, Counting, bare_cost
from benchmarks.rounds import rotation
from benchmarks.scoring import Score, score
from benchmarks.subjects import Batch


@dataclass
class Trial:
    """Everything measured for one contender: calls and score of the counted run, one time and price per round."""

    calls: Calls
    score: Score
    seconds: list[float] = field(default_factory=list)
    price: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """The trials of one case on one batch, by label, and why the others are absent."""

    case: Case
    batch: Batch
    trials: dict[str, Trial] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    bare: list[Bare] = field(default_factory=list)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what peers print and warn about."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def job_for(case: Case, batch: Batch, seed: int) -> Job:
    """The job of a case on a batch; targets never exceed the number of wrong classes."""
    options = dict(case.options)
    if "targets" in options:
        options["targets"] = min(options["targets"], batch.classes - 1)
    return Job(batch.model, batch.x, batch.y, case.norm, batch.subject.eps[case.norm], batch.classes, seed, options)


def attack_once(prepare: Prepare, job: Job) -> tuple[Tensor, float]:
    """Run one contender once from a reset state; returns its batch and the CPU seconds of the attack alone."""
    reset(job.model, job.seed)
    with quiet():
        attack = prepare(job)
        start = time.process_time()
        x_adv = attack()
        seconds = time.process_time() - start
    return x_adv.detach(), seconds


def counted(prepare: Prepare, job: Job) -> tuple[Calls, Score]:
    """Run one contender through a counting model and judge what it returns with the bare model."""
    reset(job.model, job.seed)
    wrapper = Counting(job.model)
    try:
        inner = Job(wrapper, job.x, job.y, job.norm, job.eps, job.classes, job.seed, job.options)
        with quiet():
            x_adv = prepare(inner)()
    finally:
        wrapper.close()
    return wrapper.calls, score(job.model, x_adv.detach(), job.x, job.y, job.norm, job.eps)


def measure(
    case: Case, batch: Batch, *, repeats: int, only: set[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Count, score and time every contender; round r uses seed r for all. `repeats` 0 counts and scores only."""
    found, absent = contenders(case, only=only)
    outcome = Outcome(case, batch, absent=absent)
    job = job_for(case, batch, seed=0)
    for label, prepare in found.items():
        say(f"{case.name} on {batch.subject.name}: counting {label}")
        try:
            calls, verdict = counted(prepare, job)
        except Exception as error:  # noqa: BLE001 -- one contender that breaks must not lose the table
            outcome.absent[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        outcome.trials[label] = Trial(calls, verdict)
    labels = list(outcome.trials)
    for index in range(repeats):
        say(f"{case.name} on {batch.subject.name}: round {index + 1} of {repeats}")
        bare = bare_cost(batch.model, batch.x)
        outcome.bare.append(bare)
        for label in rotation(labels, index):
            _, seconds = attack_once(found[label], job_for(case, batch, seed=index))
            trial = outcome.trials[label]
            trial.seconds.append(seconds)
            trial.price.append(bare.price(trial.calls.forward_samples, trial.calls.backward_samples))
    return outcome
