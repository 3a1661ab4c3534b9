"""The multi-proxy game: one generator with a data branch and a latent branch against K frozen models and a critic.

A reconstruction. The source says: several proxy discriminators, and a constraint on the distance between latent and
data adversarial samples against the collapse of patterns. It gives no architecture, loss, data or number; the networks,
the three terms of the constraint and their weights are this project's own. With one proxy, no noise and no latent
branch every term but AdvGAN's three is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.attacks.generative import losses as terms
from maodun.attacks.generative.attack import AdvGAN, GeneratorAttack, MultiProxy
from maodun.attacks.generative.collapse import mean_cosine
from maodun.attacks.generative.contest import Batch, Losses
from maodun.attacks.generative.networks import Critic, Generator, check_shape, initialise
from maodun.attacks.generative.proxies import Proxies
from maodun.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MultiProxyOptions:
    """Weights and switches of the loss; those of AdvGAN are `MultiProxyOptions.advgan()`.

    `adversarial` weighs the proxies' margins (floor -`kappa` in logits), `realism` the critic's opinion in the `game`,
    `agents` the opinion of one linear head per proxy on its penultimate features, `norm` the l2 length of the
    perturbation beyond `slack` input units. `weighting` over the proxies is uniform, softmax (by margin over
    `temperature` logits) or adaea (sharpness `beta`).
    `latent` adds the latent branch, whose code is moved by normal noise of deviation `noise`; `latent_data` weighs the
    distance constraint, whose terms `cycle`, `shift` and `consistency` have weights of their own (0 leaves one out);
    `diversity` weighs mode seeking, asking for `least` mean difference in pixels per mean difference in latents.
    """

    kappa: float = 0.0
    adversarial: float = 10.0
    weighting: terms.Weighting = "softmax"
    temperature: float = 1.0
    beta: float = 10.0
    game: terms.Game = "lsgan"
    realism: float = 1.0
    agents: float = 0.0
    norm: float = 0.0
    slack: float = 0.0
    latent: bool = True
    noise: float = 0.5
    latent_data: float = 1.0
    cycle: float = 1.0
    shift: float = 1.0
    consistency: float = 1.0
    diversity: float = 0.0
    least: float = 0.05

    def __post_init__(self) -> None:
        positive = ("temperature", "beta", "least")
        weights = ("kappa", "adversarial", "realism", "agents", "norm", "slack", "noise", "latent_data")
        for name in (*positive, *weights, "cycle", "shift", "consistency", "diversity"):
            value = getattr(self, name)
            if not value >= 0 or (name in positive and value == 0):
                raise InputError(f"option '{name}'", f"cannot be {value}", "give a positive number")
        if (self.latent and not self.noise) or (self.diversity and not self.latent):
            raise InputError("option 'latent'", "the latent branch and its terms need noise", "set noise above 0")

    @classmethod
    def advgan(cls, **changes: Any) -> MultiProxyOptions:
        """Return AdvGAN: uniform weights, no latent branch, no noise, a penalty on the perturbation's length."""
        plain: dict[str, Any] = {"weighting": "uniform", "latent": False, "noise": 0.0, "latent_data": 0.0, "norm": 1.0}
        return cls(**(plain | changes))


@dataclass(frozen=True)
class Made:
    """One batch's codes and images; those of the latent branch are None without it. `again` is a second draw."""

    code: Tensor
    delta: Tensor
    x_data: Tensor
    noise: Tensor | None = None
    x_latent: Tensor | None = None
    again: tuple[Tensor, Tensor] | None = None

    @property
    def images(self) -> list[Tensor]:
        """The images of each branch."""
        return [self.x_data] if self.x_latent is None else [self.x_data, self.x_latent]


class MultiProxyGame:
    """The contest over `proxies` for images of `shape` in the linf ball of radius `eps`; equal seeds, equal networks.

    `kind` "advgan" or "multi-proxy" is the name the attack gets. Errors: InputError for images below 8 x 8.
    """

    def __init__(
        self,
        proxies: Proxies,
        shape: tuple[int, ...],
        eps: float,
        options: MultiProxyOptions,
        *,
        kind: str = "multi-proxy",
        width: int = 16,
        blocks: int = 2,
        seed: int = 0,
    ) -> None:
        check_shape(shape, f"attack '{kind}'")
        if not 0 < eps <= 1:
            raise InputError(f"eps {eps:g}", "a generator is trained for a radius in (0, 1]", "give one, as 8/255")
        self.proxies, self.shape, self.eps, self.options, self.kind = proxies, shape, eps, options, kind
        self.width, self.blocks = width, blocks
        with torch.random.fork_rng(devices=[]):
            self.generator = Generator(shape[0], width, blocks)
            self.critic = nn.ModuleDict({"images": Critic(shape[0])})
            if options.agents:
                with torch.no_grad(), proxies.ready():
                    _, features = proxies.logits_and_features(proxies.example)
                self.critic["agents"] = nn.ModuleList(nn.Linear(each.shape[1], 1) for each in features)
        initialise(self.generator, 2 * seed)
        initialise(self.critic, 2 * seed + 1)

    def play(self, batch: Batch) -> Made:
        """Return both branches' images."""
        x, size = batch.x, (batch.x.shape[2], batch.x.shape[3])
        code = self.generator.encode(x)
        delta = self.eps * self.generator.decode(code, size)
        x_data = (x + delta).clamp(0.0, 1.0)
        if not self.options.latent:
            return Made(code, delta, x_data)
        noise = self.options.noise * batch.normal(*code.shape)
        x_latent = self._image(x, code + noise)
        again = None
        if self.options.diversity:
            other = self.options.noise * batch.normal(*code.shape)
            again = (other, self._image(x, code + other))
        return Made(code, delta, x_data, noise, x_latent, again)

    def _image(self, x: Tensor, code: Tensor) -> Tensor:
        return (x + self.eps * self.generator.decode(code, (x.shape[2], x.shape[3]))).clamp(0.0, 1.0)

    def critic_loss(self, batch: Batch, made: Made) -> Tensor:
        """Return the critic's loss on clean and made images, plus that of every agent head on its features."""
        look = self.critic["images"]
        loss = terms.critic_loss(self.options.game, look(batch.x), [look(each.detach()) for each in made.images])
        if self.options.agents:
            with torch.no_grad():
                views = [self.proxies.logits_and_features(each)[1] for each in (batch.x, *made.images)]
            heads = [
                terms.critic_loss(self.options.game, head(real)[:, 0], [head(fake)[:, 0] for fake in fakes])
                for head, real, *fakes in zip(self.critic["agents"], *views, strict=True)  # type: ignore[call-overload]
            ]
            loss = loss + torch.stack(heads).mean()
        return loss

    def losses(self, batch: Batch, made: Made) -> Losses:
        """Return adversarial, realism, norm, latent-data and diversity terms and their weighted sum."""
        o, images = self.options, made.images
        both = torch.cat(images)
        parts: dict[str, Tensor] = {}
        features: list[Tensor] = []
        if o.agents:
            logits, features = self.proxies.logits_and_features(both)
        else:
            logits = self.proxies.logits(both)
        margins = terms.proxy_margins(logits, batch.y.repeat(len(images)), o.kappa)
        weights = self._weights(margins.mean(1), batch, made)
        parts["adversarial"] = (weights * margins.mean(1)).sum()
        parts["realism"] = terms.realism_loss(o.game, [self.critic["images"](each) for each in images])
        parts["norm"] = terms.norm_term(made.delta, o.slack)
        loss = o.adversarial * parts["adversarial"] + o.realism * parts["realism"] + o.norm * parts["norm"]
        if o.agents:
            heads = zip(self.critic["agents"], features, strict=True)  # type: ignore[call-overload]
            opinions = [terms.realism_loss(o.game, head(each)[:, 0].chunk(len(images))) for head, each in heads]
            parts["agents"] = torch.stack(opinions).mean()
            loss = loss + o.agents * parts["agents"]
        if made.x_latent is not None:
            loss = loss + self._latent(batch, made, parts)
        parts["loss"] = loss
        with torch.no_grad():
            for number, each in enumerate(logits):
                fooled = each[: batch.y.shape[0]].argmax(1) != batch.y
                parts[f"log asr {number + 1}"] = fooled.float().mean()
            parts["log cosine"] = mean_cosine(made.x_data - batch.x)
        return parts

    def _latent(self, batch: Batch, made: Made, parts: dict[str, Tensor]) -> Tensor:
        """Return the weighted terms that only the latent branch has, each noted in `parts`."""
        o = self.options
        if made.noise is None or made.x_latent is None:
            raise ValueError("the latent terms need the latent branch")
        loss = torch.zeros((), device=batch.x.device)
        if o.latent_data and (o.cycle or o.shift):
            of_data, of_latent = self.generator.encode(torch.cat(made.images)).chunk(2)
            parts["cycle"] = terms.cycle_term(of_data, made.code + made.noise)
            parts["shift"] = terms.shift_term(of_latent, made.code, made.noise)
            loss = loss + o.latent_data * (o.cycle * parts["cycle"] + o.shift * parts["shift"])
        if o.latent_data and o.consistency:
            parts["consistency"] = terms.consistency_term(made.x_data, made.x_latent, self.eps)
            loss = loss + o.latent_data * o.consistency * parts["consistency"]
        if made.again is not None:
            other, second = made.again
            parts["diversity"] = terms.diversity_term(made.x_latent, second, made.noise, other, o.least)
            loss = loss + o.diversity * parts["diversity"]
        return loss

    def _weights(self, margins: Tensor, batch: Batch, made: Made) -> Tensor:
        if self.options.weighting != "adaea" or len(self.proxies) == 1:
            kind = "uniform" if self.options.weighting == "adaea" else self.options.weighting
            return terms.hardness(margins, kind, self.options.temperature)
        return terms.agreement(self._ratios(batch, made.x_data.detach()), self.options.beta)

    def _ratios(self, batch: Batch, x: Tensor) -> Tensor:
        """Return how far a sign step of eps / 10 along each proxy's own gradient moves every proxy's cross-entropy."""
        x = x.requires_grad_(True)
        before = torch.stack([F.cross_entropy(each, batch.y) for each in self.proxies.logits(x)])
        grads = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in before]
        moved = []
        with torch.no_grad():
            for grad in grads:
                step = (x + 0.1 * self.eps * grad.sign()).clamp(0.0, 1.0)
                after = torch.stack([F.cross_entropy(each, batch.y) for each in self.proxies.logits(step)])
                moved.append(after - before)
        table = torch.stack(moved)
        return table / table.diagonal().clamp(min=1e-6)

    def attack(self, about: Mapping[str, Any] | None = None) -> GeneratorAttack:
        """Return the generator as it is now, as an attack."""
        kinds: dict[str, type[GeneratorAttack]] = {"advgan": AdvGAN, "multi-proxy": MultiProxy}
        return kinds[self.kind](
            shape=self.shape,
            eps=self.eps,
            width=self.width,
            blocks=self.blocks,
            noise=self.options.noise,
            tensors={name: value.clone() for name, value in self.generator.state_dict().items()},
            about=about or {},
        )
