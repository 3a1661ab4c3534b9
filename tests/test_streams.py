"""Counter-based randomness: the published vectors, the distributions, and independence from everything but the key."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from maodun.core.streams import Stream, philox4x32

IDS = torch.arange(64, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c], dtype=torch.int64) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("draw", ["uniform", "normal", "signs"])
def test_a_row_depends_on_its_id_only(draw):
    stream = Stream(7, "test")
    whole = getattr(stream, draw)(IDS, (3, 5))
    order = torch.tensor([9, 3, 60, 0])
    assert torch.equal(getattr(stream, draw)(IDS[order], (3, 5)), whole[order])
    assert torch.equal(getattr(stream, draw)(IDS[9:10], (3, 5)), whole[9:10])


def test_steps_per_row_equal_steps_for_all():
    stream = Stream(1, "steps")
    steps = torch.tensor([4, 9, 4])
    mixed = stream.uniform(IDS[:3], (6,), steps)
    assert torch.equal(mixed[0], stream.uniform(IDS[:3], (6,), 4)[0])
    assert torch.equal(mixed[1], stream.uniform(IDS[:3], (6,), 9)[1])


def test_seed_purpose_step_and_id_all_matter():
    base = Stream(0, "a").uniform(IDS, (8,))
    for other in (
        Stream(1, "a").uniform(IDS, (8,)),
        Stream(0, "b").uniform(IDS, (8,)),
        Stream(0, "a").child("b").uniform(IDS, (8,)),
        Stream(0, "a").uniform(IDS, (8,), step=1),
        Stream(0, "a").uniform(IDS + 64, (8,)),
        Stream(0, "a").uniform(IDS + 2**32, (8,)),
    ):
        assert (base == other).float().mean() < 0.01


def test_distributions_pass_kolmogorov_smirnov():
    stream = Stream(3, "ks")
    uniform = stream.uniform(torch.arange(200), (101,)).flatten().double().numpy()
    normal = stream.normal(torch.arange(200), (101,)).flatten().double().numpy()
    assert uniform.min() >= 0.0 and uniform.max() < 1.0
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    signs = stream.signs(torch.arange(200), (101,))
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.03


def test_integers_cover_their_range_evenly():
    draws = Stream(5, "ints").integers(torch.arange(3000), (4,), high=7).flatten()
    counts = torch.bincount(draws, minlength=7)
    assert counts.shape[0] == 7
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_torch_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    Stream(0, "x").normal(IDS, (4,))
    assert torch.equal(state, torch.random.get_rng_state())


def test_coarse_normals_have_the_normals_moments_and_their_own_rows():
    stream, ids = Stream(3, "coarse"), torch.arange(300)
    draws = stream.coarse_normal(ids, (7, 29))
    assert draws.shape == (300, 7, 29) and draws.unique().numel() == 256
    assert abs(float(draws.mean())) < 0.02 and abs(float(draws.var()) - 1.0) < 0.02
    # Neighbouring bytes of a word are independent.
    flat = draws.flatten(1)
    assert abs(float((flat[:, :-1] * flat[:, 1:]).mean())) < 0.02
    assert torch.equal(stream.coarse_normal(ids[9:10], (7, 29)), draws[9:10])
    steps = torch.tensor([4, 9])
    mixed = stream.coarse_normal(ids[:2], (5,), steps)
    assert torch.equal(mixed[1], stream.coarse_normal(ids[:2], (5,), 9)[1])
