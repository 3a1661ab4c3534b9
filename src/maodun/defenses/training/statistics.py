"""Running statistics of clean and adversarial features, class by class, and the reference refined by them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMOOTHED = 0.1


class ClassStatistics:
    """Running means and variances (K x D, diagonal) per class, and the mean answer (K x K) of rightly answered samples.

    Empty until the first `update`. `count` (K,) counts the samples of a class seen so far; `answered` those behind
    its mean answer.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def update(self, clean: Tensor, adv: Tensor, answer: Tensor, y: Tensor, momentum: float) -> None:
        """Fold in a batch: features (N x D) of clean and adversarial inputs, clean answers (N x K), labels (N,)."""
        classes = answer.shape[1]
        if not self.tensors:
            zeros = clean.new_zeros(classes, clean.shape[1])
            ones = torch.ones_like(zeros)
            self.tensors = {
                "clean_mean": zeros, "clean_var": ones, "adv_mean": zeros.clone(), "adv_var": ones.clone(),
                "answer": answer.new_zeros(classes, classes), "count": answer.new_zeros(classes),
                "answered": answer.new_zeros(classes),
            }  # fmt: skip
        for kind, h in (("clean", clean), ("adv", adv)):
            mean, var, count = _by_class(h, y, classes)
            self._follow(f"{kind}_mean", mean, count, self.tensors["count"], momentum)
            self._follow(f"{kind}_var", var, count * (count > 1), self.tensors["count"], momentum)
        right = answer.argmax(1) == y
        mean, _, count = _by_class(answer[right], y[right], classes)
        self._follow("answer", mean, count, self.tensors["answered"], momentum)
        self.tensors["answered"] = self.tensors["answered"] + count
        self.tensors["count"] = self.tensors["count"] + torch.bincount(y, minlength=classes).to(answer)

    def refine(self, answer: Tensor, h: Tensor, y: Tensor) -> Tensor:
        """Return the reference answers (N x K): own where right, else the nearest right sample's or the class's.

        `answer` N x K clean probabilities, `h` N x D clean features. Nearest is by Mahalanobis distance with the
        running clean variance of the class, among rightly answered samples of the same class in the batch.
        """
        right = answer.argmax(1) == y
        scale = self.tensors["clean_var"][y].clamp(min=1e-6).rsqrt() if self.tensors else torch.ones_like(h)
        # Only pairs of one class are compared, so both are measured in the same scale.
        gaps = torch.cdist(h * scale, h * scale)
        allowed = right.unsqueeze(0) & (y.unsqueeze(1) == y.unsqueeze(0))
        distance, nearest = gaps.masked_fill(~allowed, torch.inf).min(1)
        label = F.one_hot(y, answer.shape[1]).to(answer)
        fallback = (1 - _SMOOTHED) * label + _SMOOTHED / answer.shape[1]
        if self.tensors:
            known = self.tensors["answered"][y] > 0
            fallback = torch.where(known.unsqueeze(1), self.tensors["answer"][y], fallback)
        borrowed = torch.where(torch.isfinite(distance).unsqueeze(1), answer[nearest], fallback)
        return torch.where(right.unsqueeze(1), answer, borrowed)

    def deviation(self, h: Tensor, y: Tensor) -> Tensor:
        """Return (N x D) how far to redraw feature vectors: spread of the class plus uncertainty of its mean."""
        if not self.tensors:
            return torch.zeros_like(h)
        count = self.tensors["count"][y].clamp(min=1.0).unsqueeze(1)
        known = (self.tensors["count"][y] > 1).unsqueeze(1)
        return torch.where(known, (self.tensors["adv_var"][y] * (1 + 1 / count)).sqrt(), torch.zeros_like(h))

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {f"statistics.{name}": value for name, value in self.tensors.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned."""
        self.tensors = {
            name.removeprefix("statistics."): value for name, value in state.items() if name.startswith("statistics.")
        }

    def _follow(self, name: str, fresh: Tensor, count: Tensor, before: Tensor, momentum: float) -> None:
        """Move the rows that the batch has seen towards `fresh`; a row seen for the first time takes it over."""
        old = self.tensors[name]
        moved = torch.where((before > 0).unsqueeze(1), torch.lerp(fresh, old, momentum), fresh)
        self.tensors[name] = torch.where((count > 0).unsqueeze(1), moved, old)


def _by_class(h: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance (K x D) and count (K,) of the rows of `h` by class; zeros where a class is absent."""
    count = torch.bincount(y, minlength=classes).to(h)
    size = count.clamp(min=1.0).unsqueeze(1)
    mean = h.new_zeros(classes, h.shape[1]).index_add_(0, y, h) / size
    square = h.new_zeros(classes, h.shape[1]).index_add_(0, y, (h - mean[y]).square()) / size
    return mean, square, count
