"""ART 1.20.1. Numpy in, numpy out: the copies are part of its price."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier

from benchmarks.job import Attack, Job


def _classifier(job: Job) -> PyTorchClassifier:
    return PyTorchClassifier(
        job.model, torch.nn.CrossEntropyLoss(), input_shape=tuple(job.x.shape[1:]), nb_classes=job.classes,
        clip_values=(0.0, 1.0), device_type="cpu",
    )  # fmt: skip


class _Float(torch.nn.Module):
    """Some attacks hand over float64, some want probabilities."""

    def __init__(self, model: torch.nn.Module, *, softmax: bool) -> None:
        super().__init__()
        self.model, self.softmax = model, softmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x.float())
        return logits.softmax(1) if self.softmax else logits


def _asked(job: Job, *, softmax: bool = False) -> PyTorchClassifier:
    return _classifier(dataclasses.replace(job, model=_Float(job.model, softmax=softmax).eval()))


def _unlabelled(job: Job, attack: Any) -> Attack:
    x = job.x.numpy()
    return lambda: torch.from_numpy(attack.generate(x=x)).float()


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


def hopskipjump(job: Job) -> Attack:
    attack = evasion.HopSkipJump(
        _asked(job), norm=job.p if job.norm != "linf" else "inf", max_iter=job.options["steps"], max_eval=10000,
        init_eval=job.options["draws"], verbose=False,
    )  # fmt: skip
    return _unlabelled(job, attack)


def geoda(job: Job) -> Attack:
    np.mat = np.asmatrix  # noqa: NPY201 -- removed in numpy 2, still used there
    side = min(job.x.shape[2:])
    attack = evasion.GeoDA(
        _asked(job), norm=job.p, max_iter=job.options["queries"], bin_search_tol=0.01, sub_dim=side, verbose=False
    )
    return _unlabelled(job, attack)


def simba(job: Job) -> Attack:
    side = min(job.x.shape[2:])
    attack = evasion.SimBA(
        _asked(job, softmax=True), attack="dct", max_iter=job.options["queries"] // 2, epsilon=0.2, order="diag",
        freq_dim=side, stride=1, verbose=False,
    )  # fmt: skip
    labels = torch.nn.functional.one_hot(job.y, job.classes).numpy()
    return lambda: torch.from_numpy(attack.generate(x=job.x.numpy(), y=labels)).float()
