"""Training of the relation-preservation module on unlabelled patches, and the gates it must pass on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maodun.attacks.multitask import relations
from maodun.attacks.multitask.module import RelationModule, settle
from maodun.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RelationFit:
    """Steps of Adam on batches of unlabelled patches, and the weights of the terms (reconstruction, methods 3.3)."""

    steps: int = 300
    batch_size: int = 192
    rate: float = 2e-3
    perplexity: float = 20.0
    relation: float = 1.0
    laplacian: float = 0.1
    geometry: float = 0.5
    reconstruction: float = 1.0
    whitening: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 4:
            raise InputError("relation training", "needs steps >= 1 and batches of 4 or more", "correct the settings")


def relation_terms(module: RelationModule, x: Tensor, settings: RelationFit) -> dict[str, Tensor]:
    """Return the weighted terms of the loss on patches B x 3 x 32 x 32."""
    with torch.no_grad():
        h = module.relate(x)
        p = relations.affinities(h, settings.perplexity)
    z = module.codes(x).flatten(1)
    return {
        "relation": settings.relation * relations.neighbourhood_divergence(p, z, module.scale),
        "laplacian": settings.laplacian * relations.laplacian(p, z),
        "geometry": settings.geometry * relations.distance_decorrelation(h, z),
        "reconstruction": settings.reconstruction * (module.decode(z) - x).abs().mean(),
        "whitening": settings.whitening * relations.whitening(z),
    }


def fit_relation(
    module: RelationModule,
    patches: Tensor,
    settings: RelationFit,
    *,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> RelationModule:
    """Train encoder and decoder in place on patches N x 3 x 32 x 32 in [0, 1]; fill the bank; return it, evaluated.

    `on_step` gets the step and the terms, every 25 steps. InputError for a control, which has nothing to learn.
    """
    if module.kind != "learned":
        raise InputError(f"relation module '{module.kind}'", "is a control and is not trained", "train 'learned'")
    generator = torch.Generator().manual_seed(seed)
    weights = [*module.encoder.parameters(), *module.decoder.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = torch.optim.Adam(weights, lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    for step in range(settings.steps):
        rows = torch.randint(patches.shape[0], (settings.batch_size,), generator=generator)
        terms = relation_terms(module, patches[rows], settings)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if on_step is not None and (step + 1) % 25 == 0:
            on_step(step + 1, {name: float(value.detach()) for name, value in terms.items()})
    settle(module, patches, settings.perplexity)
    return module.eval().requires_grad_(False)


def quality(module: RelationModule, patches: Tensor, labels: Tensor | None = None, k: int = 15) -> dict[str, float]:
    """Return trustworthiness, continuity (scikit-learn, `k` neighbours), PSNR of the decoder, and k-NN accuracy.

    `patches` N x 3 x 32 x 32 were not trained on. Labels serve this evaluation alone; without them no accuracy.
    InputError without scikit-learn.
    """
    try:
        from sklearn.manifold import trustworthiness
    except ImportError as error:
        raise InputError("quality gates", "scikit-learn is not installed", "pip install 'maodun[data]'") from error
    with torch.no_grad():
        h, z = module.relate(patches), module.codes(patches).flatten(1)
        squares = (module.decode(z) - patches).square().flatten(1).mean(1)
    found = {
        "trustworthiness": float(trustworthiness(h.numpy(), z.numpy(), n_neighbors=k)),
        "continuity": float(trustworthiness(z.numpy(), h.numpy(), n_neighbors=k)),
        "psnr": float((-10.0 * squares.clamp(min=1e-10).log10()).mean()),
    }
    if labels is not None:
        near = (z @ z.T).fill_diagonal_(-torch.inf).topk(k, 1).indices
        votes = torch.nn.functional.one_hot(labels[near]).sum(1)
        found["knn_accuracy"] = float((votes.argmax(1) == labels).float().mean())
    return found
