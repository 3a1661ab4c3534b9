"""Randomised smoothing: closed forms first, then what must not depend on the batch, then the command line."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.oracle import is_stochastic
from maodun.core.streams import Stream
from maodun.defenses.purification import Denoiser, Levels, vp
from maodun.defenses.smoothing import (
    ABSTAIN,
    Denoise,
    GaussianNoise,
    certify,
    count_votes,
    largest_radius,
    lower_bound,
    matching_level,
    predict,
    radius,
)


class Half(nn.Module):
    """Two classes, parted by the plane w x = b."""

    def __init__(self, w: Tensor, b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w - self.b
        return torch.stack([-score, score], dim=1)


class Constant(nn.Module):
    """Always the same class of three."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.0]).expand(x.shape[0], 3)


class Coin(nn.Module):
    """Answers by its own keyed draw, whatever the input."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        up = context.noise(x, "coin").uniform((1,)) < 0.5
        return torch.cat([up.float(), (~up).float()], dim=1)


def points(n: int, d: int = 6) -> Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(1))


def plane(d: int = 6) -> Half:
    return Half(torch.linspace(-1.0, 1.5, d), 0.8)


class TestBounds:
    def test_all_votes_give_alpha_to_the_power_of_one_over_n(self) -> None:
        for n in (10, 1000, 100_000):
            assert lower_bound(n, n, 0.001) == pytest.approx(0.001 ** (1 / n))

    def test_agrees_with_scipys_one_sided_interval(self) -> None:
        for k, n, alpha in ((0, 10, 0.01), (7, 10, 0.05), (990, 1000, 0.001), (1, 3, 0.5)):
            reference = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, "exact").low
            assert lower_bound(k, n, alpha) == pytest.approx(reference, abs=1e-12)

    @pytest.mark.parametrize(("n", "most"), [(1000, 2.46), (10_000, 3.20), (100_000, 3.81)])
    def test_the_largest_radius_there_can_be(self, n: int, most: float) -> None:
        assert largest_radius(n, 1.0, 0.001) == pytest.approx(most, abs=0.005)
        assert largest_radius(n, 0.25, 0.001) == pytest.approx(0.25 * most, abs=0.002)

    def test_no_radius_below_one_half(self) -> None:
        assert radius([0.2, 0.5, norm.cdf(1.0)], 2.0) == pytest.approx([0.0, 0.0, 2.0])

    def test_a_bound_holds_as_often_as_promised(self) -> None:
        votes = np.random.default_rng(0).binomial(200, 0.8, size=4000)
        wrong = float((lower_bound(votes, 200, 0.05) > 0.8).mean())
        assert 0.02 < wrong <= 0.062


class TestCertify:
    def test_linear_classifier_has_its_distance_from_the_plane(self) -> None:
        model, x = plane(), points(24)
        distance = ((x @ model.w - model.b) / model.w.norm()).double()
        found = certify(model, x, sigma=0.5, draws=20_000, alpha=0.001)
        told = found.prediction != ABSTAIN
        assert torch.equal(found.prediction[told], (distance > 0).long()[told])
        assert bool((found.radius <= distance.abs() + 1e-9).all())
        reachable = distance.abs().clamp(max=largest_radius(20_000, 0.5, 0.001))
        assert float((reachable - found.radius)[told].max()) < 0.06
        expected = norm.cdf(distance.abs().numpy() / 0.5)
        shares = torch.where(told, found.votes, 20_000 - found.votes).numpy() / 20_000
        assert np.abs(np.maximum(shares, 1 - shares) - expected).max() < 4 * 0.5 / math.sqrt(20_000)

    def test_constant_classifier(self) -> None:
        found = certify(Constant(), points(3), sigma=0.25, draws=1000, alpha=0.001)
        assert found.prediction.tolist() == [1, 1, 1]
        assert found.radius.tolist() == pytest.approx([0.25 * norm.ppf(0.001 ** (1 / 1000))] * 3)

    def test_abstains_where_votes_are_even(self) -> None:
        for draws in (50, 4000):
            found = certify(Coin(), points(8), sigma=0.25, draws=draws, alpha=0.001)
            assert found.prediction.tolist() == [ABSTAIN] * 8
            assert found.radius.tolist() == [0.0] * 8
        # Ten draws cannot prove one half at this alpha, however they fall: 0.001 ** (1 / 9) is below it.
        assert certify(Constant(), points(2), sigma=0.25, draws=9).prediction.tolist() == [ABSTAIN] * 2

    def test_more_noise_claimed_than_added_would_show(self) -> None:
        model, x = plane(), points(24)
        distance = ((x @ model.w - model.b) / model.w.norm()).abs()
        shares = certify(model, x, sigma=0.25, draws=4000).share
        assert bool((torch.from_numpy(radius(shares.numpy(), 0.5)) > distance).any())

    def test_choosing_and_estimating_use_other_draws(self) -> None:
        model, x = plane(), points(6)
        ids = torch.arange(6)
        few = [
            count_votes(model, x, ids, sigma=0.5, draws=200, stream=Stream(0, f"smoothing/{purpose}"))
            for purpose in ("select", "estimate")
        ]
        assert not torch.equal(few[0], few[1])


class TestPredict:
    def test_says_what_the_votes_say_and_abstains_on_a_tie(self) -> None:
        model = plane()
        x = torch.cat([points(4), torch.zeros(1, 6)])
        x[4] = model.b * model.w / model.w.square().sum()
        found = predict(model, x, sigma=0.3, draws=2000)
        distance = x @ model.w - model.b
        assert int(found[4]) == ABSTAIN
        told = found[:4] != ABSTAIN
        assert torch.equal(found[:4][told], (distance[:4] > 0).long()[told])
        assert bool((found[:4][distance[:4].abs() > 0.3] != ABSTAIN).all())
        assert predict(Coin(), points(4), sigma=0.3, draws=1000).tolist() == [ABSTAIN] * 4

    def test_a_wrong_answer_is_as_rare_as_promised(self) -> None:
        model = Half(torch.tensor([1.0]), 0.5)
        x = torch.full((300, 1), 0.52)
        found = predict(model, x, sigma=0.5, draws=40, alpha=0.05)
        assert int((found == 0).sum()) <= 20


class TestBatches:
    @pytest.mark.parametrize("model", [plane(), Coin()], ids=["linear", "stochastic"])
    def test_neither_batch_nor_order_matters(self, model: nn.Module) -> None:
        x, ids = points(7), torch.tensor([3, 100, 7, 0, 2**33, 5, 12])
        stream = Stream(4, "test")
        whole = count_votes(model, x, ids, sigma=0.4, draws=64, stream=stream)
        assert whole.sum(1).tolist() == [64] * 7
        for size in (1, 7, 64, 1000):
            other = count_votes(model, x, ids, sigma=0.4, draws=64, stream=stream, batch_size=size)
            assert torch.equal(whole, other), size
        order = torch.tensor([6, 0, 3, 5, 1, 2, 4])
        shuffled = count_votes(model, x[order], ids[order], sigma=0.4, draws=64, stream=stream, batch_size=5)
        assert torch.equal(whole[order], shuffled)
        longer = count_votes(model, x, ids, sigma=0.4, draws=96, stream=stream)
        assert bool((longer >= whole).all())

    def test_seeds_differ_and_repeat(self) -> None:
        found = [certify(plane(), points(5), sigma=0.5, draws=500, seed=seed).votes for seed in (0, 0, 1)]
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_progress_ends_where_it_says(self) -> None:
        heard: list[tuple[int, int]] = []
        certify(
            plane(), points(3), sigma=0.5, draws=50, guesses=10, batch_size=32, on_batch=lambda *at: heard.append(at)
        )
        assert heard[-1] == (180, 180)
        assert [done for done, _ in heard] == sorted({done for done, _ in heard})

    def test_a_model_in_training_mode_is_certified_as_it_will_be_used_and_left_as_it_was(self, tmp_path: Path) -> None:
        from maodun.arena.certify import CertifyPlan, certify_model
        from maodun.zoo.data.base import make_dataset

        model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2)).train()
        norm_layer = model[0]
        assert isinstance(norm_layer, nn.BatchNorm2d)
        data = make_dataset("given", "given", np.full((3, 1, 4, 4), 0.9, np.float32), np.arange(3) % 2, None)
        plan = CertifyPlan.model_validate(
            {
                "data": {"spec": "given"},
                "shield": {"model": "given:m"},
                "sigma": 0.1,
                "draws": 20,
                "guesses": 5,
                "alpha": 0.1,
            }
        )
        certify_model(plan, tmp_path, model=model, data=data)
        assert model.training
        assert torch.equal(norm_layer.running_mean, torch.zeros(1))

    def test_nothing_to_certify(self) -> None:
        assert count_votes(plane(), points(0), torch.zeros(0), sigma=1.0, draws=3, stream=Stream(0, "a")).shape == (
            0,
            1,
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma": 0.0}, "sigma 0.0"),
        ({"sigma": math.nan}, "sigma nan"),
        ({"alpha": 1.0}, "alpha 1.0"),
        ({"draws": 0}, "draws 0"),
        ({"guesses": 0}, "guesses 0"),
    ],
)
def test_bad_input(changes: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        certify(plane(), points(2), **{"sigma": 0.5, **changes})


class TestCommand:
    """The command line on the digits, with a linear net so that nothing takes long."""

    WORDS = ("certify", "victims:linear", "--data", "digits", "--draws", "400", "--limit", "40")

    @pytest.fixture(autouse=True)
    def _victims(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def test_table_page_and_lines(self, maodun: Any, tmp_path: Path) -> None:
        out = tmp_path / "run"
        done = maodun(*self.WORDS, "--out", out, "--progress", "quiet")
        assert done.code == 0, done.err
        assert "abstained" in done.out
        rows = list(csv.DictReader((out / "samples.csv").open()))
        assert len(rows) == 40
        right = [float(row["radius"]) for row in rows if row["prediction"] == row["label"]]
        lines = list(csv.DictReader((out / "curve.csv").open()))
        table = {float(row["radius"]): float(row["accuracy"]) for row in lines if row["line"] == "certified"}
        assert table == {eps: pytest.approx(sum(r >= eps for r in right) / 40) for eps in table}
        assert table[0.0] >= table[0.25] >= table[0.5]
        page = (out / "report.html").read_text()
        assert "Certified accuracy by radius" in page
        assert "<svg" in page

    def test_a_second_start_does_only_what_is_missing(self, maodun: Any, tmp_path: Path) -> None:
        out = tmp_path / "run"
        assert maodun(*self.WORDS, "--out", out, "-q").code == 0
        before = (out / "samples.csv").read_text()
        kept = out / "certificates" / "part-00000.parquet"
        stamp = kept.stat().st_mtime_ns
        (out / "certificates" / "part-00001.parquet").unlink()
        assert maodun(*self.WORDS, "--out", out, "-q", "--batch-size", "33").code == 0
        assert (out / "samples.csv").read_text() == before
        assert kept.stat().st_mtime_ns == stamp
        assert "holds a run of another recipe" in maodun(*self.WORDS, "--sigma", "0.5", "--out", out).error

    def test_attacks_stand_beside_and_do_not_contradict(self, maodun: Any, tmp_path: Path) -> None:
        out, run = tmp_path / "cert", tmp_path / "arena"
        attacked = maodun(
            *("evaluate", "--model", "victims:linear", "--data", "digits", "--limit", "40", "--defense"),
            *("gaussian_noise:sigma=0.25", "--norm", "l2", "--eps", "0.1,0.5", "--attack", "pgd:steps=8", "--eot", "4"),
            *("--draws", "50", "--no-diagnostics", "--out", run, "-q"),
        )
        assert attacked.code == 0, attacked.err
        done = maodun(*self.WORDS, "--out", out, "--beside", run, "--progress", "quiet")
        assert done.code == 0, done.err
        assert "leaves" in done.out
        assert "contradict" not in done.out
        lines = list(csv.DictReader((out / "curve.csv").open()))
        certain = [(float(row["radius"]), float(row["accuracy"])) for row in lines if row["line"] == "certified curve"]
        points = [(float(row["radius"]), float(row["accuracy"])) for row in lines if "pgd" in row["line"]]
        assert [eps for eps, _ in points] == [0.1, 0.5]
        for eps, robust in points:
            assert max(accuracy for radius, accuracy in certain if radius >= eps) <= robust
        # Samples of two splits have the same numbers and are not the same samples.
        other = maodun(*self.WORDS, "--split", "train", "--out", tmp_path / "train", "--beside", run, "-q")
        assert "is of the test split" in other.error

    def test_defences_may_stand_between_and_the_command_line_is_kept(self, maodun: Any, tmp_path: Path) -> None:
        out = tmp_path / "run"
        words = ("certify", "victims:linear", "--data", "digits", "--draws", "100", "--limit", "8", "--out", out)
        done = maodun(*words, "--defense", "bit_depth:bits=4,median", "--progress", "quiet")
        assert done.code == 0, done.err
        assert "--defense bit_depth:bits=4,median" in (out / "report.html").read_text()

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (("--sigma", "0"), "sigma 0.0"),
            (("--sigma", "-1"), "sigma -1.0"),
            (("--alpha", "1.5"), "alpha 1.5"),
            (("--draws", "5"), "draws 5"),
            (("--defense", "nonsense"), "defence 'nonsense'"),
            (("--data", "cifar100000"), "cifar100000"),
            (("--device", "cuda:9"), "device 'cuda:9'"),
            (("--beside", "/nowhere/at/all"), "/nowhere/at/all"),
            (("--defense", "max_softmax"), "may refuse to answer"),
        ],
    )
    def test_bad_input_is_one_line(self, maodun: Any, tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
        assert expected in maodun(*self.WORDS, *words, "--out", tmp_path / "run").error


class Gaussian(Denoiser):
    """The exact denoiser of pixels that are independent normals with `mean` and standard deviation `spread`."""

    def __init__(self, mean: float = 0.1, spread: float = 0.5) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        scale, sigma = levels.at(t)
        return sigma * (u - scale * self.mean) / ((scale * self.spread) ** 2 + sigma**2)


class TestDenoise:
    @pytest.mark.parametrize(
        ("t_star", "sigma"), [(0.036, 0.064), (0.075, 0.128), (0.1, 0.170), (0.15, 0.260), (0.2, 0.360)]
    )
    def test_sigma_and_level_are_the_dossiers_table(self, t_star: float, sigma: float) -> None:
        levels = vp()
        found = matching_level(levels, sigma)
        assert abs(found - levels.index(t_star)) <= 1
        assert levels.ratio(found) >= 2 * sigma
        assert levels.ratio(found - 1) < 2 * sigma

    def test_estimate_is_the_posterior_mean(self) -> None:
        x = 0.5 + 0.05 * torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
        defense = Denoise(Gaussian(), sigma=0.2)
        ratio = defense.levels.ratio(matching_level(defense.levels, 0.2))
        shrink = 0.5**2 / (0.5**2 + ratio**2)
        expected = ((0.1 + shrink * (2 * x - 1 - 0.1)) + 1) / 2
        assert torch.allclose(defense(x), expected, atol=1e-5)

    def test_a_linear_classifier_keeps_its_closed_form(self) -> None:
        # An affine denoiser moves the plane; the certified radius is the distance from where it stands then.
        x = 0.5 + 0.1 * torch.randn(12, 1, 2, 3, generator=torch.Generator().manual_seed(2))
        half, defense = Half(torch.linspace(-1.0, 1.5, 6), 0.8), Denoise(Gaussian(), sigma=0.1)
        score = defense(x).flatten(1) @ half.w - half.b
        ratio = defense.levels.ratio(matching_level(defense.levels, 0.1))
        distance = (score / (half.w.norm() * 0.5**2 / (0.5**2 + ratio**2))).double()
        found = certify(defense.wrap(half), x, sigma=0.1, draws=4000)
        told = found.prediction != ABSTAIN
        assert torch.equal(found.prediction[told], (distance > 0).long()[told])
        assert bool((found.radius <= distance.abs() + 1e-6).all())
        reachable = distance.abs().clamp(max=largest_radius(4000, 0.1, 0.001))
        assert float((reachable - found.radius)[told].max()) < 0.04

    def test_posterior_draws_and_their_votes(self) -> None:
        x = torch.rand(3, 1, 4, 4)
        chain = Denoise(Gaussian(), sigma=0.25, steps=4, votes=3)
        assert chain.spec.nfe == 12
        assert is_stochastic(chain.wrap(nn.Flatten()))
        assert not is_stochastic(Denoise(Gaussian(), sigma=0.25).wrap(nn.Flatten()))
        model, ids = chain.wrap(nn.Flatten()), torch.arange(3)
        counts = [
            count_votes(model, x, ids, sigma=0.25, draws=20, stream=Stream(0, "test"), batch_size=size)
            for size in (1, 7, 64)
        ]
        assert torch.equal(counts[0], counts[1])
        assert torch.equal(counts[0], counts[2])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"sigma": 90.0}, "sigma 90.0"),
            ({"sigma": 0.0}, "sigma 0.0"),
            ({"votes": 0}, "votes 0"),
            ({"votes": 2}, "votes 2"),
            ({"steps": 0}, "steps 0"),
            ({"score": ""}, "score network"),
        ],
    )
    def test_bad_input(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            Denoise(**{"score": Gaussian(), **options})

    def test_a_sigma_beyond_the_networks_training_is_refused(self) -> None:
        from maodun.defenses.purification.network import Core, ScoreNetwork

        trained = ScoreNetwork(Core(nn.Identity(), vp()), (1, 4, 4), top=vp().ratio(99), name="little")
        Denoise(trained, sigma=0.16)
        with pytest.raises(InputError, match="trained on noise up to"):
            Denoise(trained, sigma=0.2)

    def test_levels_go_by_name(self) -> None:
        assert Denoise(Gaussian(), sigma=0.2, levels="vp").levels == vp()
        with pytest.raises(InputError, match="there is no such table"):
            Denoise(Gaussian(), levels="vq")


class TestNoise:
    def test_noise_is_the_one_that_is_certified(self) -> None:
        x, ids = torch.rand(500, 1, 4, 4), torch.arange(500)
        with context.draw(Stream(0, "a"), ids, torch.zeros_like(ids)):
            change = GaussianNoise(0.3)(x) - x
        assert float(change.std()) == pytest.approx(0.3, rel=0.03)
        assert float(change.mean()) == pytest.approx(0.0, abs=0.01)

    def test_votes_average_probabilities(self) -> None:
        model, x, ids = plane(), points(4), torch.arange(4)
        with context.draw(Stream(0, "a"), ids, torch.zeros_like(ids)):
            answer = GaussianNoise(0.3, votes=400).wrap(model)(x)
        assert answer.exp().sum(1) == pytest.approx(torch.ones(4), abs=1e-5)
        with pytest.raises(InputError, match="votes 0"):
            GaussianNoise(votes=0)
        with pytest.raises(InputError, match="sigma -1"):
            GaussianNoise(sigma=-1.0)
