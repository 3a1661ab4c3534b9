"""Batch norms of constants answer with a multiply-add: the same numbers, and only where they may."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from maodun.attacks.gradient.pgd import PGD
from maodun.core.modes import affine_norms, conv_weights_channels_last, evaluation_mode
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.defenses.training import Batch, Inner
from maodun.zoo.architectures import build_architecture


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and weights that it could have learnt."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0.0, 0.3, generator=draw)
            module.running_var.uniform_(0.3, 3.0, generator=draw)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5, generator=draw)
                nn.init.normal_(module.bias, 0.0, 0.3, generator=draw)
    return model


def slope(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the gradient of a smooth function of them."""
    x = x.clone().requires_grad_(True)
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.square().mean(), x)[0]


def graph(model: nn.Module, x: Tensor) -> str:
    """Return the names of the steps back from the logits to the input."""
    node, names = model(x.clone().requires_grad_(True)).grad_fn, []
    while node is not None:
        names.append(node.name())
        node = next((before for before, _ in node.next_functions if before is not None), None)
    return " ".join(names)


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]


def smooth(width: int, **options: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width, **options), nn.Softplus(), *head(width))


def shared() -> nn.Module:
    norm = nn.BatchNorm2d(6)
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Softplus(), nn.Conv2d(6, 6, 3), norm, *head(6))


def sequence() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.BatchNorm1d(310))


NETS: dict[str, Callable[[], nn.Module]] = {
    "conv-bn": lambda: smooth(8),
    "without weights": lambda: smooth(8, affine=False),
    "shared": shared,
    "one axis": sequence,
    "volume": lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 4, (1, 3, 3)), nn.BatchNorm3d(4)),
    "preact-resnet8": lambda: build_architecture("preact-resnet8", {}),
    "vgg-small": lambda: build_architecture("vgg-small", {"widths": (8, 8, 16, 16)}),
}


def images(n: int = 3, side: int = 8) -> Tensor:
    return Stream(3, "images").uniform(torch.arange(n), (3, side, side))


@pytest.mark.parametrize("name", list(NETS))
def test_answers_and_gradients_are_those_of_the_plain_net(name: str) -> None:
    model, x = settled(NETS[name]()), images(side=16 if "-small" in name or "-resnet" in name else 8)
    with evaluation_mode(model):
        logits, gradient = slope(model, x)
        # The sign of a ReLU's input may hang on the last bit: judged at double precision, where none does here.
        exact = slope(copy.deepcopy(model).double(), x.double())
        with affine_norms(model):
            found = slope(model, x)
            double = slope(copy.deepcopy(model).double(), x.double())
    assert torch.allclose(found[0], logits, atol=1e-5, rtol=1e-5)
    assert torch.allclose(found[1], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)
    for one, other in zip(double, exact, strict=True):
        assert torch.allclose(one, other, atol=1e-12 * float(other.abs().max()), rtol=1e-10)


def test_it_computes_otherwise_only_inside_and_gives_the_class_back() -> None:
    model, x = settled(smooth(8)), images()
    calls: list[str] = []
    with evaluation_mode(model):
        for _ in range(2):
            calls.append(graph(model, x))
            with affine_norms(model), affine_norms(model):
                calls.append(graph(model, x))
                assert isinstance(model[1], nn.BatchNorm2d)
    assert type(model[1]) is nn.BatchNorm2d
    assert ["BatchNorm" in each for each in calls] == [True, False, True, False]


def test_an_error_inside_gives_the_class_back_too() -> None:
    model = smooth(8)
    with pytest.raises(ValueError, match="inside"), affine_norms(model):
        raise ValueError("inside")
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("case", ["train mode", "no statistics", "weights that learn"])
def test_what_is_not_constant_is_left_to_torch(case: str) -> None:
    model, x = settled(smooth(8, track_running_stats=case != "no statistics")), images(6)
    model.train(case == "train mode")
    twin = copy.deepcopy(model)
    with affine_norms(model):
        out = model(x)
    assert torch.equal(out, twin(x))
    out.sum().backward()
    assert model[1].weight.grad is not None
    if case != "no statistics":
        assert torch.equal(model[1].running_mean, twin[1].running_mean)


def test_wrong_shapes_are_refused_as_ever() -> None:
    model = settled(nn.BatchNorm2d(1)).eval().requires_grad_(False)
    with affine_norms(model):
        with pytest.raises(RuntimeError, match="running_mean"):
            model(images())
        with pytest.raises(ValueError, match="4D"):
            model(torch.zeros(2, 1))


def test_replaced_weights_changed_weights_and_hooks_count() -> None:
    model, x = settled(smooth(8)), images()
    seen: list[Tensor] = []
    moved = {"1.weight": torch.linspace(0.5, 2.0, 8), "1.running_mean": torch.linspace(-1.0, 1.0, 8)}
    with evaluation_mode(model):
        want = functional_call(model, moved, (x,))
        with affine_norms(model):
            assert torch.allclose(functional_call(model, moved, (x,)), want, atol=1e-5)
            model[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
            for name, value in moved.items():
                model.get_submodule("1").__getattr__(name.split(".")[1]).copy_(value)
            assert torch.allclose(model(x), want, atol=1e-5)
    assert len(seen) == 1


def test_bf16_keeps_its_precision() -> None:
    model, x = settled(smooth(8)), images()
    with evaluation_mode(model), torch.autocast("cpu", torch.bfloat16):
        want = model[1](model[0](x))
        with affine_norms(model):
            found = model[1](model[0](x))
    assert found.dtype == want.dtype
    assert torch.equal(found, want)


def test_compiled_models_and_subclasses_are_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Own(3), nn.BatchNorm2d(3)).eval()
    with affine_norms(model):
        assert type(model[0]) is Own
        assert type(model[1]) is not nn.BatchNorm2d
    model._compiled_call_impl = model._call_impl  # as model.compile() leaves it, without the wait
    with affine_norms(model):
        assert type(model[1]) is nn.BatchNorm2d


def test_an_attack_finds_the_same_with_and_without() -> None:
    model, x, threat = settled(smooth(8)).eval(), images(6), Threat("l2", 1.0)
    with torch.no_grad():
        y = model(x).argmin(1)
    starts = PGD(steps=5, loss="margin", random_start=False)
    inner = Inner(starts, threat)
    batch = Batch(x, y, torch.arange(6), 0)
    with evaluation_mode(model):
        fast = inner(model, batch)
        slow = starts.run(Oracle(model, channels_last=False, surrogate=True), x, y, threat, check_model=False).x_adv
    assert torch.allclose(fast, slow, atol=1e-5)
    assert float((fast - x).flatten(1).norm(dim=1).min()) > 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_a_first_convolution_hands_on_channels_last_whatever_its_input(channels: int) -> None:
    model, x = nn.Conv2d(channels, 8, 3), torch.rand(4, channels, 8, 8)
    assert not model(x).is_contiguous(memory_format=torch.channels_last)
    strides = model.weight.stride()
    with conv_weights_channels_last(model):
        assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert model.weight.stride() == strides
