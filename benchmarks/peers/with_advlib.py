"""adv-lib 0.2.8. Pure functions; needs the stubs of `benchmarks.peers.stubs` to be importable."""

from __future__ import annotations

import functools

from adv_lib import attacks as adv

from benchmarks.job import Attack, Job


def pgd(job: Job) -> Attack:
    return functools.partial(
        adv.pgd_linf, job.model, job.x, job.y, job.eps, steps=job.options["steps"],
        absolute_step_size=job.step_size,
    )  # fmt: skip


def _apgd(job: Job, loss: str) -> Attack:
    return functools.partial(
        adv.apgd, job.model, job.x, job.y, eps=job.eps, norm=job.p, n_iter=job.options["steps"], loss_function=loss,
        use_large_reps=job.norm == "l1",
    )  # fmt: skip


def apgd_ce(job: Job) -> Attack:
    return _apgd(job, "ce")


def apgd_dlr(job: Job) -> Attack:
    return _apgd(job, "dlr")


def apgd_t(job: Job) -> Attack:
    return functools.partial(
        adv.apgd_targeted, job.model, job.x, job.y, eps=job.eps, norm=job.p, n_iter=job.options["steps"],
        num_targets=job.options["targets"], use_large_reps=job.norm == "l1",
    )  # fmt: skip


def deepfool(job: Job) -> Attack:
    return functools.partial(
        adv.df, job.model, job.x, job.y, steps=job.options["steps"], overshoot=0.02, norm=job.p
    )


def cw(job: Job) -> Attack:
    return functools.partial(
        adv.carlini_wagner_l2, job.model, job.x, job.y, learning_rate=job.options["lr"],
        initial_const=job.options["const"], binary_search_steps=job.options["searches"],
        max_iterations=job.options["steps"],
    )  # fmt: skip


def ddn(job: Job) -> Attack:
    # levels=None: the default quantises to 256 grey levels, which no other peer does.
    return functools.partial(adv.ddn, job.model, job.x, job.y, steps=job.options["steps"], levels=None)


def fmn(job: Job) -> Attack:
    return functools.partial(
        adv.fmn, job.model, job.x, job.y, norm=job.p, steps=job.options["steps"], α_init=job.options["alpha"]
    )


def fab_t(job: Job) -> Attack:
    """Minimum-norm output on every sample: unlike the AutoAttack member it never drops a sample."""
    return functools.partial(
        adv.fab, job.model, job.x, job.y, norm=job.p, n_iter=job.options["steps"], ε=job.eps,
        restarts=job.options["targets"], targeted_restarts=True,
    )  # fmt: skip
