"""`python -m benchmarks.purification`: images per second of the filter beside a plain diffusers loop, in one process.

Both run the same UNet2DModel (random weights: what it predicts changes no cost) with the same five levels of DDIM,
eta 1. The plain loop is what one writes with DDIMScheduler: add_noise, then unet and scheduler.step per level. Times:
CPU seconds of one thread, the least of interleaved repeats, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SHAPE, LEVELS = (3, 16, 16), (99, 79, 59, 39, 19)


def plain(unet: torch.nn.Module, x: Tensor) -> Tensor:
    """Return purified images as a plain diffusers loop makes them."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        u = 2 * x - 1
        u = scheduler.add_noise(u, torch.randn_like(u), torch.tensor([LEVELS[0]]))
        for t in LEVELS:
            u = scheduler.step(unet(u, t).sample, t, u, eta=1.0).prev_sample
    return ((u + 1) / 2).clamp(0, 1)


def main() -> None:
    """Measure and write results/purification.json."""
    from maodun.app.process import keep_freed_memory
    from maodun.defenses.purification import DiffusionFilter
    from maodun.defenses.purification.network import new_network

    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--n", type=int, default=64)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--channels", type=int, nargs="+", default=[64, 96])
    asked = words.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    kinds = {"form": "eps", "top": 1.0, "channels": tuple(asked.channels)}
    unet = new_network(SHAPE, **kinds).core.unet.eval().requires_grad_(False)
    filter_ = DiffusionFilter(new_network(SHAPE, **kinds), steps=len(LEVELS))
    x = torch.rand(asked.n, *SHAPE, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], Tensor]] = {"diffusers": lambda: plain(unet, x), "maodun": lambda: filter_.purify(x)}
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(asked.repeats):
        for name, work in ways.items():
            start = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - start)
    speed = {name: round(asked.n / seconds, 2) for name, seconds in least.items()}
    result = {"images per CPU second": speed, "ratio": round(least["diffusers"] / least["maodun"], 3)} | vars(asked)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "purification.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
