"""Defences in front of a classifier: closed forms first, then what must not depend on the batch."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.estimators import straight_through
from maodun.core.oracle import is_stochastic
from maodun.core.streams import Stream
from maodun.defenses import Defended, build_defense
from maodun.defenses.preprocessing import PREPROCESSORS
from maodun.defenses.preprocessing.jpeg import cosine_transform, quantisation_tables
from maodun.defenses.smoothing.noise import GaussianNoise


def images(n: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def smooth(n: int, c: int, side: int) -> Tensor:
    """Pictures with structure: noise enlarged four times."""
    return nn.functional.interpolate(images(n, c, side // 4, side // 4), scale_factor=4, mode="bilinear")


# Quilting needs a bank of patches and images larger than a patch: tests/test_filters.py has it.
IN_FRONT = [each for each in (*PREPROCESSORS, GaussianNoise) if each.name != "quilting"]
NAMES = sorted(each.name for each in IN_FRONT)
STOCHASTIC = {each.name for each in IN_FRONT if each.spec.stochastic}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 13, 10), (2, 3, 1, 1), (1, 4, 32, 24)])
def test_shape_and_range_are_kept(name: str, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    defense = build_defense(name)
    for out in (defense(x), defense.bpda_partner(x)):
        assert out.shape == x.shape
        if name == "gaussian_noise":
            continue  # clipped noise would not be the noise that a certificate is about
        assert float(out.min()) >= 0.0
        assert float(out.max()) <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_declarations_are_true(name: str) -> None:
    defense = build_defense(name)
    x = smooth(2, 3, 16).requires_grad_()
    out = (defense(x) ** 2).sum()
    gradient = torch.autograd.grad(out, x)[0] if out.requires_grad else torch.zeros_like(x)
    assert bool((gradient != 0).any()) == defense.spec.differentiable
    assert defense.broken != defense.spec.differentiable
    (partner,) = torch.autograd.grad((defense.bpda_partner(x) ** 2).sum(), x)
    assert bool((partner != 0).any())
    assert defense.stochastic == is_stochastic(Defended(defense, nn.Flatten()))
    assert torch.equal(defense(x), defense(x)) != defense.stochastic


@pytest.mark.parametrize("name", sorted(set(NAMES) - STOCHASTIC))
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    x = smooth(5, 3, 16)
    defense = build_defense(name)
    alone = torch.cat([defense(row[None]) for row in x])
    assert torch.allclose(defense(x), alone, atol=1e-6)


class TestBitDepth:
    def test_grid_and_nearest_level(self) -> None:
        x = images(4, 1, 6, 6)
        for bits in (1, 3, 8):
            out = build_defense("bit_depth", bits=bits)(x) * (2**bits - 1)
            assert torch.allclose(out, out.round(), atol=1e-5)
            assert float((out / (2**bits - 1) - x).abs().max()) <= 0.5 / (2**bits - 1) + 1e-6

    def test_known_values_of_any_rank(self) -> None:
        squeeze = build_defense("bit_depth", bits=1)
        assert squeeze(torch.tensor([[0.0, 0.49, 0.51, 1.0]])).tolist() == [[0.0, 0.0, 1.0, 1.0]]
        assert torch.equal(squeeze(squeeze(images(2, 1, 4, 4))), squeeze(images(2, 1, 4, 4)))


class TestMedian:
    def test_known_patch(self) -> None:
        patch = torch.tensor([[0.1, 0.9, 0.2], [0.8, 1.0, 0.3], [0.7, 0.4, 0.6]])[None, None]
        out = build_defense("median")(patch)[0, 0]
        assert float(out[1, 1]) == pytest.approx(0.6)
        # Top left corner with borders repeated: 0.1 four times, 0.9 twice, 0.8 twice, 1.0 once.
        assert float(out[0, 0]) == pytest.approx(0.8)
        assert float(build_defense("median").bpda_partner(patch)[0, 0, 1, 1]) == pytest.approx(float(patch.mean()))

    @pytest.mark.parametrize("size", [3, 5])
    def test_every_window_against_numpy(self, size: int) -> None:
        x = images(2, 3, 9, 6)
        padded = np.pad(x.numpy(), ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
        assert np.array_equal(build_defense("median", size=size)(x).numpy(), np.median(windows, axis=(4, 5)))

    def test_single_specks_vanish_and_size_one_is_the_identity(self) -> None:
        x = torch.full((1, 1, 7, 7), 0.25)
        x[0, 0, 3, 3] = 1.0
        assert torch.equal(build_defense("median")(x), torch.full_like(x, 0.25))
        assert torch.equal(build_defense("median", size=1)(x), x)


class TestJPEG:
    def pillow(self, x: Tensor, quality: int, subsample: bool) -> Tensor:
        decoded = []
        for image in (x * 255).round().to(torch.uint8):
            array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "JPEG", quality=quality, subsampling=2 if subsample else 0)
            array = np.asarray(Image.open(buffer))
            decoded.append(torch.tensor(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))
        return torch.stack(decoded)

    def test_transform_is_orthonormal_and_its_first_row_the_mean(self) -> None:
        matrix = cosine_transform()
        assert torch.allclose(matrix @ matrix.T, torch.eye(64), atol=1e-6)
        assert torch.allclose(matrix[0], torch.full((64,), 1 / 8))

    @pytest.mark.parametrize("quality", [1, 30, 50, 75, 100])
    def test_tables_are_those_of_the_reference_library(self, quality: int) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        tables = Image.open(buffer).quantization  # type: ignore[attr-defined]
        for ours, theirs in zip(quantisation_tables(quality), (tables[0], tables[1]), strict=True):
            assert ours.flatten().tolist() == list(theirs)

    def test_quality_100_is_close_to_the_identity_and_a_flat_image_exact(self) -> None:
        x = smooth(2, 3, 16)
        error = (build_defense("jpeg", quality=100, subsample=False)(x) - x).abs() * 255
        assert float(error.max()) < 5
        assert float(error.mean()) < 1
        flat = torch.full((1, 1, 11, 9), 128 / 255)
        assert torch.equal(build_defense("jpeg", quality=5)(flat), flat)

    @pytest.mark.parametrize(("channels", "subsample", "levels"), [(1, False, 0.5), (3, False, 0.7), (3, True, 1.2)])
    @pytest.mark.parametrize("quality", [50, 90])
    def test_agrees_with_the_reference_library(
        self, channels: int, subsample: bool, levels: float, quality: int
    ) -> None:
        x = smooth(6, channels, 20)
        reference = self.pillow(x, quality, subsample)
        ours = build_defense("jpeg", quality=quality, subsample=subsample)(x) * 255
        assert torch.allclose(ours, ours.round(), atol=1e-3)
        # Ties in rounding fall differently now and then; a wrong table, shift or matrix shows as whole levels.
        assert float((ours - reference).abs().mean()) < levels
        assert float((ours - reference).abs().mean()) < 0.5 * float((reference - x * 255).abs().mean())

    def test_partner_without_subsampling_is_the_identity(self) -> None:
        x = images(2, 3, 12, 20)
        partner = build_defense("jpeg", quality=20, subsample=False).bpda_partner(x)
        assert torch.allclose(partner, x, atol=2e-4)


class TestRandomResizePad:
    def drawn(self, x: Tensor, ids: list[int], number: int = 0, seed: int = 0) -> Tensor:
        with context.draw(Stream(seed, "test"), torch.tensor(ids), number):
            return build_defense("random_resize_pad")(x)

    @pytest.mark.parametrize("side", [8, 32])
    def test_draw_belongs_to_seed_sample_and_number(self, side: int) -> None:
        x = images(4, 1, side, side)
        together = self.drawn(x, [10, 11, 12, 13])
        assert torch.equal(together, self.drawn(x, [10, 11, 12, 13]))
        shuffled = self.drawn(x[[2, 0, 3, 1]], [12, 10, 13, 11])
        assert torch.equal(shuffled, together[[2, 0, 3, 1]])
        for k in range(4):
            assert torch.allclose(self.drawn(x[k : k + 1], [10 + k]), together[k : k + 1], atol=1e-6)
        many = {self.drawn(x[:1], [10], number).numpy().tobytes() for number in range(20)}
        assert len(many) > 5
        assert not torch.equal(self.drawn(x, [10, 11, 12, 13], seed=1), together)

    def test_canvas_holds_a_shrunken_picture(self) -> None:
        ones = torch.ones(200, 1, 8, 8)
        out = self.drawn(ones, list(range(200)))
        areas = out.sum((1, 2, 3))
        assert set(areas.tolist()) == {36.0, 49.0, 64.0}
        assert set(out.unique().tolist()) == {0.0, 1.0}
        corner = out[areas == 36.0]
        assert {tuple(map(tuple, image[0].nonzero()[:1].tolist())) for image in corner} == {
            ((top, left),) for top in range(3) for left in range(3)
        }

    def test_full_size_is_the_identity_and_fill_is_used(self) -> None:
        x = images(3, 3, 9, 9)
        assert torch.allclose(build_defense("random_resize_pad", smallest=1.0)(x), x, atol=1e-5)
        zeros = torch.zeros(50, 1, 8, 8)
        assert float(build_defense("random_resize_pad", fill=0.5)(zeros).max()) == 0.5

    def test_partner_has_the_same_derivative_inside_an_oracle_call(self) -> None:
        x = images(3, 1, 8, 8).requires_grad_()
        model = Defended(build_defense("random_resize_pad"), nn.Flatten())
        gradients = []
        for through_partner in (False, True):
            with context.draw(Stream(0, "test"), torch.tensor([4, 5, 6]), 0):
                if through_partner:
                    with straight_through(model, {}):
                        out = model(x)
                else:
                    out = model(x)
            gradients.append(torch.autograd.grad((out**2).sum(), x)[0])
        assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_bpda_keeps_the_value_and_takes_the_partners_derivative() -> None:
    model = Defended(build_defense("bit_depth", bits=2), nn.Flatten())
    x = images(2, 1, 4, 4).requires_grad_()
    with straight_through(model, {}):
        out = model(x)
    assert torch.allclose(out, model(x), atol=1e-6)
    assert torch.allclose(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bit-depth", {}, "did you mean 'bit_depth'"),
        ("bit_depth", {"bit": 3}, "did you mean 'bits'"),
        ("bit_depth", {"bits": 0}, "1 to 8 bits"),
        ("bit_depth", {"bits": 2.5}, "not of type int"),
        ("median", {"size": 4}, "odd side"),
        ("jpeg", {"quality": 0}, "1 to 100"),
        ("jpeg", {"quality": True}, "not of type int"),
        ("random_resize_pad", {"smallest": 0}, "share of the old side"),
        ("random_resize_pad", {"fill": 2.0}, "pixel value"),
        ("none", {"bits": 3}, "leave it out"),
        ("gaussian", {"sigma": 0}, "width in pixels"),
        ("bilateral", {"radius": 0}, "at least one pixel"),
        ("bilateral", {"colour": 0.0}, "must be positive"),
        ("bilateral", {"library": "pillow"}, "use torch or opencv"),
        ("non_local_means", {"patch": 2}, "odd side"),
        ("non_local_means", {"strength": 0.0}, "difference of pixel values"),
        ("non_local_means", {"distance": 0}, "nothing to compare"),
        ("total_variation", {"weight": 0.0}, "must be positive"),
        ("total_variation", {"steps": 0}, "at least one"),
        ("jpeg_codec", {"quality": 101}, "1 to 100"),
        ("crop_rescale", {"share": 1.5}, "share of the old side"),
        ("crop_rescale", {"crops": 0}, "at least one"),
        ("quilting", {"side": 3, "overlap": 3}, "overlap by less than a side"),
        ("quilting", {"source": "nowhere.npz"}, "cannot be read"),
    ],
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_defense(name, **options)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none", "bit_depth", "gaussian_noise"}))
def test_image_defences_refuse_vectors(name: str) -> None:
    with pytest.raises(InputError, match="images N x C x H x W"):
        build_defense(name)(torch.rand(3, 7))
