"""Non-local means: every pixel becomes the mean of those whose surroundings look the same."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense
from maodun.defenses.preprocessing.library import check_library, image_by_image, opencv, valued


class NonLocalMeans(Defense):
    """Mean over the pixels up to `distance` away (default 3) whose `patch` x `patch` surroundings are alike.

    The weight of a pixel is exp(-m / strength^2), m the mean squared difference of the two patches over pixels and
    channels; `strength` (default 0.1) is in [0, 1] units, `patch` odd (default 3); borders repeat. `library` opencv
    takes the values from cv2.fastNlMeansDenoising (extra `vision`; images are rounded to 8 bits, 1 to 4 channels) and
    the derivative from here. The exact derivative goes through the weights; the BPDA partner holds them fixed. Source:
    Buades, Coll and Morel, CVPR 2005; as a defence in feature squeezing, Xu et al., NDSS 2018.
    """

    name = "non_local_means"

    def __init__(self, strength: float = 0.1, patch: int = 3, distance: int = 3, library: str = "torch") -> None:
        super().__init__()
        if strength <= 0:
            raise InputError(f"strength {strength}", "it is a difference of pixel values", "use for example 0.1")
        if patch < 1 or patch % 2 == 0:
            raise InputError(f"patch {patch}", "a patch with a centre has an odd side", "use 3 or 5")
        if distance < 1:
            raise InputError(f"distance {distance}", "there is nothing to compare with", "use for example 3")
        check_library(self.name, library)
        self.strength, self.patch, self.distance, self.library = strength, patch, distance, library

    def forward(self, x: Tensor) -> Tensor:
        """Return the denoised images."""
        self.need_images(x)
        if self.library == "torch":
            return self._mean(x, x)
        value = self._opencv(x)
        return valued(self._mean(x, x), value) if x.requires_grad else value

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the mean with the weights held fixed: a linear filter for each image."""
        return self._mean(x, x.detach())

    def _mean(self, x: Tensor, guide: Tensor) -> Tensor:
        """Return the mean of `x` under the weights that `guide` gives."""
        reach, rim, height, width = self.distance, self.patch // 2, x.shape[2], x.shape[3]
        around = F.pad(x, (reach,) * 4, mode="replicate")
        guides = F.pad(guide, (reach + rim,) * 4, mode="replicate")
        own = guides[..., reach : reach + height + 2 * rim, reach : reach + width + 2 * rim]
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for down in range(2 * reach + 1):
            for right in range(2 * reach + 1):
                other = guides[..., down : down + height + 2 * rim, right : right + width + 2 * rim]
                apart = F.avg_pool2d(((other - own) ** 2).mean(1, keepdim=True), self.patch, stride=1)
                weight = torch.exp(-apart / self.strength**2)
                total = total + weight * around[..., down : down + height, right : right + width]
                weights = weights + weight
        return total / weights

    def _opencv(self, x: Tensor) -> Tensor:
        if x.shape[1] > 4:
            reason = f"OpenCV denoises up to 4 channels, not {x.shape[1]}"
            raise InputError(f"defence '{self.name}'", reason, "use library=torch")
        cv2 = opencv(self.name)
        window, search = self.patch, 2 * self.distance + 1

        def denoise(image: np.ndarray) -> np.ndarray:
            levels = np.rint(image * 255).astype(np.uint8)
            done = cv2.fastNlMeansDenoising(levels, None, 255 * self.strength, window, search)
            return np.asarray(done, dtype=np.float32) / 255

        return image_by_image(x, denoise)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"strength={self.strength}, patch={self.patch}, distance={self.distance}, library={self.library}"
