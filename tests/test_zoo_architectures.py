"""Networks: the names published weights use, the parameter counts papers state, and initialisation by seed alone."""

from __future__ import annotations

import pytest
import torch

from maodun.core.errors import InputError
from maodun.zoo.architectures import ARCHITECTURES, build_architecture
from maodun.zoo.architectures.preact_resnet import PreActResNet
from maodun.zoo.architectures.wide_resnet import WideResNet

SHAPES = {"digits-cnn": (1, 8, 8), "ensemble": (1, 8, 8), "trades-mnist-cnn": (1, 28, 28)}
COUNTS = {
    "digits-cnn": 15_338,
    "preact-resnet8": 77_850,
    "preact-resnet18": 11_171_146,
    "wide-resnet-28-10": 36_479_194,
    "trades-mnist-cnn": 312_202,
    "resnet4b": 123_734,
    "resnet56": 853_018,
}


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"wide-resnet-28-10"}))
def test_maps_a_batch_to_finite_logits(name: str) -> None:
    model = build_architecture(name).eval()
    x = torch.rand(3, *SHAPES.get(name, (3, 32, 32)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (3, 10)
        assert torch.isfinite(logits).all()
        assert torch.allclose(model(x[1:2]), logits[1:2], atol=1e-3 * float(logits.abs().max()))


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_wide_resnet_has_the_published_names() -> None:
    with torch.device("meta"):
        names = set(WideResNet().state_dict())
    assert {"conv1.weight", "bn1.running_mean", "fc.weight", "fc.bias"} <= names
    assert {"block1.layer.0.convShortcut.weight", "block3.layer.3.bn2.weight", "block2.layer.1.conv2.weight"} <= names
    assert "block1.layer.1.convShortcut.weight" not in names
    assert len([name for name in names if name.endswith("conv1.weight")]) == 13
    assert not any("normalise" in name for name in names)
    with torch.device("meta"):
        assert "sub_block1.layer.0.conv1.weight" in WideResNet(duplicate_first_stage=True).state_dict()


def test_preact_resnet18_has_the_published_names() -> None:
    with torch.device("meta"):
        names = set(ARCHITECTURES["preact-resnet18"](mean=(0.5,) * 3, std=(0.2,) * 3).state_dict())
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            for part in ("bn1.weight", "conv1.weight", "bn2.bias", "conv2.weight"):
                assert f"layer{stage}.{block}.{part}" in names
    assert [name for name in sorted(names) if "shortcut" in name] == [
        f"layer{stage}.0.shortcut.0.weight" for stage in (2, 3, 4)
    ]
    assert {"conv1.weight", "linear.weight", "linear.bias"} <= names
    assert not any(name.startswith(("bn.", "normalise")) for name in names)


def test_shortcut_source_changes_the_function_not_the_names() -> None:
    raw = build_architecture("preact-resnet18", seed=1)
    activated = build_architecture("preact-resnet18", {"shortcut_from": "activated"}, seed=1)
    assert list(raw.state_dict()) == list(activated.state_dict())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(raw.eval()(x), activated.eval()(x))


def test_normalisation_is_inside_and_outside_the_state_dict() -> None:
    plain = PreActResNet((1,), (4,))
    inside = PreActResNet((1,), (4,), mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    inside.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(inside.eval()(x), plain.eval()(by_hand), atol=1e-6)


def test_weights_follow_from_the_seed_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_architecture("preact-resnet8", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_any_image_size_passes_the_residual_networks() -> None:
    with torch.no_grad():
        assert build_architecture("preact-resnet8").eval()(torch.rand(1, 3, 40, 24)).shape == (1, 10)


def test_refusals() -> None:
    with pytest.raises(InputError, match="did you mean 'resnet56'"):
        build_architecture("resnet57")
    with pytest.raises(InputError, match="options of 'digits-cnn'"):
        build_architecture("digits-cnn", {"depth": 3})
    with pytest.raises(InputError, match="6 n \\+ 4"):
        WideResNet(depth=29)
