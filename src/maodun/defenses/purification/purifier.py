"""The Diffusion Filter: noise that drowns the perturbation, and a learned score that brings the image back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.sizing import refuse_unless_smaller_fits, release
from maodun.core.streams import Stream
from maodun.defenses.preprocessing.base import Defense, DefenseSpec
from maodun.defenses.purification.denoiser import Denoiser
from maodun.defenses.purification.deviation import Observed
from maodun.defenses.purification.levels import CLEAN, Levels, parse_levels, vp_discrete
from maodun.defenses.purification.loading import load_score
from maodun.defenses.purification.presets import find_sampler
from maodun.defenses.purification.replay import Replay, Way
from maodun.defenses.purification.samplers import Sampler, State
from maodun.defenses.purification.solvers import EulerMaruyama


class DiffusionFilter(Defense):
    """Diffuse each image to the level `t_star`, run the learned reverse process back, and hand it on.

    x in [0, 1] becomes u = 2x - 1, u_{t*} = scale u + sigma n, then the reverse chain of `sampler` in `steps` steps,
    then (u + 1) / 2 clamped to [0, 1] (the clamp's derivative is 1 inside and 0 outside). `score` is a Denoiser, or
    what `load_score` takes: a .safetensors file, a diffusers folder or hub id, a witness's .pt. `t_star` in (0, 1) is a
    share of the noise levels; `sampler` a name of SAMPLERS or a Sampler; `levels` the table by name ("vp", "ve",
    "sub_vp", "vp_discrete", with arguments as Levels.name writes them), by default the network's own; `rounds` repeats
    diffusion and reversal; `votes` makes Defended average the probabilities of that many independent purifications.
    Noise is keyed by (seed, sample, draw, place in the chain), so a result does not depend on the batch. Its derivative
    is exact at the memory of one step (`gradient`, by default a Replay; a Plain keeps every activation). Costs
    rounds x nfe(steps) network evaluations per vote.

    InputError for t_star outside (0, 1) or beyond the network's training, no steps or votes, a score network that
    cannot be read, and for images whose size or channels the network does not take.

    The Diffusion Filter (DifFilter, TIFS 2024) is a reconstruction: its source names the forward equation, the learned
    score and an efficient sampler, but neither t*, nor solver, nor number of evaluations; those are ours.
    """

    name = "diffusion_filter"
    spec = DefenseSpec(stochastic=True, inner_loop=True)
    gradient: Way = Replay()

    def __init__(
        self,
        score: str | Denoiser = "",
        t_star: float = 0.1,
        steps: int = 5,
        sampler: str | Sampler = "ddim_eta1",
        rounds: int = 1,
        votes: int = 1,
        levels: str | Levels = "",
    ) -> None:
        super().__init__()
        for word, value in (("rounds", rounds), ("votes", votes)):
            if value < 1:
                raise InputError(f"{word} {value}", "there has to be at least one", "use 1")
        self.denoiser = load_score(score).freeze()
        own = getattr(self.denoiser, "levels", None) or vp_discrete()
        self.levels: Levels = (parse_levels(levels) if levels else own) if isinstance(levels, str) else levels
        self.sampler = find_sampler(sampler)
        self.t_star, self.steps, self.rounds, self.votes = t_star, steps, rounds, votes
        self.path = self.sampler.grid(self.levels.index(t_star), steps)
        self.denoiser.need_range(self.levels, self.sampler.highest(self.levels, self.path))
        self.spec = DefenseSpec(
            stochastic=True, inner_loop=True, nfe=rounds * votes * self.sampler.nfe(steps), votes=votes
        )

    @property
    def replays(self) -> int:
        """How many network evaluations one after the other need the memory of one."""
        return self.spec.nfe

    @contextmanager
    def surrogate_process(self, steps: int) -> Iterator[None]:
        """Purify in at most `steps` steps (0: a fifth of its own, at least one) for as long as the context lasts.

        The surrogate that an attacker differentiates instead (Lee and Kim, ICCV 2023).
        """
        path = self.path
        self.path = self.sampler.grid(path[0], min(self.steps, steps or max(1, self.steps // 5)))
        try:
            yield
        finally:
            self.path = path

    @contextmanager
    def adjoint_process(self, steps: int) -> Iterator[None]:
        """Solve the reverse equation in `steps` steps (0: its own) with the continuous adjoint for a derivative.

        For as long as the context lasts, whatever the filter's sampler and guidance are.
        """
        from maodun.defenses.purification.adjoint import ReverseEquation

        path, gradient = self.path, self.gradient
        self.path = EulerMaruyama().grid(path[0], steps or self.steps)
        self.gradient = ReverseEquation(self.denoiser, self.levels)
        try:
            yield
        finally:
            self.path, self.gradient = path, gradient

    @contextmanager
    def observed(self) -> Iterator[list[Tensor]]:
        """Collect how far each call's way back strays from its way there, (N,) each, for as long as it lasts."""
        way, observer = self.gradient, Observed(self.levels)
        self.gradient = observer
        try:
            yield observer.deviations
        finally:
            self.gradient = way

    def guide(self, x: Tensor) -> State:
        """Return what every move looks at besides the state, as a differentiable function of `x`: here nothing."""
        del x
        return ()

    def moves(self) -> Iterator[tuple[int, int]]:
        """Yield the chain as pairs of levels (from, to): up from -1 is a diffusion, down is a reverse step.

        The place of a pair in this order is the `i` of its noise's purpose, "diffusion_filter-i".
        """
        for _ in range(self.rounds):
            yield from pairwise((CLEAN, *self.path))

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State = ()) -> State:
        """Return the state after one move: pure, so that a replay with the same noise gives the same bits."""
        del guide
        if t == CLEAN:
            scale, sigma = self.levels.at(s)
            return self.sampler.init(scale * state[0] + sigma * noise)
        return self.sampler.step(self.denoiser, self.levels, state, t, s, noise)

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        """Return the noise of move `i`, which starts at level `t`, for the rows of `x`; zero if nobody will use it."""
        if t != CLEAN and not self.sampler.stochastic:
            return x.new_zeros(())
        return context.noise(x, f"{self.name}-{i}").normal()

    def forward(self, x: Tensor) -> Tensor:
        """Return the purified images, N x C x H x W in [0, 1]."""
        self.need_images(x)
        self.denoiser.need_shape(x)
        with context.ensured(x):
            u = self.gradient.run(self, tuple(self.moves()), (2.0 * x - 1.0,), self.guide(x))
        return ((u + 1.0) / 2.0).clamp(0.0, 1.0)

    def attach(self, model: nn.Module) -> None:
        """Refuse a classifier that declares other inputs than what the filter hands on."""
        refuse_bounds(model)

    def purify(self, x: Tensor, seed: int = 0, ids: Tensor | None = None, batch_size: int = 64) -> Tensor:
        """Return the purified images of `x` (N x C x H x W in [0, 1]), without gradients.

        Noise is a function of `seed` and of the sample `ids` (N,), by default 0, 1, 2, ... At most `batch_size` images
        at a time, fewer when memory runs out; InputError when not even one fits, and for values outside of [0, 1].
        """
        if x.numel() and not bool(((x >= 0.0) & (x <= 1.0)).all()):
            raise InputError("images", "hold values outside of [0, 1]", "scale them to [0, 1]")
        numbers = torch.arange(x.shape[0], device=x.device) if ids is None else ids.to(x.device)
        out, done, rows = torch.empty_like(x), 0, max(1, batch_size)
        with torch.no_grad():
            while done < x.shape[0]:
                part = slice(done, done + rows)
                try:
                    with context.draw(Stream(seed, "purify"), numbers[part], torch.zeros_like(numbers[part])):
                        out[part] = self(x[part])
                except (RuntimeError, MemoryError) as error:
                    refuse_unless_smaller_fits(error, min(rows, x.shape[0] - done))
                    release(x.device)
                    rows = max(1, rows // 2)
                    continue
                done += rows
        return out

    def trajectory(self, x: Tensor, seed: int = 0) -> Tensor:
        """Return what `purify` goes through, (moves + 1) x N x C x H x W in [0, 1]: the input, then after every move.

        A state at level t is shown as u / scale, clipped: the image it would be without its fading. For pictures.
        """
        ids = torch.arange(x.shape[0], device=x.device)
        state: State = (2.0 * x - 1.0,)
        shown = [x]
        with torch.no_grad(), context.draw(Stream(seed, "purify"), ids, torch.zeros_like(ids)):
            guide = self.guide(x)
            for i, (t, s) in enumerate(self.moves()):
                state = self.advance(state, t, s, self.draw(x, i, t), guide)
                shown.append(((state[0] / self.levels.at(s)[0] + 1.0) / 2.0).clamp(0.0, 1.0))
        return torch.stack(shown)

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of `model` behind the filter; with votes, the log of the mean probabilities."""
        return super().answer(model, x) if self.votes == 1 else vote(self, model, x)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return (
            f"t_star={self.t_star}, steps={self.steps}, sampler={self.sampler!r}, rounds={self.rounds}, "
            f"votes={self.votes}, levels={self.levels.name}"
        )


def refuse_bounds(model: nn.Module) -> None:
    """Raise InputError for a classifier that declares inputs outside of [0, 1] (`bounds`, as foolbox's models do)."""
    bounds = getattr(model, "bounds", None)
    if bounds is not None and tuple(float(edge) for edge in bounds) != (0.0, 1.0):
        reason = f"takes inputs in [{float(bounds[0]):g}, {float(bounds[1]):g}], and the filter hands on [0, 1]"
        raise InputError("classifier", reason, "put the scaling inside the model")


def vote(defense: Defense, model: nn.Module, x: Tensor) -> Tensor:
    """Return log mean softmax over `defense.spec.votes` independent passes through defence and `model`, N x classes.

    Vote v draws its noise from the child "vote-v" of the current draw's stream, so votes are independent of each other
    and of the batch. Soft votes: the answer has a derivative, which a hard majority does not (pitfall 18: an attack
    that sees one copy of a voting defence attacks something else).
    """
    total: Tensor | None = None
    votes = defense.spec.votes
    for v in range(votes):
        with context.part(f"vote-{v}"):
            shares: Tensor = model(defense(x)).log_softmax(1)
        # In logarithms: a probability that rounds to zero has no derivative left.
        total = shares if total is None else torch.logaddexp(total, shares)
    if total is None:
        raise InputError("votes 0", "there has to be at least one", "use 1")
    return total - math.log(votes)
