"""Doubling an image and convolving it, as one transposed convolution: the same numbers for half of the products."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def fuse_upsampling(net: nn.Module) -> None:
    """Let diffusers' upsampling layers (nearest, by two, then a 3x3 convolution) on a CPU work in one go, in place.

    Each pixel stands there four times, so of the nine products of an output pixel five are repeated; a transposed
    convolution of stride 2 with the sums of the kernel's entries (4x4) makes each once. Equal up to rounding, with its
    derivatives. The weights stay what and where they are and are read at every call. Layers of another kind, other
    devices, weights that learn and batches smaller than the kernel are left to diffusers.
    """
    for module in net.modules():
        kind = type(module)
        if kind.__name__ == "Upsample2D" and kind.__module__.startswith("diffusers.") and _doubles(module):
            module.__class__ = _fused(kind)  # type: ignore[arg-type]


def doubling_kernel(weight: Tensor) -> Tensor:
    """Return the transposed convolution's kernel (C x K x 4 x 4) for a convolution's (K x C x 3 x 3)."""
    turned = weight.flip(2, 3).transpose(0, 1)
    wide = F.pad(turned, (0, 1, 0, 0)) + F.pad(turned, (1, 0, 0, 0))
    return F.pad(wide, (0, 0, 0, 1)) + F.pad(wide, (0, 0, 1, 0))


def _doubles(module: Any) -> bool:
    conv = getattr(module, "conv", None)
    if not isinstance(conv, nn.Conv2d) or module.use_conv_transpose or module.norm is not None:
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return bool(module.interpolate) and conv.padding_mode == "zeros" and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


class _Fused(nn.Module):
    """Put before diffusers' own class: it has the last word wherever the sizes are not simply doubled."""

    conv: nn.Conv2d

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the doubled and convolved images, N x K x 2H x 2W."""
        weight = self.conv.weight
        constant = not weight.requires_grad and weight.device.type == "cpu" and hidden_states.dtype == weight.dtype
        if output_size is None and constant and hidden_states.numel() >= weight.numel():
            return F.conv_transpose2d(hidden_states, doubling_kernel(weight), self.conv.bias, stride=2, padding=1)
        own: Tensor = super().forward(hidden_states, output_size, *args, **kwargs)
        return own


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Fused, kind), {"__doc__": kind.__doc__})
