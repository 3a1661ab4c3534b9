"""What each preprocessor adds to a forward: the least CPU time of a few tries, per CIFAR-10 image.

MAODUN_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.preprocessing_cost
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from maodun.defenses.preprocessing import PREPROCESSORS, Quilting
from maodun.zoo import load_data, load_model
from maodun.zoo.architectures import build_architecture


def least(call: Callable[[], object], tries: int, images: int) -> float:
    """Return the least CPU milliseconds per image."""
    found = []
    for _ in range(tries):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return 1e3 * min(found) / images


def main() -> None:
    x = load_data("cifar10", limit=64).x
    nets = {
        "resnet8": load_model("zoo:cifar10-resnet8").model,
        "resnet56": load_model("witness:resnet56").model,
        "resnet18": build_architecture("preact-resnet18").eval(),
    }
    with torch.no_grad():
        forward = {name: least(lambda net=net: net(x), 3, len(x)) for name, net in nets.items()}
        print("forward, ms per image: " + ", ".join(f"{name} {each:.2f}" for name, each in forward.items()))
        for kind in PREPROCESSORS:
            defense = kind()
            if isinstance(defense, Quilting):
                defense.learn(load_data("cifar10", split="train", limit=500).x)
            own = least(lambda defense=defense: defense(x), 4, len(x))
            shares = ", ".join(f"{name} {100 * own / each:.1f} %" for name, each in forward.items())
            print(f"{kind.name}: {own:.3f} ms; {shares}")


if __name__ == "__main__":
    main()
