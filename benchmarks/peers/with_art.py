"""ART 1.20.1. Numpy in, numpy out: the copies are part of its price."""

from __future__ import annotations

from typing import Any

import torch
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier

from benchmarks.job import Attack, Job


def _classifier(job: Job) -> PyTorchClassifier:
    return PyTorchClassifier(
        job.model, torch.nn.CrossEntropyLoss(), input_shape=tuple(job.x.shape[1:]), nb_classes=job.classes,
        clip_values=(0.0, 1.0), device_type="cpu",
    )  # fmt: skip


def _bind(job: Job, attack: Any) -> Attack:
    x, y = job.x.numpy(), job.y.numpy()
    return lambda: torch.from_numpy(attack.generate(x=x, y=y)).float()


def fgsm(job: Job) -> Attack:
    return _bind(job, evasion.FastGradientMethod(_classifier(job), eps=job.eps, batch_size=len(job.y)))


def pgd(job: Job) -> Attack:
    return _bind(
        job,
        evasion.ProjectedGradientDescent(
            _classifier(job), norm=job.p if job.norm != "linf" else "inf", eps=job.eps, eps_step=job.step_size,
            max_iter=job.options["steps"], num_random_init=1, batch_size=len(job.y), verbose=False,
        ),
    )  # fmt: skip


def mifgsm(job: Job) -> Attack:
    return _bind(
        job,
        evasion.MomentumIterativeMethod(
            _classifier(job), eps=job.eps, eps_step=job.step_size, max_iter=job.options["steps"],
            batch_size=len(job.y), verbose=False,
        ),
    )  # fmt: skip


def apgd_ce(job: Job) -> Attack:
    return _bind(
        job,
        evasion.AutoProjectedGradientDescent(
            _classifier(job), norm=job.p if job.norm != "linf" else "inf", eps=job.eps, eps_step=2 * job.eps,
            max_iter=job.options["steps"], nb_random_init=1, batch_size=len(job.y), loss_type="cross_entropy",
            verbose=False,
        ),
    )  # fmt: skip


def deepfool(job: Job) -> Attack:
    return _bind(
        job,
        evasion.DeepFool(
            _classifier(job), max_iter=job.options["steps"], epsilon=0.02, nb_grads=job.classes,
            batch_size=len(job.y), verbose=False,
        ),
    )  # fmt: skip


def square(job: Job) -> Attack:
    return _bind(
        job,
        evasion.SquareAttack(
            _classifier(job), norm=job.p if job.norm != "linf" else "inf", eps=job.eps, p_init=0.8,
            max_iter=job.options["queries"], nb_restarts=1, batch_size=len(job.y), verbose=False,
        ),
    )  # fmt: skip
