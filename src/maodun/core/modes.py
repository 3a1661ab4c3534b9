"""The state a model is held in while it is attacked, and the promise to give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode and freeze every parameter; restore each flag exactly on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def conv_weights_channels_last(model: nn.Module) -> Iterator[None]:
    """Lay the weights of 2-D convolutions out channels-last on a CPU; give the old tensors back on leaving.

    Only strides change, never values. Convolutions then run channels-last whatever the layout of their input, which
    makes gradients about a fifth and forwards up to a third cheaper (benchmarks/README.md).
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.device.type == "cpu"]
    kept = [(weight, weight.data) for weight in dict.fromkeys(weights)]
    try:
        for weight, data in kept:
            # Not contiguous(): it leaves kernels of one channel with strides that do not say channels-last.
            weight.data = data.to(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in kept:
            weight.data = data


class _Affine(nn.modules.batchnorm._BatchNorm):
    """A batch norm that answers with one multiply-add per entry where its statistics and weights are constants.

    Elsewhere (train mode, no running statistics, weights that need a gradient, another precision than the weights',
    a wrong number of channels) it is what it was. It holds nothing of its own: weights are read at every call.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch
        """Return the normalised input, N x C x ..."""
        x = input
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if self.training or mean is None or var is None or not self._fits(x, var):
            return super().forward(x)
        if torch.is_grad_enabled() and self.affine and (weight.requires_grad or bias.requires_grad):
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * weight
        shift = torch.addcmul(bias, mean, scale, value=-1.0) if self.affine else -mean * scale
        wide = (1, -1) + (1,) * (x.ndim - 2)
        return torch.addcmul(shift.view(wide), x, scale.view(wide))

    def _fits(self, x: Tensor, var: Tensor) -> bool:
        return x.ndim > 1 and x.shape[1] == self.num_features and x.dtype == var.dtype


class _Affine1d(_Affine, nn.BatchNorm1d):
    pass


class _Affine2d(_Affine, nn.BatchNorm2d):
    pass


class _Affine3d(_Affine, nn.BatchNorm3d):
    pass


_AFFINE: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Affine1d,
    nn.BatchNorm2d: _Affine2d,
    nn.BatchNorm3d: _Affine3d,
}


@contextmanager
def affine_norms(model: nn.Module) -> Iterator[None]:
    """Let batch norms with constant statistics and weights on a CPU answer with one multiply-add; restore on leaving.

    The same numbers up to rounding. The gradient of a batch norm in evaluation mode, as torch takes it, keeps the input
    and looks through it once more; here it is one product, and an attack's step costs a twelfth less (docs/measured.md,
    speed of training). Only the class of the modules changes: hooks, shared modules, replaced weights and copies work
    as ever. Subclasses, and compiled models, which fuse for themselves, are left alone.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    try:
        for module in () if compiled else model.modules():
            kind = type(module)
            var = getattr(module, "running_var", None) if kind in _AFFINE else None
            if isinstance(var, Tensor) and var.device.type == "cpu":
                module.__class__ = _AFFINE[kind]
                changed.append((module, kind))
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def refuse_training_batchnorm(model: nn.Module) -> None:
    """Raise InputError when a BatchNorm layer is in training mode: its output would depend on the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise InputError(
                "model",
                f"is in training mode and contains BatchNorm ('{name}'), so answers depend on the batch",
                "call model.eval() first",
            )
