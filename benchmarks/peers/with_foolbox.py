"""Foolbox 3.3.4. Attacks return (raw, clipped, success); the clipped batch is taken."""

from __future__ import annotations

import foolbox as fb

from benchmarks.job import Attack, Job


def _bind(job: Job, attack: fb.attacks.base.Attack, *, minimum: bool = False) -> Attack:
    model = fb.PyTorchModel(job.model, bounds=(0, 1), device="cpu")
    epsilons = None if minimum else job.eps
    # With epsilons=None the second entry is the unclipped minimum-norm adversarial.
    return lambda: attack(model, job.x, job.y, epsilons=epsilons)[1]


def fgsm(job: Job) -> Attack:
    return _bind(job, fb.attacks.LinfFastGradientAttack())


def pgd(job: Job) -> Attack:
    kind = {"linf": fb.attacks.LinfPGD, "l2": fb.attacks.L2PGD}[job.norm]
    return _bind(job, kind(abs_stepsize=job.step_size, steps=job.options["steps"], random_start=True))


def mifgsm(job: Job) -> Attack:
    steps = job.options["steps"]
    return _bind(job, fb.attacks.LinfMomentumIterativeFastGradientMethod(abs_stepsize=job.step_size, steps=steps))


def deepfool(job: Job) -> Attack:
    kind = {"linf": fb.attacks.LinfDeepFoolAttack, "l2": fb.attacks.L2DeepFoolAttack}[job.norm]
    return _bind(job, kind(steps=job.options["steps"], candidates=job.classes, overshoot=0.02), minimum=True)


def cw(job: Job) -> Attack:
    attack = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=job.options["searches"], steps=job.options["steps"],
        stepsize=job.options["lr"], initial_const=job.options["const"],
    )  # fmt: skip
    return _bind(job, attack, minimum=True)


def ddn(job: Job) -> Attack:
    return _bind(job, fb.attacks.DDNAttack(steps=job.options["steps"], init_epsilon=1.0), minimum=True)


def fmn(job: Job) -> Attack:
    kind = {"linf": fb.attacks.LInfFMNAttack, "l2": fb.attacks.L2FMNAttack}[job.norm]
    attack = kind(steps=job.options["steps"], max_stepsize=job.options["alpha"])
    return _bind(job, attack, minimum=True)


def hopskipjump(job: Job) -> Attack:
    attack = fb.attacks.HopSkipJumpAttack(
        steps=job.options["steps"], initial_gradient_eval_steps=job.options["draws"], constraint=job.norm
    )
    return _bind(job, attack, minimum=True)


def boundary(job: Job) -> Attack:
    return _bind(job, fb.attacks.BoundaryAttack(steps=job.options["steps"]), minimum=True)
