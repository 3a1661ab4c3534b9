"""Refusals before long work: inputs, labels and models that cannot be what the user means."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.oracle import Session
from maodun.core.threat import Threat

_CHANCE_SAMPLES = 50


def check_samples(
    x: Tensor, y: Tensor, targets: Tensor | None, ids: Tensor | None, threat: Threat
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return float32 inputs, int64 labels, targets and ids, or raise InputError saying which of them is unusable."""
    x = check_inputs(x)
    y = _labels("labels", y, x)
    if threat.targeted != (targets is not None):
        raise InputError(
            "targets",
            "are missing for a targeted threat" if targets is None else "were given for an untargeted threat",
            "give both Threat(targeted=True) and targets, or neither",
        )
    if targets is not None:
        targets = _labels("targets", targets, x)
    if ids is None:
        ids = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    return x, y, targets, ids.to(x.device, torch.int64)


def check_inputs(x: Tensor) -> Tensor:
    """Return `x` as contiguous float32, or raise InputError when it is not finite or not in [0, 1]."""
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise InputError("inputs", "must be a tensor N x ...", "stack the samples along a first axis")
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise InputError("inputs", f"have type {x.dtype}", "give floating point values in [0, 1]")
    if x.dtype == torch.uint8:
        raise InputError("inputs", "are 8-bit integers", "divide by 255 to get values in [0, 1]")
    x = x.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(x).all()):
        raise InputError("inputs", "contain NaN or infinite values", "clean the data first")
    if x.numel() == 0:
        return x
    low, high = float(x.min()), float(x.max())
    if low >= -1e-6 and high <= 1.0 + 1e-6:
        return x.clamp(0.0, 1.0)
    if low >= 0.0 and high > 1.5:
        raise InputError("inputs", f"range over [{low:.3g}, {high:.3g}], as 0-255 pixels do", "divide by 255")
    raise InputError(
        "inputs",
        f"range over [{low:.3g}, {high:.3g}], as standardised data do",
        "keep data in [0, 1] and put the normalisation inside the model",
    )


def _labels(name: str, y: Tensor, x: Tensor) -> Tensor:
    if not isinstance(y, Tensor) or y.ndim != 1 or y.shape[0] != x.shape[0]:
        raise InputError(name, f"must be one integer per sample, {x.shape[0]} in all", "pass a tensor of shape (N,)")
    if y.is_floating_point() or y.is_complex():
        raise InputError(name, f"have type {y.dtype}", "pass integer class numbers")
    if y.numel() and int(y.min()) < 0:
        raise InputError(name, f"contain {int(y.min())}", "classes are numbered from 0")
    return y.to(x.device, torch.int64)


def check_outputs(logits: Tensor, y: Tensor, targets: Tensor | None, access: str = "gradient") -> None:
    """Raise InputError when clean outputs cannot be logits of a model that knows this data.

    Refused: not N x C, a single class, labels beyond C, all NaN, probabilities, and accuracy no better than guessing
    on at least 50 samples (one-sided binomial test at 1 %).
    """
    if logits.ndim != 2 or logits.shape[0] != y.shape[0]:
        raise InputError(
            "model", f"returns shape {tuple(logits.shape)}", f"return logits of shape ({y.shape[0]}, classes)"
        )
    classes = logits.shape[1]
    if classes < 2:
        raise InputError(
            "model", "returns 1 value per sample", "return one logit per class; for a binary score s return (-s, s)"
        )
    for name, labels in (("labels", y), ("targets", targets)):
        if labels is not None and labels.numel() and int(labels.max()) >= classes:
            raise InputError(
                name,
                f"contain {int(labels.max())} but the model has {classes} classes",
                f"use labels 0 to {classes - 1}",
            )
    if not bool(torch.isfinite(logits).any()):
        raise InputError(
            "model", "returns only NaN or infinite logits on clean inputs", "check its weights and its input range"
        )
    if access == "gradient":
        refuse_probabilities(logits)
    if targets is None:
        refuse_chance(logits, y)


def refuse_probabilities(logits: Tensor) -> None:
    """Raise InputError when every row is non-negative and sums to one: gradients through a softmax underflow."""
    if logits.shape[0] and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1.0).abs() < 1e-4).all()):
        raise InputError(
            "model",
            "returns probabilities (every row is non-negative and sums to 1), which hides gradients",
            "return the logits before the softmax",
        )


def refuse_chance(logits: Tensor, y: Tensor) -> None:
    """Raise InputError when the clean accuracy on 50 samples or more is no better than guessing."""
    n, classes = logits.shape
    if n < _CHANCE_SAMPLES:
        return
    from scipy.stats import binomtest

    right = int((logits.argmax(1) == y).sum())
    share = float(torch.bincount(y).max()) / n
    if binomtest(right, n, 1.0 / classes, alternative="greater").pvalue > 0.01 and share < 0.9:
        raise InputError(
            "model",
            f"is right on {right} of {n} clean samples, no better than guessing among {classes} classes",
            "check the normalisation inside the model, the order of classes and the weights",
        )


def looks_stochastic(session: Session, x: Tensor) -> bool:
    """Tell whether two evaluations of a few samples differ by more than rounding; counts nothing."""
    few = x[: min(8, x.shape[0])]
    if few.shape[0] == 0:
        return False
    index = torch.arange(few.shape[0], device=x.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        first, second = (session.call(few, index, torch.full_like(index, number)) for number in (0, 1))
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)
