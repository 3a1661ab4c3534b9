"""How many samples pass through the model at once: what fits the cache on a CPU, what fits the memory on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError

# Measured on a 2-core CPU (benchmarks/README.md): a convolutional net is fastest per sample when the activations of one
# micro-batch stay near the last-level cache; far smaller batches pay per-call overhead, far larger ones page faults.
_CPU_ACTIVATION_BYTES = 64 * 2**20
_GPU_SHARE = 0.25


# What a model that is asked elsewhere is given at a time; it makes its own requests of it.
_METERED = 256


def metered(model: nn.Module) -> bool:
    """Tell whether any submodule declares `metered = True`: a forward costs a query elsewhere."""
    return any(getattr(module, "metered", False) is True for module in model.modules())


def activation_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of all leaf-module outputs for one sample, measured by one forward of the first row of `x`.

    Inside a module with `replays` = n, whose n evaluations one after the other need the memory of one, a share of them;
    so too inside the modules that it has `attached`, which it asks as often.
    """
    total = 0.0
    share: dict[int, float] = {}
    for each in model.modules():
        passes: object = getattr(each, "replays", None)
        if isinstance(passes, int):
            inside = [leaf for module in (each, *getattr(each, "attached", ())) for leaf in module.modules()]
            share.update({id(leaf): 1.0 / passes for leaf in inside})

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += share.get(id(module), 1.0) * output.numel() * output.element_size()

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return max(int(total), x[:1].numel() * x.element_size())


def automatic_batch_size(model: nn.Module, x: Tensor) -> int:
    """Return a power of two between 8 and 512 (4096 on a GPU) for micro-batches of `x` (N x ...)."""
    if x.shape[0] == 0:
        return 1
    if metered(model):
        return _METERED
    each = activation_bytes(model, x)
    if x.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(x.device)
        # A backward pass keeps the activations and about as much again for gradients and workspace.
        room, most = int(free * _GPU_SHARE) // (3 * each), 4096
    else:
        room, most = _CPU_ACTIVATION_BYTES // each, 512
    size = max(8, min(most, room))
    return 1 << (size.bit_length() - 1)


def refuse_unless_smaller_fits(error: BaseException, rows: int) -> None:
    """Return when `error` says that memory ran out on `rows` rows, of which fewer may fit; else raise.

    InputError when it was a single row, `error` itself when it says something else.
    """
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in text:
        raise error
    if rows <= 1:
        remedy = "use a smaller model or fewer steps, free memory, or take another device"
        raise InputError("memory", f"not even one sample fits ({text.splitlines()[0][:80]})", remedy) from error


def release(device: torch.device) -> None:
    """Give back what torch's allocator holds on `device` without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
