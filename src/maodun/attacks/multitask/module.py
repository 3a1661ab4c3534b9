"""The relation-preservation module: images to codes on a sphere, whose neighbourhoods are those of label-free features.

A reconstruction. No label, no task loss and no network trained for a task enters it: its first layer are filters cut
out of unlabelled patches and whitened (Coates and Ng, 2011), at two scales; the rest is learnt to keep the relations
of their pooled answers. It is still a learned representation: "no task-trained surrogate, no task loss" is what may be
said of an attack that uses it, not "no surrogate".
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.attacks.multitask.encoders import calibrate, residual_encoder
from maodun.core.errors import InputError

PATCH = 32
Kind = Literal["learned", "pca", "random", "views", "views-random"]
KINDS = ("learned", "pca", "random", "views", "views-random")
_KERNEL = 5


class Filters(nn.Module):
    """Fixed 5 x 5 filters at full and half resolution, both signs kept: N x 3 x H x W to N x 4F x H/2 x W/2."""

    weight: Tensor
    gain: Tensor

    def __init__(self, count: int = 16) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(count, 3, _KERNEL, _KERNEL))
        self.register_buffer("gain", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified answers of both scales."""
        fine = F.conv2d(x, self.weight, stride=2, padding=2) * self.gain[0]
        coarse = F.conv2d(F.avg_pool2d(x, 2, ceil_mode=True), self.weight, padding=2) * self.gain[1]
        both = torch.cat([fine, coarse], 1)
        return torch.cat([F.relu(both), F.relu(-both)], 1)


class RelationModule(nn.Module):
    """A code of `width` numbers and length one for every 32 x 32 window of an image, eight pixels apart.

    Takes N x 3 x H x W in [0, 1], H and W at least 32; `codes` returns N x width x h x w, the call itself the same
    flattened to N rows (as an Oracle expects of a model). `bank` anchors are codes of unlabelled patches; `sharpness`
    turns inner products with them into a neighbourhood. `kind`: learned, or one of the controls "pca" (the principal
    components of the window's pixels) and "random" (the learned one's shape with random weights); "views", a residual
    network learnt to keep views of one image together (`views.fit_views`), and its control "views-random". `maps` names
    the layers that see less than a window, first to last.
    """

    bank: Tensor
    sharpness: Tensor

    def __init__(self, kind: Kind = "learned", width: int = 64, filters: int = 16, anchors: int = 512) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"relation module '{kind}'", "is of no known kind", "use one of " + ", ".join(KINDS))
        self.kind, self.width, self.scale = kind, width, 10.0
        self.register_buffer("bank", torch.zeros(anchors, width))
        self.register_buffer("sharpness", torch.ones(()))
        self.filters: nn.Module = Filters(filters)
        self.encoder: nn.Module = nn.Sequential(
            nn.Conv2d(4 * filters, 48, 3, 2, 1), nn.SiLU(), nn.Conv2d(48, 48, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(48, width, 4),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(width, 32 * 16), nn.SiLU(), nn.Unflatten(1, (32, 4, 4)), nn.ConvTranspose2d(32, 24, 4, 2, 1),
            nn.SiLU(), nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1),
        )  # fmt: skip
        if kind == "pca":
            self.filters, self.encoder = nn.Identity(), nn.Conv2d(3, width, PATCH, 8)
        elif kind in ("views", "views-random"):
            self.filters, self.encoder = nn.Identity(), residual_encoder(width)

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of the layers whose answers see less than a whole window."""
        if self.kind == "pca":
            return ()
        named = self.kind in ("views", "views-random")
        return ("encoder.1", "encoder.2", "encoder.3") if named else ("filters", "encoder.1", "encoder.3")

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of all windows, N x width x h x w; InputError for images smaller than one window."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < PATCH:
            reason = f"needs N x 3 x H x W of at least {PATCH} pixels, got {tuple(x.shape)}"
            raise InputError("relation module", reason, "resize the images")
        return F.normalize(self.encoder(self.filters(x)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes flattened to one row per image."""
        return self.codes(x).flatten(1)

    def relate(self, x: Tensor) -> Tensor:
        """Return the label-free features N x D whose relations are to be kept: filter answers pooled to 2 x 2."""
        return F.adaptive_avg_pool2d(self.filters(x), 2).flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        """Return N x 3 x 32 x 32 reconstructions of codes N x width, in (0, 1)."""
        return torch.sigmoid(self.decoder(z))


def build_module(kind: Kind, patches: Tensor, *, seed: int = 0, width: int = 64, anchors: int = 512) -> RelationModule:
    """Return an untrained module fitted to unlabelled patches N x 3 x 32 x 32 in [0, 1]; controls are then complete.

    Filters are whitened patches (Gaussian noise for "random"). `fit.fit_relation` trains the learned kind,
    `views.fit_views` the kind "views". InputError for fewer patches than anchors.
    """
    if patches.shape[0] < anchors or tuple(patches.shape[1:]) != (3, PATCH, PATCH):
        reason = f"needs at least {anchors} x 3 x {PATCH} x {PATCH} patches, got {tuple(patches.shape)}"
        raise InputError("relation module", reason, "give more, or fewer anchors")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        module = RelationModule(kind, width, anchors=anchors)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    with torch.no_grad():
        if isinstance(module.filters, Filters):
            _cut_filters(module.filters, patches, generator, whitened=kind == "learned")
        elif module.kind != "pca":
            calibrate(module.encoder, patches[:1024])
        elif isinstance(module.encoder, nn.Conv2d):
            _principal_components(module.encoder, patches[:1024])
        settle(module, patches)
    return module.eval()


def settle(module: RelationModule, patches: Tensor, perplexity: float = 20.0) -> None:
    """Fill the bank with codes of patches spread over the set, and choose the sharpness that gives it a perplexity.

    The sharpness is common to all: the one at which the mean entropy of the anchors' neighbourhoods is that of
    `perplexity` equally near neighbours.
    """
    anchors = module.bank.shape[0]
    rows = (torch.arange(anchors, dtype=torch.float64) * patches.shape[0] / anchors).long()
    with torch.no_grad():
        module.bank.copy_(torch.cat([module.codes(part).flatten(1) for part in torch.split(patches[rows], 256)]))
        inner = (module.bank @ module.bank.T).fill_diagonal_(-torch.inf)
        low, high = 0.0, 12.0
        for _ in range(40):
            middle = (low + high) / 2
            shares = (inner * torch.tensor(middle).exp()).softmax(1)
            entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1).mean()
            low, high = (middle, high) if float(entropy) > torch.tensor(perplexity).log() else (low, middle)
        module.sharpness.fill_(float(torch.tensor(low).exp()))


def _cut_filters(filters: Filters, patches: Tensor, generator: torch.Generator, *, whitened: bool) -> None:
    """Fill in filters, whitened pieces of patches or noise, and scale their answers to unit variance."""
    count, size = filters.weight.shape[0], 3 * _KERNEL**2
    pieces = F.unfold(patches[:512], _KERNEL, stride=3).transpose(1, 2).reshape(-1, size)
    if whitened:
        centred = pieces - pieces.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / centred.shape[0])
        white = vectors @ torch.diag((values + 0.01 * values.max()).rsqrt()) @ vectors.T
        chosen = centred[torch.randint(centred.shape[0], (count,), generator=generator)] @ white
        weight = F.normalize(chosen, dim=1) @ white
    else:
        weight = torch.randn(count, size, generator=generator)
    filters.weight.copy_(F.normalize(weight, dim=1).reshape(filters.weight.shape))
    few = patches[:256]
    for scale, x in enumerate((few, F.avg_pool2d(few, 2))):
        answers = F.conv2d(x, filters.weight, stride=2 - scale, padding=2)
        filters.gain[scale] = 1.0 / answers.std().clamp(min=1e-6)


def _principal_components(encoder: nn.Conv2d, patches: Tensor) -> None:
    flat = patches.flatten(1)
    centred = flat - flat.mean(0)
    # The eigenvectors of the small Gram matrix are those of the covariance of all pixels, turned.
    values, left = torch.linalg.eigh(centred @ centred.T)
    top = slice(-encoder.out_channels, None)
    vectors = F.normalize(centred.T @ left[:, top] / values[top].clamp(min=1e-12).sqrt(), dim=0)
    encoder.weight.copy_(vectors.T.reshape(encoder.weight.shape))
    if encoder.bias is not None:
        encoder.bias.copy_(-(flat.mean(0) @ vectors))
