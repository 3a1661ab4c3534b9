"""Batch norms of weights that no batch has ever been through."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def refresh_norms(model: nn.Module, x: Tensor, batch_size: int) -> None:
    """Set the running statistics of every batch norm to the mean over the batches of `x` (N x ...); nothing else moves.

    A mean of weights has other features than any of the weights it is the mean of, so the statistics must be taken
    anew (Izmailov et al., UAI 2018). One forward pass, in batches of about `batch_size`; modes are left as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    try:
        with torch.no_grad():
            # Equal parts: a last batch of one would count as much as the others.
            for part in torch.chunk(x, math.ceil(x.shape[0] / batch_size)):
                model(part.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
