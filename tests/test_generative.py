"""Trained generators as attacks: the same for a sample in any batch, saved and loaded, resumed to the same weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from maodun.arena.train_generator import GeneratorRecipe, load_generator_recipe, success, train_generator
from maodun.arena.train_recipe import trains_attack
from maodun.attacks.artifacts import load_attack, save_artifact
from maodun.attacks.generative.attack import AdvGAN, GanSampling, MultiProxy
from maodun.attacks.generative.fit import GeneratorFit, fit_generator
from maodun.attacks.generative.gan import SamplingGame
from maodun.attacks.generative.multi_proxy import MultiProxyGame, MultiProxyOptions
from maodun.attacks.generative.networks import Critic, Generator, Sampler, initialise
from maodun.attacks.generative.proxies import Proxies
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.zoo import load_data

RECIPES = Path(__file__).parents[1] / "recipes" / "train"
OWN = [path for path in sorted(RECIPES.glob("*.yaml")) if path.stem.partition("-")[0] in ("advgan", "multi", "gan")]
THREAT = Threat("linf", 0.2)


def weights(shape=(1, 8, 8), width=2, blocks=2, seed=0):
    network = Generator(shape[0], width, blocks)
    initialise(network, seed)
    return network.state_dict()


def generator(kind=AdvGAN, shape=(1, 8, 8), **options):
    return kind(shape=shape, eps=0.2, width=2, tensors=weights(shape), **options)


def images(n, shape=(1, 8, 8)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


class Bright(nn.Module):
    """Class 1 when the first pixel is above a level."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        score = x[:, 0, 0, 0] - self.level
        return torch.stack([-score, score], 1)


class Brightness(nn.Module):
    """Class 1 when the mean pixel is above a half."""

    def forward(self, x):
        score = 8.0 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], 1)


class Linear(nn.Module):
    """Two classes by the sign of a fixed random projection."""

    def __init__(self, size=64, seed=0):
        super().__init__()
        self.register_buffer("w", torch.randn(size, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        score = (x.flatten(1) - 0.5) @ self.w
        return torch.stack([-score, score], 1)


class TestNetworks:
    @pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 9, 14), (1, 8, 8)])
    def test_directions_have_the_images_shape_and_stay_within_one(self, shape):
        network = Generator(shape[0], 2, 3)
        initialise(network, 0)
        out = network(images(2, shape))
        assert out.shape == (2, *shape)
        assert out.abs().max() < 1
        assert network.encode(images(2, shape)).shape == (2, 8, math.ceil(shape[1] / 4), math.ceil(shape[2] / 4))
        sampler = Sampler(shape, 3, noise=5, width=2)
        made = sampler(torch.randn(2, 5), torch.tensor([0, 2]))
        assert made.shape == (2, *shape)
        assert 0 < made.min() < made.max() < 1
        assert Critic(shape[0], classes=3)(made, torch.tensor([0, 2])).shape == (2,)

    def test_codes_cannot_shrink(self):
        network = Generator(1, 2)
        for value in network.parameters():
            value.data *= 0.5
        code = network.encode(images(3, (1, 16, 16)))
        torch.testing.assert_close(code.var((2, 3), unbiased=False), torch.ones(3, 8), atol=0.05, rtol=0)

    def test_initial_weights_depend_on_the_seed_alone(self):
        first, again, other = weights(seed=1), weights(seed=1), weights(seed=2)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["out.weight"], other["out.weight"])


class TestAttack:
    @pytest.mark.parametrize("size", [1, 7, 64])
    @pytest.mark.parametrize("options", [{}, {"noise": 0.8, "draws": 2}])
    def test_what_becomes_of_an_image_does_not_depend_on_the_batch(self, size, options):
        attack, x, ids = generator(MultiProxy, **options), images(20), torch.arange(20)
        number = attack.tries - 1
        whole = attack.candidates(x, ids, THREAT, 5, number)
        parts = [
            attack.candidates(a, b, THREAT, 5, number) for a, b in zip(x.split(size), ids.split(size), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            attack.candidates(x[order], ids[order], THREAT, 5, number), whole[order], atol=1e-5, rtol=0
        )
        assert (whole - x).abs().max() <= 0.2 + 1e-6
        if number:
            assert not torch.equal(whole, attack.candidates(x, ids, THREAT, 6, number))

    def test_another_radius_rescales_the_same_direction(self):
        attack, x = generator(), images(4) * 0.2 + 0.4
        wide, narrow = (attack.candidates(x, torch.arange(4), Threat("linf", eps)) - x for eps in (0.2, 0.05))
        torch.testing.assert_close(wide, 4 * narrow, atol=1e-6, rtol=1e-4)

    def test_it_costs_one_forward_of_the_target_beside_the_clean_one(self):
        x = images(6)
        found = generator().run(Oracle(Linear()), x, Linear()(x).argmax(1), THREAT)
        assert found.forwards.tolist() == [2] * 6
        assert int(found.backwards.sum()) == 0

    def test_later_draws_are_only_for_those_still_standing(self):
        x = images(40)
        y = Linear()(x).argmax(1)
        one = generator(MultiProxy, noise=3.0).run(Oracle(Linear()), x, y, THREAT)
        many = generator(MultiProxy, noise=3.0, draws=6).run(Oracle(Linear()), x, y, THREAT)
        assert one.found.sum() < many.found.sum()
        assert bool((many.found | ~one.found).all())
        assert int(many.queries[one.found].max()) == 2

    def test_saved_and_loaded_it_does_the_same(self, tmp_path):
        attack, x = generator(MultiProxy, noise=0.3), images(5)
        again = load_attack(save_artifact(attack, tmp_path / "a.safetensors"))
        assert again == attack
        assert torch.equal(again.candidates(x, torch.arange(5), THREAT), attack.candidates(x, torch.arange(5), THREAT))
        assert load_attack(tmp_path / "a.safetensors", draws=3).tries == 3

    def test_what_is_refused(self):
        with pytest.raises(UnsupportedError, match="linf"):
            generator().check(images(1), Threat("l2", 1.0))
        with pytest.raises(InputError, match=r"\(1, 8, 8\).*\(1, 9, 9\)"):
            generator().check(images(1, (1, 9, 9)), THREAT)
        with pytest.raises(UnsupportedError, match="trained in l2"):
            generator(norm="l2")
        with pytest.raises(InputError, match="at least 8"):
            generator(shape=(1, 4, 4))
        with pytest.raises(InputError, match="another network"):
            AdvGAN(shape=(1, 8, 8), eps=0.2, width=3, tensors=weights())
        with pytest.raises(InputError, match="draws >= 1"):
            generator(draws=0)


class TestGanSampling:
    def attack(self, **options):
        network = Sampler((1, 8, 8), 2, 4, 2)
        initialise(network, 0)
        given = {"classes": 2, "noise": 4, "width": 2, "tensors": network.state_dict()}
        return GanSampling(shape=(1, 8, 8), **(given | options))

    def test_draws_until_the_target_misreads_one(self):
        x, y = images(30), torch.zeros(30, dtype=torch.int64)
        x[:, 0, 0, 0] = 0.0
        # Half of the first draws are misread.
        level = float(self.attack().sample(torch.arange(30), y, 2)[:, 0, 0, 0].median())
        attack, target = self.attack(draws=12), Oracle(Bright(level))
        found = attack.run(target, x, y, Threat("linf", 1.0), seed=2)
        assert int(found.found.sum()) > 25
        assert (found.x_adv[found.found][:, 0, 0, 0] > level).all()
        assert 2 == int(found.queries.min()) < int(found.queries.max()) <= 13
        part = attack.run(target, x[7:9], y[7:9], Threat("linf", 1.0), seed=2, ids=torch.arange(7, 9))
        torch.testing.assert_close(part.x_adv, found.x_adv[7:9])

    def test_it_is_unrestricted_and_says_so(self):
        with pytest.raises(UnsupportedError, match="whole images"):
            self.attack().check(images(1), Threat("linf", 0.3))
        with pytest.raises(InputError, match="knows 2 classes"):
            self.attack().run(Oracle(Linear()), images(2), torch.tensor([2, 2]), Threat("linf", 1.0), stop_early=False)


def contest(seed=0, options=None):
    proxies = Proxies([Linear(seed=1), Linear(seed=2)], images(2))
    return MultiProxyGame(
        proxies, (1, 8, 8), 0.2, options or MultiProxyOptions(), width=2, blocks=1, seed=seed
    ), proxies


def fit(checkpoint=None, stop_at=None, seed=0, validate=None):
    game, proxies = contest(seed)
    x = images(48)

    def step(done, steps):
        assert steps == 9
        if done == stop_at:
            raise KeyboardInterrupt

    settings = GeneratorFit(epochs=3, batch_size=16, rate=1e-2)
    return fit_generator(
        game,
        x,
        proxies.labels(x),
        settings,
        proxies=proxies,
        validate=validate,
        seed=seed,
        checkpoint=checkpoint,
        on_step=step,
    )


class TestFit:
    def test_learns_repeats_itself_and_leaves_the_global_generator_alone(self):
        before = torch.random.get_rng_state()
        report, again = fit(), fit()
        assert torch.equal(before, torch.random.get_rng_state())
        assert report.attack == again.attack
        assert fit(seed=1).attack != report.attack
        assert report.history[-1]["adversarial"] < report.history[0]["adversarial"]
        assert report.best_epoch == 2

    @pytest.mark.parametrize("stop_at", [4, 6, 8])
    def test_stopped_anywhere_it_resumes_to_the_same_weights(self, tmp_path, monkeypatch, stop_at):
        monkeypatch.setattr("maodun.attacks.generative.fit._SAVE_EVERY", -1.0)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "a.ckpt", stop_at)
        resumed, whole = fit(tmp_path / "a.ckpt"), fit()
        assert resumed.attack == whole.attack
        for ours, theirs in zip(resumed.history, whole.history, strict=True):
            assert {k: v for k, v in ours.items() if k != "seconds"} == {
                k: v for k, v in theirs.items() if k != "seconds"
            }
        assert not list(tmp_path.glob("*.part"))

    def test_the_best_epoch_by_validation_is_kept(self):
        seen, scores = [], iter([0.1, 0.9, 0.3])

        def validate(attack):
            seen.append(attack)
            return next(scores)

        report = fit(validate=validate)
        assert (report.best_epoch, report.score) == (1, 0.9)
        assert report.attack == seen[1]

    def test_other_settings_are_refused(self, tmp_path):
        fit(tmp_path / "a.ckpt")
        game, proxies = contest()
        with pytest.raises(InputError, match="other settings"):
            fit_generator(game, images(48), torch.zeros(48, dtype=torch.int64), GeneratorFit(epochs=2), proxies=proxies,
                          checkpoint=tmp_path / "a.ckpt")  # fmt: skip

    def test_a_loss_that_is_not_finite_is_named(self):
        game, proxies = contest()
        game.generator.out.weight.data.fill_(math.nan)
        with pytest.raises(InputError, match="not finite; lower the rate"):
            fit_generator(game, images(8), torch.zeros(8, dtype=torch.int64), GeneratorFit(epochs=1), proxies=proxies)

    def test_the_sampler_learns_what_a_class_looks_like(self):
        """Class 0 is dark, class 1 bright; with a reference model that knows it, the sampler's images soon are too."""
        y = torch.arange(32) % 2
        x = (0.15 + 0.7 * y[:, None, None, None]).expand(-1, 1, 8, 8) + 0.02 * images(32)
        judge = Proxies([Brightness()], x)
        game = SamplingGame((1, 8, 8), 2, noise=4, width=2, proxies=judge, fidelity=1.0, seed=0)
        settings = GeneratorFit(epochs=40, batch_size=32, rate=2e-2, critic_rate=1e-2)
        report = fit_generator(game, x, y, settings, proxies=judge)
        made = report.attack.sample(torch.arange(32), y, seed=1)
        assert made[y == 1].mean() > made[y == 0].mean() + 0.3


RECIPE = {
    "name": "tiny",
    "attack": "multi-proxy",
    "data": {"spec": "digits", "limit": 64, "validation": 0.2},
    "eps": "1/4",
    "proxies": ["zoo:digits-cnn"],
    "validation": "zoo:digits-cnn-distilled-t1",
    "network": {"width": 2, "blocks": 0},
    "fit": {"epochs": 1, "batch_size": 16},
    "measure": {"limit": 30, "targets": ["zoo:digits-cnn-at"]},
}


class TestRecipe:
    def write(self, tmp_path, **changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (RECIPE | changes).items() if v is not None}))
        return path

    def test_from_the_command_line_to_a_file_that_attacks(self, maodun, tmp_path):
        path = self.write(tmp_path)
        assert trains_attack(path)
        assert not trains_attack(RECIPES / "digits-cnn.yaml")
        made = maodun("train", path, "--out", tmp_path / "out")
        assert made.code == 0, made.err
        file = tmp_path / "out" / "tiny.safetensors"
        assert f"file:{file}" in made.out
        assert "black-box success on zoo:digits-cnn-at" in made.out
        assert "white-box success on zoo:digits-cnn " in made.out
        assert [each.name for each in (tmp_path / "out").iterdir()] == ["tiny.safetensors"]
        attack = load_attack(file)
        assert attack.about["recipe"]["seed"] == 0
        assert attack.about["measured"]
        listed = maodun("list", "attacks", "--from", tmp_path / "out")
        assert "multi-proxy" in listed.out
        assert "tiny.safetensors" in listed.out
        words = "--norm", "linf", "--eps", "0.25", "--limit", "20", "--quiet"
        used = maodun("evaluate", "--model", "zoo:digits-cnn", "--data", "digits", "--attack", f"file:{file}", *words)
        assert used.code == 0, used.err

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"attack": "advgan", "proxies": ["zoo:digits-cnn", "zoo:digits-cnn-at"]}, "use multi-proxy"),
            ({"proxies": []}, "names no proxies"),
            ({"validation": "zoo:digits-cnn"}, "validates on the proxy zoo:digits-cnn"),
            ({"networks": {}}, "unknown key 'networks'.*network"),
            ({"options": {"kapa": 1}}, "kapa.*did you mean 'kappa'"),
            ({"eps": 2}, r"radius in \(0, 1\]"),
            ({"proxies": ["zoo:nothing"]}, "nothing"),
        ],
    )
    def test_recipes_that_cannot_be_meant(self, tmp_path, changes, words):
        with pytest.raises(InputError, match=words):
            train_generator(self.write(tmp_path, **changes), tmp_path / "out")

    def test_gan_sampling_needs_no_proxy(self, tmp_path):
        recipe = GeneratorRecipe.model_validate(
            RECIPE | {"attack": "gan-sampling", "proxies": [], "validation": None, "options": {"noise": 4}, "eps": 1.0}
        )
        made = train_generator(recipe, tmp_path)
        assert made.attack.noise == 4
        clean, fooled, forced = success(made.attack, Linear(), _two_classes(), seed=0)
        assert clean.shape == fooled.shape
        assert forced is None

    @pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
    def test_shipped_recipes_are_valid(self, path):
        recipe = load_generator_recipe(path)
        assert recipe.name == path.stem
        assert not set(recipe.proxies) & set(recipe.measure.targets)


@pytest.mark.parametrize("kind", [AdvGAN, MultiProxy, GanSampling])
def test_every_trained_kind_has_a_page_that_names_its_options(kind):
    text = (RECIPES.parents[1] / "docs" / "attacks" / f"{kind.name}.md").read_text()
    left_out = {"tensors", "about"}
    missing = [each.name for each in dataclasses.fields(kind) if each.init and f"`{each.name}`" not in text]
    assert set(missing) <= left_out
    assert kind.name in text
    for option in MultiProxyOptions.__dataclass_fields__ if kind is MultiProxy else ():
        assert f"`{option}`" in text or f"`{option}`" in (RECIPES.parents[1] / "docs/attacks/advgan.md").read_text()


def _two_classes():
    data = load_data("digits", limit=10)
    return dataclasses.replace(data, y=data.y % 2)
