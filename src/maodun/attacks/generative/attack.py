"""The trained generators as attacks: one forward of a small network per image, no gradient, no search."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from maodun.attacks.artifacts import TrainedAttack, TrainedState
from maodun.attacks.generative.networks import Generator, Sampler, check_shape
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.problem import Problem
from maodun.core.streams import Stream
from maodun.core.threat import Threat

_CHUNK = 256
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class GeneratorAttack(TrainedAttack):
    """Base of attacks whose generator adds eps * tanh(G(E(x) + noise)) to an image; linf only.

    `shape` C x H x W, at least 8 x 8; `eps` in input units is the radius trained for: another radius rescales the same
    tanh output, which is allowed and not what was trained. `width` and `blocks` are the network's. `draws` is the most
    candidates per image: the first is made without noise, later ones with normal noise of deviation `noise` on the
    latent code, keyed by the sample id.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    images_only: ClassVar[bool] = True

    width: int = 16
    blocks: int = 2
    noise: float = 0.0
    draws: int = 1

    def __post_init__(self) -> None:
        check_shape(self.shape, f"attack '{self.name}'")
        if self.norm != "linf":
            raise UnsupportedError(f"attack '{self.name}'", f"is not trained in {self.norm}", "use linf")
        if self.draws < 1 or self.noise < 0:
            raise InputError(f"attack '{self.name}'", "needs draws >= 1 and noise >= 0", "correct the options")
        super().__post_init__()
        _ = self.network

    @property
    def tries(self) -> int:
        """One candidate, or `draws` of them where there is noise to draw."""
        return self.draws if self.noise else 1

    @cached_property
    def network(self) -> Generator:
        """The generator with the attack's weights, in evaluation mode."""
        with torch.device("meta"):
            network = Generator(self.shape[0], self.width, self.blocks)
        return _loaded(network, self)

    def craft(self, x: Tensor, ids: Tensor, stream: Stream, eps: float, number: int) -> Tensor:
        """Return x + eps * direction for images N x shape, noise on the code from the second try on."""
        network = self.network.to(x.device)
        code = network.encode(x)
        if number and self.noise:
            code = code + self.noise * stream.normal(ids, tuple(code.shape[1:]), number).to(code)
        return x + eps * network.decode(code, (x.shape[2], x.shape[3]))


@dataclass(frozen=True, kw_only=True)
class AdvGAN(GeneratorAttack):
    """A generator trained against one model, and a critic that wants images to look real (Xiao et al., IJCAI 2018).

    The margin is taken on logits as in the paper, not on probabilities as in a well-known implementation of it.
    """

    name: ClassVar[str] = "advgan"


@dataclass(frozen=True, kw_only=True)
class MultiProxy(GeneratorAttack):
    """A generator trained against several models at once, with latent and data branches held together (reconstruction).

    A reconstruction from a short description: several proxies weighted by how firmly they stand, a latent-data
    distance constraint against collapse. With one proxy and no latent branch it is AdvGAN.
    """

    name: ClassVar[str] = "multi-proxy"


@dataclass(frozen=True, kw_only=True)
class GanSampling(TrainedAttack):
    """Draws whole images of the wanted class from a GAN and keeps the first that the target misreads; unrestricted.

    Not AdvGAN: no image is perturbed. `shape` is C x H x W, `classes` the number of classes; `noise` and `width` are
    the sampler's. `draws` is the most images, hence queries, per sample. The threat is the whole box (linf with eps 1).
    That an image of class y shows a y is the GAN's promise: a GAN that draws it badly also "succeeds".
    """

    name: ClassVar[str] = "gan-sampling"
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    images_only: ClassVar[bool] = True

    eps: float = 1.0
    classes: int
    noise: int = 64
    width: int = 16
    draws: int = 20

    def __post_init__(self) -> None:
        check_shape(self.shape, f"attack '{self.name}'")
        if self.draws < 1 or self.classes < 2:
            raise InputError(f"attack '{self.name}'", "needs draws >= 1 and classes >= 2", "correct the options")
        super().__post_init__()
        _ = self.network

    @property
    def tries(self) -> int:
        """As many images as `draws`."""
        return self.draws

    @cached_property
    def network(self) -> Sampler:
        """The sampler with the attack's weights, in evaluation mode."""
        with torch.device("meta"):
            network = Sampler(self.shape, self.classes, self.noise, self.width)
        return _loaded(network, self)

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse a ball: the images are not near anything."""
        super().check(x, threat)
        if threat.eps < 1.0:
            reason = f"makes whole images, which no ball of eps {threat.eps:g} holds"
            raise UnsupportedError(f"attack '{self.name}'", reason, "ask for linf with eps 1, the whole box")

    def step(self, problem: Problem, state: TrainedState) -> TrainedState:
        """Draw an image of every sample's class and look whether the target says another class."""
        if int(problem.y.max()) >= self.classes:
            reason = f"knows {self.classes} classes and was asked for class {int(problem.y.max())}"
            raise InputError(f"attack '{self.name}'", reason, "train it on this data")
        images = self.sample(problem.ids, problem.y, problem.session.seed, state.number)
        if problem.session.oracle.access == "decision":
            problem.decisions(images)
        else:
            problem.logits(images)
        return dataclasses.replace(state, x=images, number=state.number + 1)

    def sample(self, ids: Tensor, y: Tensor, seed: int = 0, number: int = 0) -> Tensor:
        """Return N x shape images in (0, 1) of the classes `y` (N,), the `number`-th draw of the sample ids (N,)."""
        noise = Stream(seed, f"{self.name}/noise").normal(ids, (self.noise,), number)
        network = self.network.to(ids.device)
        with torch.no_grad():
            parts = [
                network(few, which)
                for few, which in zip(torch.split(noise, _CHUNK), torch.split(y, _CHUNK), strict=True)
            ]
        return torch.cat(parts)


def _loaded(network: M, attack: TrainedAttack) -> M:
    """Return `network` in evaluation mode with the attack's tensors; InputError when they are another network's."""
    try:
        # Built without values, so that no random number is drawn, the network takes the tensors as they are.
        network.load_state_dict(dict(attack.tensors), assign=True)
    except RuntimeError as error:
        reason = "its weights are of another network (" + str(error).splitlines()[-1].strip()[:120] + ")"
        raise InputError(f"attack '{attack.name}'", reason, "correct width, blocks and shape") from error
    return network.eval().requires_grad_(False)
