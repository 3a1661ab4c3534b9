"""Score networks: what is trained, what a file keeps, what is refused; and a picture purified from the command line."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import Gaussian
from PIL import Image
from torch import Tensor, nn

from maodun.arena.shield_recipe import ShieldSpec
from maodun.arena.shields import shield_model
from maodun.arena.train_score import ScoreRecipe, load_score_recipe, psnr, train_score, trains_score
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses import build_defense
from maodun.defenses.purification import (
    Denoiser,
    DiffusionFilter,
    Levels,
    LikelihoodMaximisation,
    load_score,
    vp_discrete,
)
from maodun.defenses.purification.artifact import load_artifact, save_score
from maodun.defenses.purification.matching import ScoreMatching
from maodun.defenses.purification.network import ScoreNetwork, new_network, small_unet
from maodun.defenses.smoothing import Denoise
from maodun.zoo.scores import find_score, list_scores

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def network() -> ScoreNetwork:
    """A tiny untrained network on 1 x 8 x 8 images, with noise up to t* 0.5."""
    return new_network((1, 8, 8), channels=(8, 8), patch=2, groups=4, top=0.5, seed=3)


@pytest.fixture(scope="module")
def file(network: ScoreNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network.name = "tiny"
    return save_score(network, tmp_path_factory.mktemp("score") / "tiny.safetensors", torch.float32)


def noisy(seed: int = 0, n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


class TestMatching:
    @pytest.mark.parametrize("law", ["uniform", "edm"])
    def test_the_exact_denoiser_has_the_loss_of_theory(self, law: str) -> None:
        """For data of variance v the least error of the noise is v / (v + r^2)."""
        levels, variance = vp_discrete(), 0.09
        objective = ScoreMatching(levels, 199, law)  # type: ignore[arg-type]
        x = 0.5 + 0.15 * torch.randn(512, 1, 8, 8, generator=torch.Generator().manual_seed(0))

        class Exact(nn.Module):
            def forward(self, y: Tensor, ratio: Tensor) -> Tensor:
                wide = ratio.reshape(-1, 1, 1, 1)
                return wide * y / (variance + wide**2)

        rows = torch.arange(512)
        ratio = objective.ratios(Stream(0, "score-matching").child("level").uniform(rows, (1,), 7)[:, 0].double())
        weight = 1.0 if law == "uniform" else (ratio**2 + 0.25) / 0.25
        expected = float((weight * variance / (variance + ratio**2)).mean())
        assert float(objective.errors(Exact(), x, rows, 7).mean()) == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize("law", ["uniform", "edm"])
    def test_noise_stays_in_the_range_and_belongs_to_the_row(self, law: str) -> None:
        objective = ScoreMatching(vp_discrete(), 99, law)  # type: ignore[arg-type]
        ratio = objective.ratios(torch.linspace(0, 1 - 1e-6, 1000, dtype=torch.float64))
        assert float(ratio.min()) == pytest.approx(objective.levels.ratio(0), rel=1e-6)
        assert float(ratio.max()) <= objective.levels.ratio(99) * (1 + 1e-6)
        assert float(ratio.max()) > 0.98 * objective.levels.ratio(99)
        x, rows = torch.rand(6, 1, 2, 2), torch.arange(6)
        whole = objective.errors(_Zero(), x, rows, 1)
        parts = torch.cat([objective.errors(_Zero(), x[part], rows[part], 1) for part in rows.flip(0).split(2)])
        assert torch.allclose(whole.flip(0).reshape(3, 2).flip(1), parts.reshape(3, 2).flip(1), atol=1e-6)
        assert not torch.allclose(objective.errors(_Zero(), x, rows, 2), whole)


class _Zero(nn.Module):
    def forward(self, y: Tensor, ratio: Tensor) -> Tensor:
        return torch.zeros_like(y)


class TestNetwork:
    def test_weights_are_a_function_of_the_seed(self, network: ScoreNetwork) -> None:
        again = new_network((1, 8, 8), channels=(8, 8), patch=2, groups=4, top=0.5, seed=3)
        other = new_network((1, 8, 8), channels=(8, 8), patch=2, groups=4, top=0.5, seed=4)
        u = noisy()
        assert torch.allclose(again(u, 99, again.levels), network(u, 99, network.levels), atol=1e-5)
        assert not torch.allclose(other(u, 99, other.levels), network(u, 99, network.levels), atol=1e-2)

    def test_sides_that_do_not_divide_are_refused(self) -> None:
        with pytest.raises(InputError, match="do not divide by 8"):
            small_unet((3, 28, 28), (8, 8, 8), patch=2)

    def test_more_noise_than_was_trained_is_refused(self, network: ScoreNetwork) -> None:
        DiffusionFilter(network, t_star=0.5)
        with pytest.raises(InputError, match=r"up to t\* 0.5 of vp_discrete.*not on 0.6"):
            DiffusionFilter(network, t_star=0.6)
        # Churn asks beyond where it starts.
        with pytest.raises(InputError, match=r"up to t\* 0.5 of vp_discrete"):
            DiffusionFilter(network, t_star=0.5, sampler="heun_churn")
        DiffusionFilter(network, t_star=0.4, sampler="heun_churn")

    @pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 64)])
    def test_other_images_are_refused(self, network: ScoreNetwork, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"takes images N x 1 x 8 x 8|works on images"):
            DiffusionFilter(network)(torch.zeros(shape))

    def test_a_classifier_with_other_bounds_is_refused(self, network: ScoreNetwork) -> None:
        model = nn.Flatten()
        model.bounds = (-1, 1)  # type: ignore[assignment]
        purifiers = (DiffusionFilter(network), LikelihoodMaximisation(network, least=0.1, most=0.2), Denoise(network))
        for purifier in purifiers:
            with pytest.raises(InputError, match=r"classifier: takes inputs in \[-1, 1\]"):
                purifier.wrap(model)
        model.bounds = (0, 1)  # type: ignore[assignment]
        assert DiffusionFilter(network).wrap(model)(torch.zeros(2, 1, 8, 8)).shape == (2, 64)


class TestFiles:
    def test_a_file_rebuilds_its_network(self, network: ScoreNetwork, file: Path) -> None:
        loaded = load_score(str(file))
        assert isinstance(loaded, ScoreNetwork)
        assert torch.allclose(loaded(noisy(), 99, loaded.levels), network(noisy(), 99, network.levels), atol=1e-5)
        assert (loaded.shape, loaded.levels, loaded.name) == (network.shape, network.levels, "tiny")
        assert loaded.top == pytest.approx(network.top)
        assert not any(each.requires_grad for each in loaded.parameters())

    def test_half_precision_halves_the_file(self, network: ScoreNetwork, file: Path, tmp_path: Path) -> None:
        half = save_score(network, tmp_path / "half.safetensors")
        assert half.stat().st_size < 0.65 * file.stat().st_size
        loaded = load_artifact(half)
        assert torch.allclose(loaded(noisy(), 99, loaded.levels), network(noisy(), 99, network.levels), atol=5e-3)

    def test_damaged_files_are_refused(self, file: Path, tmp_path: Path) -> None:
        whole = file.read_bytes()
        for content, words in (
            (whole[: len(whole) // 2], "not a whole safetensors file"),
            (whole[:-4] + b"\0\1\2\3", "not those it was written with"),
            (b"", "not a whole safetensors file"),
        ):
            damaged = tmp_path / "damaged.safetensors"
            damaged.write_bytes(content)
            with pytest.raises(InputError, match=words):
                load_score(str(damaged))

    def test_files_of_another_kind_are_refused(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match="holds no score network"):
            load_score(str(tmp_path / "other.safetensors"))
        torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
        with pytest.raises(InputError, match="holds no MNIST witness"):
            load_score(str(tmp_path / "other.pt"))

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("", "none is named"),
            ("missing.safetensors", "no such file"),
            ("nowhere", "no such file or folder"),
            ("nobody/has-this-model", "nothing is downloaded"),
            ("zoo:score-mnist", "recipes and the command line only"),
        ],
    )
    def test_networks_that_are_not_there(self, name: str, words: str) -> None:
        with pytest.raises(InputError, match=words):
            load_score(name)

    def test_a_diffusers_folder_is_a_score_network(self, network: ScoreNetwork, tmp_path: Path) -> None:
        plain = new_network((3, 16, 16), channels=(8, 8), groups=4, form="eps")
        plain.core.unet.save_pretrained(tmp_path / "pipe" / "unet")  # type: ignore[operator]
        (tmp_path / "pipe" / "scheduler").mkdir()
        config = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps({"beta_start": 2e-4, "beta_end": 1e-2, "num_train_timesteps": 500}))
        loaded = load_score(str(tmp_path / "pipe"))
        assert isinstance(loaded, ScoreNetwork)
        assert (loaded.shape, loaded.levels.name) == ((3, 16, 16), "vp_discrete(0.0002,0.01,500)")
        u = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = plain.core.unet(u, 99).sample
        assert torch.allclose(loaded(u, 99, loaded.levels), expected, atol=1e-5)
        for content, words in (
            ({"beta_schedule": "sigmoid"}, "schedule 'sigmoid'"),
            ({"prediction_type": "flow"}, "predicting 'flow'"),
        ):
            config.write_text(json.dumps(content))
            with pytest.raises(InputError, match=words):
                load_score(str(tmp_path / "pipe"))
        (tmp_path / "pipe" / "unet" / "config.json").write_text("{}")
        with pytest.raises(InputError, match="describes no class"):
            load_score(str(tmp_path / "pipe"))

    def test_without_diffusers_the_error_says_what_to_install(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = builtins.__import__

        def refuse(name: str, *rest: Any, **more: Any) -> Any:
            if name.partition(".")[0] == "diffusers":
                raise ImportError(name)
            return real(name, *rest, **more)

        monkeypatch.delitem(sys.modules, "diffusers", raising=False)
        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(InputError, match=r"pip install 'maodun\[diffusion\]'"):
            load_score(str(file))


class TestZoo:
    def test_every_card_names_weights_that_fit_it(self) -> None:
        for card in list_scores():
            path = card.path()
            if path is None or not path.is_file():
                continue
            loaded = load_score(find_score(card.spec))
            assert isinstance(loaded, ScoreNetwork)
            assert loaded.shape == card.shape
            assert sum(each.numel() for each in loaded.parameters()) == card.parameters
            assert path.stat().st_size < 16 * 2**20
            assert card.recipe is None or load_score_recipe(ROOT / card.recipe).name == card.name

    def test_unknown_names_get_the_nearest(self) -> None:
        with pytest.raises(InputError, match="witness:ddpm-mnist"):
            find_score("witness:ddpm-mnst")
        assert find_score("some/file.safetensors") == "some/file.safetensors"

    def test_a_shield_is_known_by_its_score_too(self, file: Path, network: ScoreNetwork, tmp_path: Path) -> None:
        other = save_score(new_network((1, 8, 8), channels=(8, 8), patch=2, groups=4), tmp_path / "b.safetensors")
        digests = []
        for score in (file, other):
            spec = ShieldSpec(model="zoo:digits-cnn", defense="diffusion_filter", options={"score": str(score)})
            model, digest = shield_model(spec, torch.device("cpu"), nn.Flatten())
            assert model(torch.rand(2, 1, 8, 8)).shape == (2, 64)
            digests.append(digest)
        for scores in (f"{file},{file}", f"{file},{other}"):
            spec = ShieldSpec(model="zoo:digits-cnn", defense="diffusion_classifier", options={"scores": scores})
            digests.append(shield_model(spec, torch.device("cpu"), nn.Flatten())[1])
        assert len(set(digests)) == 4

    def test_the_classifiers_networks_go_by_the_zoos_names_too(self) -> None:
        spec = ShieldSpec(model="zoo:digits-cnn", defense="diffusion_classifier", options={"scores": "zoo:a,zoo:b"})
        with pytest.raises(InputError, match="score network 'zoo:a': there is none of that name"):
            shield_model(spec, torch.device("cpu"), nn.Flatten())
        spec = spec.model_copy(update={"options": {"scores": "zoo:score-digits+zoo:b"}})
        with pytest.raises(InputError, match="score network 'zoo:b': there is none of that name"):
            shield_model(spec, torch.device("cpu"), nn.Flatten())

    def test_wrong_options_are_refused(self, file: Path) -> None:
        with pytest.raises(InputError, match="did you mean 't_star'"):
            build_defense("diffusion_filter", score=str(file), tstar=0.1)
        with pytest.raises(InputError, match="is not of type int"):
            build_defense("diffusion_filter", score=str(file), steps="many")

    @pytest.mark.data
    def test_the_witness_denoises(self, real_data: Path) -> None:
        """A network trained elsewhere, in our tables: the estimate is nearer to the image than the noisy one by far."""
        from maodun.zoo.data import load_data

        network = load_score(find_score("witness:ddpm-mnist"))
        assert isinstance(network, ScoreNetwork)
        x = load_data("mnist", limit=32).x
        for t_star, least in ((0.036, 29.0), (0.1, 21.0)):
            t = network.levels.index(t_star)
            noise = -20 * np.log10(network.levels.ratio(t) / 2)
            assert float(psnr(network, x, t).mean()) > max(least, noise + 4.0)


RECIPE = {
    "name": "score-tiny",
    "score": {"channels": [8, 8], "groups": 4, "patch": 2, "top": 0.3},
    "data": {"spec": "digits", "limit": 300, "validation": 0.1},
    "fit": {"epochs": 3, "batch_size": 32, "rate": 5e-3, "average": 0.9, "samples": 64},
    "measure": 20,
    "card": {"summary": "a test", "provenance": "a test", "data": "digits"},
}


class TestTraining:
    def test_training_lowers_the_loss_and_resumes_to_the_same_weights(self, tmp_path: Path) -> None:
        recipe = ScoreRecipe.model_validate(RECIPE)
        lines: list[dict[str, float | str]] = []
        whole = train_score(recipe, tmp_path / "a", on_epoch=lines.append)
        assert float(lines[-1]["score"]) > float(lines[0]["score"])
        assert [number.unit for number in whole.measured] == ["dB"] * 3

        class Stop(Exception):
            pass

        def stop(line: dict[str, float | str]) -> None:
            if line["epoch"] == 1.0:
                raise Stop

        with pytest.raises(Stop):
            train_score(recipe, tmp_path / "b", on_epoch=stop)
        assert (tmp_path / "b" / "score-tiny.ckpt").exists()
        resumed = train_score(recipe, tmp_path / "b")
        assert resumed.file.read_bytes() == whole.file.read_bytes()
        assert not (tmp_path / "b" / "score-tiny.ckpt").exists()
        assert whole.card_file.read_text() == resumed.card_file.read_text()

    def test_shipped_recipes_are_whole(self) -> None:
        for path in sorted((ROOT / "recipes" / "score").glob("*.yaml")):
            assert trains_score(path)
            recipe = load_score_recipe(path)
            assert recipe.name == f"score-{path.stem}"
        assert not trains_score(ROOT / "recipes" / "train" / "digits-cnn.yaml")
        assert not trains_score(ROOT / "nowhere.yaml")

    def test_a_wrong_key_is_named(self, tmp_path: Path, maodun: Callable[..., Any]) -> None:
        (tmp_path / "r.yaml").write_text("name: a\nscore: {chanels: [8]}\ndata: {spec: digits}\ncard: {}\n")
        assert "chanels" in maodun("train", tmp_path / "r.yaml").error


class Hungry(Denoiser):
    """Has memory for two images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.sizes, self.exact = room, list[int](), Gaussian()

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        self.sizes.append(len(u))
        if len(u) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return self.exact(u, t, levels)


class TestPurify:
    def test_memory_that_runs_out_means_smaller_chunks(self) -> None:
        x = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        hungry = Hungry(2)
        out = DiffusionFilter(hungry, steps=2).purify(x, seed=5, batch_size=8)
        assert [size for size in hungry.sizes if size > 2] == [8, 4]
        ids = torch.arange(9)
        with context.draw(Stream(5, "purify"), ids, torch.zeros_like(ids)):
            assert torch.allclose(out, DiffusionFilter(Gaussian(), steps=2)(x), atol=1e-6)
        assert torch.allclose(DiffusionFilter(Gaussian(), steps=2).purify(x[3:], 5, ids[3:]), out[3:], atol=1e-6)

    def test_memory_for_nothing_is_an_error(self) -> None:
        with pytest.raises(InputError, match="not even one sample fits"):
            DiffusionFilter(Hungry(0)).purify(torch.rand(3, 1, 4, 4))

    def test_values_outside_the_range_are_refused(self) -> None:
        for value in (1.5, float("nan")):
            with pytest.raises(InputError, match="outside"):
                DiffusionFilter(Gaussian()).purify(torch.full((1, 1, 2, 2), value))

    def test_a_picture(self, file: Path, tmp_path: Path, maodun: Callable[..., Any]) -> None:
        grey = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / "in.png")
        words = ("purify", tmp_path / "in.png", tmp_path / "out.png", "--score", file)
        done = maodun(*words, "--t-star", "0.05", "--sampler", "dpm_solver")
        assert done.code == 0, done.err
        assert "5 network evaluations" in done.out
        out = np.asarray(Image.open(tmp_path / "out.png"))
        assert out.shape == (8, 8)
        maodun(*words, "--t-star", "0.05", "--sampler", "dpm_solver")
        assert np.array_equal(out, np.asarray(Image.open(tmp_path / "out.png")))
        maodun(*words, "--t-star", "0.05", "--sampler", "dpm_solver", "--seed", "1")
        assert not np.array_equal(out, np.asarray(Image.open(tmp_path / "out.png")))

    def test_bad_pictures_are_one_line_each(self, file: Path, tmp_path: Path, maodun: Callable[..., Any]) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "big.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "big.png").read_bytes()[:1500])
        (tmp_path / "text.png").write_text("not a picture")
        Image.fromarray(noise[:8, :8].astype(np.uint16) * 257).save(tmp_path / "deep.png")
        out = tmp_path / "out.png"
        for name, words in (
            ("missing.png", "no such file"),
            ("cut.png", "corrupt or cut short"),
            ("text.png", "no picture of a known format"),
            ("deep.png", "more than 8 bits per value"),
            ("big.png", "takes images N x 1 x 8 x 8, not N x 1 x 64 x 64"),
        ):
            assert words in maodun("purify", tmp_path / name, out, "--score", file).error
        assert "is no .png" in maodun("purify", tmp_path / "big.png", tmp_path / "o.jpg", "--score", file).error
        for option, value, words in (
            ("--t-star", 1.0, "(0, 1)"),
            ("--steps", 0, "at least one step"),
            ("--sampler", "ddimm", "did you mean"),
            ("--score", "zoo:score-mnst", "none of that name"),
        ):
            line = maodun("purify", tmp_path / "big.png", out, "--score", file, option, value).error
            assert words in line
        assert not out.exists()


def test_a_zoo_name_is_one_value_on_the_command_line() -> None:
    from maodun.app.flags import parse_defenses

    parsed = parse_defenses("jpeg:quality=50,diffusion_filter:score=zoo:score-digits:t_star=0.2")
    assert parsed["defense"][1] == {
        "name": "diffusion_filter",
        "options": {"score": "zoo:score-digits", "t_star": 0.2},
    }
    parsed = parse_defenses("diffusion_classifier:scores=zoo:a+witness:b+c.safetensors:points=8")
    assert parsed["options"] == {"scores": "zoo:a+witness:b+c.safetensors", "points": 8}
