"""Our side of the comparison: a registry name and options, run through the public face of an attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.job import Attack, Job

RUN = ("stop_early", "enough")
ORACLE = ("precision", "channels_last", "batch_size", "compile")


def prepare(name: str, options: dict[str, Any]) -> Callable[[Job], Attack]:
    """Return an adapter that runs our attack `name`; LookupError when the registry or an option is not there.

    `options` are the attack's own, except `rel_step` (a step size as a share of eps), those in RUN (given to `run`;
    `enough` "eps" means the job's radius) and those in ORACLE (given to the oracle).
    """
    try:
        from maodun.attacks.registry import build_attack
        from maodun.core.errors import InputError
        from maodun.core.oracle import Oracle
        from maodun.core.threat import Threat
    except ImportError as error:
        raise LookupError(f"not built yet: {error}") from error
    own = {k: v for k, v in options.items() if k not in (*RUN, *ORACLE, "rel_step")}
    given = {k: v for k, v in options.items() if k in RUN}
    to_oracle = {k: v for k, v in options.items() if k in ORACLE}
    step = options.get("rel_step")
    try:
        build_attack(name, **own, **({} if step is None else {"step_size": 0.1}))
    except (InputError, TypeError) as error:
        raise LookupError(str(error)) from error

    def bind(job: Job) -> Attack:
        attack = build_attack(name, **own, **({} if step is None else {"step_size": step * job.eps}))
        threat = Threat(job.norm, job.eps)
        to_run = {k: job.eps if v == "eps" else v for k, v in given.items()}

        def run() -> Any:
            return attack.run(Oracle(job.model, **to_oracle), job.x, job.y, threat, seed=job.seed, **to_run).x_adv

        return run

    return bind
