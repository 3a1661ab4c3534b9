"""Upsampling and convolution in one go: diffusers' numbers and derivatives, and only where it applies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.defenses.purification import DiffusionFilter, Replay
from maodun.defenses.purification.network import ScoreNetwork, new_network
from maodun.defenses.purification.upsampling import doubling_kernel, fuse_upsampling

pytest.importorskip("diffusers")


def layer(**options: object) -> nn.Module:
    from diffusers.models.upsampling import Upsample2D

    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        return Upsample2D(4, use_conv=True, **options).requires_grad_(False)


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 4, 3, 5, generator=torch.Generator().manual_seed(1))


def before(out: Tensor) -> str:
    """Return what the convolution was given."""
    return out.grad_fn.next_functions[0][0].name()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_and_both_derivatives_are_those_of_upsampling_then_convolving(layout: torch.memory_format) -> None:
    plain = layer(out_channels=6).double()
    fused = copy.deepcopy(plain).to(memory_format=layout)
    fuse_upsampling(fused)
    x = images().double().contiguous(memory_format=layout)
    found = []
    for net in (plain, fused):
        at = x.clone().requires_grad_(True)
        out = net(at)
        (slope,) = torch.autograd.grad(out.pow(3).sum(), at, create_graph=True)
        (bend,) = torch.autograd.grad(slope.square().sum(), at)
        found.append((out.detach(), slope.detach(), bend, before(out)))
    assert ["Upsample" in each[3] for each in found] == [True, False]
    for one, other in zip(found[0][:3], found[1][:3], strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-10, rtol=1e-10)


def test_the_kernel_by_hand() -> None:
    # One bright pixel lights the 2x2 block it becomes, and each convolution tap sees the block once.
    weight = torch.arange(9.0).reshape(1, 1, 3, 3)
    pixel = torch.zeros(1, 1, 5, 5)
    pixel[0, 0, 2, 2] = 1.0
    want = F.conv2d(F.interpolate(pixel, scale_factor=2.0), weight, padding=1)
    assert torch.equal(F.conv_transpose2d(pixel, doubling_kernel(weight), stride=2, padding=1), want)
    assert float(doubling_kernel(weight).sum()) == 4 * float(weight.sum())


def test_changed_weights_count_and_the_state_is_the_same() -> None:
    plain, fused = layer(), layer()
    fuse_upsampling(fused)
    assert list(plain.state_dict()) == list(fused.state_dict())
    for net in (plain, fused):
        net.conv.weight.data.mul_(3.0)
    assert torch.allclose(plain(images()), fused(images()), atol=1e-5)


@pytest.mark.parametrize("case", ["learning", "few", "sized", "no convolution", "transposed", "wide", "bf16"])
def test_everything_else_is_left_to_diffusers(case: str) -> None:
    changes = {"transposed": {"use_conv_transpose": True}, "wide": {"kernel_size": 5, "padding": 2}}
    plain = layer(**changes.get(case, {}))
    if case == "no convolution":
        from diffusers.models.upsampling import Upsample2D

        plain = Upsample2D(4)
    plain.requires_grad_(case == "learning")
    if case == "bf16":
        plain = plain.bfloat16()
    fused = copy.deepcopy(plain)
    fuse_upsampling(fused)
    x = images(1 if case == "few" else 8)
    x = x.bfloat16() if case == "bf16" else x
    size = [(7, 9)] if case == "sized" else []
    if case == "bf16":
        assert torch.allclose(fused(x).float(), plain(x).float(), atol=0.1)
    else:
        assert torch.equal(fused(x, *size), plain(x, *size))


def network() -> ScoreNetwork:
    return new_network((1, 8, 8), channels=(8, 8), groups=4, top=0.5, seed=3)


def test_a_filter_purifies_as_before_and_replays_bit_for_bit() -> None:
    purifier = DiffusionFilter(network(), steps=2)
    old = DiffusionFilter(network(), steps=2)
    for module in old.modules():
        if type(module).__name__ == "Upsample2D":
            module.__class__ = type(module).__mro__[2]
    kinds = [{type(m) for m in each.modules() if type(m).__name__ == "Upsample2D"} for each in (purifier, old)]
    assert len(kinds[0]) == 1
    assert kinds[0] != kinds[1]
    x = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(purifier.purify(x), old.purify(x), atol=1e-5)
    purifier.gradient = Replay(check=True)
    at = x.clone().requires_grad_(True)
    purifier(at).square().sum().backward()
    assert at.grad is not None
    assert float(at.grad.abs().max()) > 0
