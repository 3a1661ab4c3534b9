"""The samplers by name."""

from __future__ import annotations

from maodun.core.errors import InputError, nearest
from maodun.defenses.purification.samplers import DDIM, DDPM, Sampler, Tweedie
from maodun.defenses.purification.solvers import DPMSolver, EulerMaruyama, Exponential, Heun

SAMPLERS: dict[str, Sampler] = {
    "euler_maruyama": EulerMaruyama(),
    "ddpm": DDPM(),
    "ddim": DDIM(eta=0.0),
    "ddim_eta1": DDIM(eta=1.0),
    "exponential": Exponential(),
    "dpm_solver": DPMSolver(),
    "dpm_solver_sde": DPMSolver(sde=True),
    "heun": Heun(),
    "heun_churn": Heun(churn=0.5),
    "tweedie": Tweedie(),
}


def find_sampler(name: str | Sampler) -> Sampler:
    """Return the sampler called `name`, or `name` itself when it is one; InputError with the nearest name otherwise."""
    if isinstance(name, Sampler):
        return name
    if name not in SAMPLERS:
        raise InputError(f"sampler '{name}'", "there is none of that name", nearest(name, list(SAMPLERS)))
    return SAMPLERS[name]
