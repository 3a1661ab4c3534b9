"""Metrics out of per-image statistics, so that a bootstrap over images only has to weigh them anew.

`weights` (N,) float64 says how often each image counts; None counts each once. All return one float.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _weights(n: int, weights: Tensor | None) -> Tensor:
    return torch.ones(n, dtype=torch.float64) if weights is None else weights.double()


def weighted_mean(values: Tensor, weights: Tensor | None = None) -> float:
    """Return the mean of (N,) values."""
    w = _weights(values.shape[0], weights)
    return float((values.double() * w).sum() / w.sum())


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Return N x classes x classes pixel counts, truth along rows; pixels whose truth is no class are left out.

    `predicted` and `truth` are int64 N x H x W.
    """
    n = truth.shape[0]
    valid = (truth >= 0) & (truth < classes)
    image = torch.arange(n, device=truth.device).reshape(-1, 1, 1).expand_as(truth)
    index = (image * classes + truth) * classes + predicted
    counts = torch.bincount(index[valid], minlength=n * classes * classes)
    return counts.reshape(n, classes, classes)


def mean_iou(counts: Tensor, weights: Tensor | None = None) -> float:
    """Return the mean intersection over union of the classes that occur in truth or prediction.

    `counts` N x K x K as `confusion` gives them; the counts of all images are added up before any ratio is taken.
    """
    total = (counts.double() * _weights(counts.shape[0], weights).reshape(-1, 1, 1)).sum(0)
    hit = total.diagonal()
    union = total.sum(0) + total.sum(1) - hit
    return float((hit[union > 0] / union[union > 0]).mean())


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return N x D x K overlaps (intersection over union) of boxes N x D x 4 and N x K x 4, corners x0 y0 x1 y1."""
    low = torch.maximum(a[:, :, None, :2], b[:, None, :, :2])
    high = torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    return inter / (area_a[:, :, None] + area_b[:, None, :] - inter).clamp(min=1e-9)


def match_boxes(boxes: Tensor, truth: Tensor, threshold: float = 0.5) -> Tensor:
    """Return N x D booleans: the detection finds an object that no better one has found.

    `boxes` N x D x 4 in falling order of score; `truth` N x K x 4, absent boxes negative. A detection takes the object
    it overlaps most, if by at least `threshold`; a second detection of the same object is false (as in PASCAL VOC).
    """
    overlap = box_iou(boxes, truth)
    overlap = torch.where((truth[:, :, 2] > truth[:, :, 0])[:, None], overlap, torch.zeros_like(overlap))
    taken = torch.zeros(truth.shape[0], truth.shape[1], dtype=torch.bool, device=truth.device)
    hits = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=truth.device)
    for rank in range(boxes.shape[1]):
        best, which = overlap[:, rank].max(1)
        free = ~taken.gather(1, which[:, None]).squeeze(1)
        hits[:, rank] = (best >= threshold) & free
        taken |= F.one_hot(which, truth.shape[1]).bool() & hits[:, rank, None]
    return hits


def average_precision(scores: Tensor, hits: Tensor, objects: Tensor, weights: Tensor | None = None) -> float:
    """Return the area under the precision-recall curve, every point of it, with the precision made monotone.

    `scores` N x D (-inf: no detection), `hits` N x D booleans from `match_boxes`, `objects` (N,) counts of true boxes.
    Everingham et al. (PASCAL VOC from 2010 on).
    """
    w = _weights(scores.shape[0], weights)
    per_box = w[:, None].expand_as(scores)
    order = scores.flatten().argsort(descending=True, stable=True)
    order = order[torch.isfinite(scores.flatten()[order])]
    mass, good = per_box.flatten()[order], hits.flatten()[order].double()
    found = (mass * good).cumsum(0)
    precision = found / mass.cumsum(0).clamp(min=1e-12)
    total = (objects.double() * w).sum()
    if order.numel() == 0 or total <= 0:
        return 0.0
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((mass * good * envelope).sum() / total)


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Return (N,) peak signal-to-noise ratios in dB of N x ... images in [0, 1]; equal images get 100 dB."""
    error = (image - reference).double().square().flatten(1).mean(1)
    return (-10.0 * torch.log10(error.clamp(min=1e-10))).float()


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Return (N,) structural similarities (Wang et al., 2004) of N x C x H x W images in [0, 1]; from torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(image, reference, data_range=1.0, reduction="none")
    found: Tensor = values[0] if isinstance(values, tuple) else values
    return found.reshape(-1)


def retrieval_ranks(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N,) average precisions and (N,) hits at rank one of ranking a gallery by inner product.

    `queries` N x d, `gallery` M x d embeddings of length one; relevant is what has the query's label.
    """
    order = (queries @ gallery.T).argsort(dim=1, descending=True, stable=True)
    relevant = (gallery_labels[order] == labels[:, None]).double()
    places = torch.arange(1, gallery.shape[0] + 1, dtype=torch.float64, device=queries.device)
    precision = relevant.cumsum(1) / places
    ap = (precision * relevant).sum(1) / relevant.sum(1).clamp(min=1)
    return ap.float(), relevant[:, 0].float()
