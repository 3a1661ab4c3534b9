"""Filters in front of a classifier against closed forms and other people's libraries."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses import Defended, build_defense
from maodun.defenses.preprocessing import Bilateral, CropRescale, Gaussian, NonLocalMeans, Quilting, TotalVariation
from maodun.defenses.preprocessing.total_variation import differences, divergence, objective


def images(n: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    """Pictures with structure and a little noise, of any size."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, c, 4, 4, generator=draw)
    smooth = nn.functional.interpolate(coarse, size=(h, w), mode="bilinear")
    return (smooth + 0.05 * torch.randn(n, c, h, w, generator=draw)).clamp(0, 1)


FILTERS = ["gaussian", "bilateral", "non_local_means", "total_variation", "jpeg_codec", "median"]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_constant_image_is_left_alone(name: str, channels: int) -> None:
    x = torch.full((2, channels, 9, 7), 128 / 255)
    assert torch.allclose(build_defense(name)(x), x, atol=1e-6)


@pytest.mark.parametrize("name", ["bilateral", "non_local_means", "total_variation"])
def test_derivative_agrees_with_finite_differences(name: str) -> None:
    defense = build_defense(name).double()
    x = images(1, 1, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(defense, (x,), eps=1e-7, atol=1e-4)


class TestGaussian:
    def test_is_a_known_matrix(self) -> None:
        blur, side = Gaussian(0.7), 5
        place = np.arange(-2, 3)
        kernel = np.exp(-0.5 * (place / 0.7) ** 2)
        kernel /= kernel.sum()
        line = np.zeros((side, side))
        for row in range(side):
            for offset, weight in zip(place, kernel, strict=True):
                line[row, np.clip(row + offset, 0, side - 1)] += weight
        basis = torch.eye(side * side).reshape(-1, 1, side, side)
        matrix = blur(basis).flatten(1).T
        assert np.allclose(matrix.numpy(), np.kron(line, line), atol=1e-6)

    def test_against_scipy(self) -> None:
        from scipy.ndimage import gaussian_filter

        x = images(2, 3, 11, 8)
        reference = gaussian_filter(x.numpy(), 1.3, mode="nearest", truncate=3, axes=(2, 3))
        assert np.allclose(Gaussian(1.3)(x).numpy(), reference, atol=1e-6)


class TestBilateral:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_against_opencv(self, channels: int) -> None:
        pytest.importorskip("cv2")
        x = images(2, channels, 13, 10)
        assert torch.allclose(Bilateral()(x), Bilateral(library="opencv")(x), atol=1e-5)

    def test_no_colour_range_leaves_edges_and_a_wide_one_is_a_blur(self) -> None:
        edge = torch.zeros(1, 1, 6, 6)
        edge[..., 3:] = 1.0
        assert torch.allclose(Bilateral(colour=0.05)(edge), edge, atol=1e-6)
        wide = Bilateral(radius=1, colour=1e4, space=1e4)(edge)[0, 0, 2]
        assert wide.tolist() == pytest.approx([0, 0, 0.2, 0.8, 1, 1], abs=1e-5)

    def test_partner_has_the_value_and_the_derivative_of_fixed_weights(self) -> None:
        pytest.importorskip("cv2")
        x = images(2, 3, 8, 8).requires_grad_()
        exact, partner = Bilateral()(x), Bilateral().bpda_partner(x)
        assert torch.equal(exact, partner)
        one, two = (torch.autograd.grad((out**2).sum(), x)[0] for out in (exact, partner))
        assert not torch.allclose(one, two)
        (other,) = torch.autograd.grad((Bilateral(library="opencv")(x) ** 2).sum(), x)
        assert torch.allclose(other, one, atol=1e-4)


class TestNonLocalMeans:
    def test_against_the_definition(self) -> None:
        x = images(1, 2, 7, 6)
        padded = np.pad(x[0].double().numpy(), ((0, 0), (3, 3), (3, 3)), mode="edge")
        expected = np.zeros((2, 7, 6))
        for row in range(7):
            for column in range(6):
                total, weights = np.zeros(2), 0.0
                own = padded[:, row + 2 : row + 5, column + 2 : column + 5]
                for down in range(-2, 3):
                    for right in range(-2, 3):
                        other = padded[:, row + down + 2 : row + down + 5, column + right + 2 : column + right + 5]
                        weight = np.exp(-((other - own) ** 2).mean() / 0.2**2)
                        total += weight * other[:, 1, 1]
                        weights += weight
                expected[:, row, column] = total / weights
        ours = NonLocalMeans(strength=0.2, patch=3, distance=2)(x)[0]
        assert np.allclose(ours.numpy(), expected, atol=1e-5)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_against_opencv_inside(self, channels: int) -> None:
        pytest.importorskip("cv2")
        x = images(2, channels, 20, 18)
        ours, theirs = NonLocalMeans()(x), NonLocalMeans(library="opencv")(x)
        inside = (ours - theirs).abs()[..., 5:-5, 5:-5] * 255
        # OpenCV works on 8-bit values with weights from a table.
        assert float(inside.max()) < 1.5


class TestTotalVariation:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_against_scikit_image(self, channels: int) -> None:
        restoration = pytest.importorskip("skimage.restoration")
        x = images(2, channels, 12, 15)
        ours = TotalVariation(weight=0.15, steps=10)(x)
        for image, mine in zip(x.permute(0, 2, 3, 1).numpy(), ours.permute(0, 2, 3, 1).numpy(), strict=True):
            theirs = restoration.denoise_tv_chambolle(image, weight=0.15, eps=0, max_num_iter=11, channel_axis=-1)
            assert np.allclose(mine, theirs.reshape(mine.shape), atol=1e-5)

    def test_the_objective_falls_towards_its_minimum(self) -> None:
        x, tv = images(3, 1, 12, 12), TotalVariation(weight=0.1)
        values = torch.stack([objective(tv.minimise(x, steps), x, 0.1) for steps in (0, 1, 3, 10, 30, 100)])
        assert bool((values[1:] < values[:-1]).all())
        assert float((values[-2] - values[-1]).max()) < 0.02 * float(values[0].min())

    def test_differences_and_divergence_are_adjoint(self) -> None:
        u, down, right = images(3, 1, 6, 5).double().unbind()
        du, dr = differences(u)
        down[..., -1, :], right[..., -1] = 0.0, 0.0
        left = (du * down + dr * right).sum()
        assert float(left) == pytest.approx(-float((u * divergence(down, right)).sum()))


class TestJPEGCodec:
    @pytest.mark.parametrize("shape", [(2, 3, 13, 9), (2, 1, 8, 8), (1, 4, 5, 6)])
    def test_is_pillow_byte_for_byte(self, shape: tuple[int, ...]) -> None:
        x = images(*shape)
        out = (build_defense("jpeg_codec", quality=40)(x) * 255).round().to(torch.uint8).numpy()
        for image, mine in zip((x * 255).round().to(torch.uint8).numpy(), out, strict=True):
            planes = [image.transpose(1, 2, 0)] if len(image) == 3 else list(image)
            read = []
            for plane in planes:
                file = io.BytesIO()
                Image.fromarray(plane).save(file, "JPEG", quality=40, subsampling=2)
                read.append(np.asarray(Image.open(file)))
            reference = read[0].transpose(2, 0, 1) if len(image) == 3 else np.stack(read)
            assert np.array_equal(mine, reference)

    def test_partner_is_that_of_jpeg_and_near_the_codec(self) -> None:
        x = images(3, 3, 16, 16)
        codec = build_defense("jpeg_codec", quality=90)
        assert torch.equal(codec.bpda_partner(x), build_defense("jpeg", quality=90).bpda_partner(x))
        assert float((codec.bpda_partner(x) - codec(x)).abs().mean()) < 0.02
        assert not any("JPEG" in type(module).__name__ for module in codec.children())


class TestCropRescale:
    def drawn(self, defense: CropRescale, x: Tensor, ids: list[int], number: int = 0) -> Tensor:
        with context.draw(Stream(0, "test"), torch.tensor(ids), torch.tensor([number] * len(ids))):
            return defense(x)

    def test_a_crop_is_a_piece_of_the_image(self) -> None:
        ramp = torch.arange(8.0).expand(200, 1, 8, 8) / 8
        out = self.drawn(CropRescale(share=0.5), ramp, list(range(200)))
        slope = out[:, 0, 0, 3] - out[:, 0, 0, 2]
        # Half the width spread over all of it: half the slope, and one of five places for the left border.
        assert torch.allclose(slope, torch.full_like(slope, 1 / 16), atol=1e-6)
        assert len(out[:, 0, 0, 3].mul(1000).round().unique()) == 5
        assert torch.allclose(self.drawn(CropRescale(share=1.0), ramp, list(range(200))), ramp, atol=1e-5)

    def test_draws_belong_to_the_sample(self) -> None:
        x, defense = images(4, 1, 9, 9), CropRescale()
        together = self.drawn(defense, x, [5, 6, 7, 8])
        assert torch.equal(self.drawn(defense, x[[2, 0]], [7, 5]), together[[2, 0]])
        assert not torch.equal(self.drawn(defense, x, [5, 6, 7, 8], number=1), together)

    def test_the_answer_is_the_mean_over_independent_crops(self) -> None:
        x, model = images(3, 1, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        defended = Defended(CropRescale(share=0.6, crops=4), model)
        with context.draw(Stream(0, "test"), torch.arange(3), torch.zeros(3, dtype=torch.int64)):
            answer = defended(x)
            parts = []
            for vote in range(4):
                with context.part(f"vote-{vote}"):
                    parts.append(model(defended.defense(x)).softmax(1))
        assert len({part[0, 0].item() for part in parts}) > 1
        assert torch.allclose(answer.exp(), torch.stack(parts).mean(0), atol=1e-6)


class TestQuilting:
    def test_patches_of_the_bank_rebuild_their_own_image(self) -> None:
        x = images(2, 3, 11, 8)
        quilt = Quilting(side=4, overlap=2, size=10**6)
        quilt.learn(x.repeat(3, 1, 1, 1))
        every = 2 * 3 * 8 * 5
        assert quilt.bank.shape[1] == 3 * 16
        if quilt.bank.shape[0] == every:
            assert torch.equal(quilt(x), x)
        # A drawn bank misses a few patches; what is found is exact.
        assert float((quilt(x) == x).float().mean()) > 0.5

    def test_without_overlap_cost_seams_choose_the_cheapest_path(self) -> None:
        from maodun.defenses.preprocessing.quilting import _beyond

        cost = torch.tensor([[[9.0, 1.0, 9.0], [9.0, 9.0, 1.0], [9.0, 1.0, 9.0]]])
        assert _beyond(cost)[0].tolist() == [[False, True, True], [False, False, True], [False, True, True]]

    def test_neighbours_do_not_matter_and_files_are_read(self, tmp_path: Path) -> None:
        bank = images(20, 1, 10, 10, seed=1)
        np.savez(tmp_path / "bank.npz", x=bank.numpy())
        quilt = Quilting(source=str(tmp_path / "bank.npz"), size=300)
        x = images(5, 1, 8, 9)
        together = quilt(x)
        assert together.shape == x.shape
        assert torch.allclose(together, torch.cat([quilt(row[None]) for row in x]))
        assert not torch.equal(together, x)
        assert set(together.unique().tolist()) <= set(bank.unique().tolist())

    def test_refusals(self) -> None:
        quilt = Quilting()
        with pytest.raises(InputError, match="no patches"):
            quilt(images(1, 1, 8, 8))
        with pytest.raises(InputError, match="does not fit"):
            quilt.learn(images(2, 1, 4, 4))
        quilt.learn(images(9, 1, 8, 8))
        with pytest.raises(InputError, match="channels"):
            quilt(images(1, 3, 8, 8))
