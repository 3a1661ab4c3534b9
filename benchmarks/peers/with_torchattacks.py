"""torchattacks 3.5.1. Its AutoAttack members default to 10 steps; here every parameter is the published one."""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor

from benchmarks.job import Attack, Job

NORM = {"linf": "Linf", "l2": "L2"}


def _bind(job: Job, attack: torchattacks.attack.Attack) -> Attack:
    return lambda: attack(job.x, job.y)


def fgsm(job: Job) -> Attack:
    return _bind(job, torchattacks.FGSM(job.model, eps=job.eps))


def pgd(job: Job) -> Attack:
    steps = job.options["steps"]
    if job.norm == "l2":
        return _bind(job, torchattacks.PGDL2(job.model, eps=job.eps, alpha=job.step_size, steps=steps))
    return _bind(job, torchattacks.PGD(job.model, eps=job.eps, alpha=job.step_size, steps=steps))


def mifgsm(job: Job) -> Attack:
    steps = job.options["steps"]
    return _bind(job, torchattacks.MIFGSM(job.model, eps=job.eps, alpha=job.step_size, steps=steps))


def nifgsm(job: Job) -> Attack:
    steps = job.options["steps"]
    return _bind(job, torchattacks.NIFGSM(job.model, eps=job.eps, alpha=job.step_size, steps=steps))


def _apgd(job: Job, loss: str) -> torchattacks.attack.Attack:
    return torchattacks.APGD(
        job.model, norm=NORM[job.norm], eps=job.eps, steps=job.options["steps"], loss=loss, seed=job.seed
    )


def apgd_ce(job: Job) -> Attack:
    return _bind(job, _apgd(job, "ce"))


def apgd_dlr(job: Job) -> Attack:
    return _bind(job, _apgd(job, "dlr"))


def _apgd_t(job: Job) -> torchattacks.attack.Attack:
    # n_classes - 1 targets are attacked: pass targets + 1 to get the published number of targets.
    return torchattacks.APGDT(
        job.model, norm=NORM[job.norm], eps=job.eps, steps=job.options["steps"], seed=job.seed,
        n_classes=job.options["targets"] + 1,
    )  # fmt: skip


def apgd_t(job: Job) -> Attack:
    return _bind(job, _apgd_t(job))


def _fab_t(job: Job) -> torchattacks.attack.Attack:
    return torchattacks.FAB(
        job.model, norm=NORM[job.norm], eps=job.eps, steps=job.options["steps"], seed=job.seed,
        multi_targeted=True, n_classes=job.options["targets"] + 1,
    )  # fmt: skip


def fab_t(job: Job) -> Attack:
    return _bind(job, _fab_t(job))


def _square(job: Job) -> torchattacks.attack.Attack:
    # resc_schedule=False is what AutoAttack uses: the size schedule counts queries, it is not stretched.
    return torchattacks.Square(
        job.model, norm=NORM[job.norm], eps=job.eps, n_queries=job.options["queries"], p_init=0.8,
        resc_schedule=False, seed=job.seed,
    )  # fmt: skip


def square(job: Job) -> Attack:
    return _bind(job, _square(job))


def spsa(job: Job) -> Attack:
    """Its samples are pairs: half as many make the same number of queries."""
    samples = job.options["samples"] // 2
    attack = torchattacks.SPSA(
        job.model, eps=job.eps, nb_iter=job.options["steps"], nb_sample=samples, max_batch_size=samples
    )
    return _bind(job, attack)


def deepfool(job: Job) -> Attack:
    return _bind(job, torchattacks.DeepFool(job.model, steps=job.options["steps"], overshoot=0.02))


def cw(job: Job) -> Attack:
    """One search at c = 1: torchattacks has no binary search, so this is less work than the others do."""
    steps = job.options["steps"] * job.options["searches"]
    return _bind(job, torchattacks.CW(job.model, c=1, steps=steps, lr=0.01))


def standard(job: Job) -> Attack:
    """AutoAttack `standard` from members with the published parameters (its own preset runs 10 steps).

    MultiAttack hands each member only the samples that survived so far, as the published protocol does.
    """
    parts = {"steps": 100, "targets": min(9, job.classes - 1), "queries": 5000, **job.options}
    full = Job(job.model, job.x, job.y, job.norm, job.eps, job.classes, job.seed, parts)
    members = [_apgd(full, "ce"), _apgd_t(full), _fab_t(full), _square(full)]
    return _bind(job, torchattacks.MultiAttack(members))


def check_members(job: Job) -> dict[str, Tensor]:
    """Robust flags after each member of `standard`, run one after another on the survivors (for diagnosis)."""
    parts = {"steps": 100, "targets": min(9, job.classes - 1), "queries": 5000, **job.options}
    full = Job(job.model, job.x, job.y, job.norm, job.eps, job.classes, job.seed, parts)
    alive = torch.arange(len(job.y))
    flags: dict[str, Tensor] = {}
    members = [_apgd(full, "ce"), _apgd_t(full), _fab_t(full), _square(full)]
    for name, member in zip(("apgd-ce", "apgd-t", "fab-t", "square"), members, strict=True):
        if len(alive):
            with torch.no_grad():
                adv = member(job.x[alive], job.y[alive])
                alive = alive[job.model(adv).argmax(1) == job.y[alive]]
        flags[name] = torch.zeros(len(job.y), dtype=torch.bool).index_fill(0, alive, True)
    return flags
