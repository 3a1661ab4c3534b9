"""auto-attack (the reference code), when a checkout is named by the environment variable AUTOATTACK_SRC.

It is not on a package index, so it is never installed here and nothing of it is kept in this repository.
"""

from __future__ import annotations

import os
import sys

from benchmarks.job import Attack, Job

SOURCE = os.environ.get("AUTOATTACK_SRC", "")
if not SOURCE:
    raise ImportError("AUTOATTACK_SRC is not set: point it at a checkout of auto-attack to run it beside ours")
sys.path.insert(0, SOURCE)

from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # noqa: E402
from autoattack.fab_pt import FABAttack_PT  # noqa: E402
from autoattack.square import SquareAttack  # noqa: E402

NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def _apgd(job: Job, loss: str) -> Attack:
    attack = APGDAttack(
        job.model, n_iter=job.options["steps"], norm=NORM[job.norm], n_restarts=1, eps=job.eps, seed=job.seed,
        loss=loss, eot_iter=1, rho=0.75, device="cpu", use_largereps=job.norm == "l1",
    )  # fmt: skip
    return lambda: attack.perturb(job.x, job.y)


def apgd_ce(job: Job) -> Attack:
    return _apgd(job, "ce")


def apgd_dlr(job: Job) -> Attack:
    return _apgd(job, "dlr")


def apgd_t(job: Job) -> Attack:
    attack = APGDAttack_targeted(
        job.model, n_iter=job.options["steps"], norm=NORM[job.norm], n_restarts=1, eps=job.eps, seed=job.seed,
        eot_iter=1, rho=0.75, n_target_classes=job.options["targets"], device="cpu", use_largereps=job.norm == "l1",
    )  # fmt: skip
    return lambda: attack.perturb(job.x, job.y)


def fab_t(job: Job) -> Attack:
    attack = FABAttack_PT(
        job.model, norm=NORM[job.norm], n_restarts=1, n_iter=job.options["steps"], eps=job.eps, seed=job.seed,
        targeted=True, device="cpu", n_target_classes=job.options["targets"],
    )  # fmt: skip
    return lambda: attack.perturb(job.x, job.y)


def square(job: Job) -> Attack:
    attack = SquareAttack(
        job.model, norm=NORM[job.norm], n_queries=job.options["queries"], eps=job.eps, p_init=0.8, n_restarts=1,
        seed=job.seed, device="cpu", resc_schedule=False,
    )  # fmt: skip
    return lambda: attack.perturb(job.x, job.y)


def standard(job: Job) -> Attack:
    """`standard` with its own defaults; members' lengths change only when the job asks for a quick run."""
    from autoattack import AutoAttack

    attack = AutoAttack(job.model, norm=NORM[job.norm], eps=job.eps, seed=job.seed, verbose=False, device="cpu")
    targets = min(9, job.classes - 1)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    steps, queries = job.options.get("steps", 100), job.options.get("queries", 5000)
    attack.apgd.n_iter_orig = attack.apgd.n_iter = steps
    attack.apgd_targeted.n_iter_orig = attack.apgd_targeted.n_iter = attack.fab.n_iter = steps
    attack.square.n_queries = queries
    return lambda: attack.run_standard_evaluation(job.x, job.y, bs=len(job.y))
