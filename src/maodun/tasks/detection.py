"""Detection: boxes with scores, judged by average precision at an overlap of one half."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.tasks import metrics
from maodun.tasks.base import Statistics, Task
from maodun.tasks.nets import DetectionNet, initialise


@dataclass(frozen=True)
class Detection(Task):
    """Average precision at IoU 0.5 for one class of object; truth is N x K x 4 boxes in pixels, absent ones negative.

    The network's answer is that of `DetectionNet`. `most` detections per image are kept, from peaks of the centre map.
    """

    name: ClassVar[str] = "detection"
    metric: ClassVar[str] = "mAP@0.5"

    most: int = 20
    stride: int = DetectionNet.stride
    scale: float = DetectionNet.scale

    def build(self, seed: int = 0) -> nn.Module:
        """Return a detector of 0.35 M parameters."""
        model = initialise(DetectionNet(), seed)
        with torch.no_grad():
            model.get_parameter("head.weight").mul_(0.1)
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Focal loss of the centres (Law and Deng, 2018) plus -log IoU of the boxes around them (Yu et al., 2016).

        Every cell near a centre answers for the box, weighted by a Gaussian of a sixth of the box's size (as TTFNet,
        Liu et al., 2020).
        """
        heat, cells = self._heat(target, output.shape[2], output.shape[3])
        peak, owner = heat.max(1)
        objects = (target[:, :, 2] > target[:, :, 0]).sum(1).clamp(min=1)
        p = torch.sigmoid(output[:, 0]).clamp(1e-4, 1 - 1e-4)
        near = peak > 0.99
        focal = torch.where(near, -((1 - p) ** 2) * p.log(), -((1 - peak) ** 4) * p**2 * (1 - p).log())
        flat = owner.flatten(1)[:, :, None].expand(-1, -1, 4)
        box = target.gather(1, flat).reshape(*owner.shape, 4)
        wanted = torch.cat([cells - box[..., :2], box[..., 2:] - cells], -1)
        given = output[:, 1:].permute(0, 2, 3, 1) * self.scale
        overlap = _distance_iou(given, wanted.clamp(min=1e-3))
        weight = peak * (peak > 0.1) * (wanted > 0).all(-1)
        boxes = (weight * -overlap.clamp(min=1e-4).log()).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1e-6)
        return focal.flatten(1).sum(1) / objects + boxes

    def decode(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return N x most scores in falling order and N x most x 4 boxes in pixels."""
        heat = torch.sigmoid(output[:, :1])
        heat = heat * (F.max_pool2d(heat, 3, 1, 1) == heat)
        scores, where = heat.flatten(1).topk(min(self.most, heat[0].numel()), 1)
        distances = output[:, 1:].flatten(2).gather(2, where[:, None].expand(-1, 4, -1)).permute(0, 2, 1) * self.scale
        row, column = where // output.shape[3], where % output.shape[3]
        centre = (torch.stack([column, row], -1).to(output) + 0.5) * self.stride
        return scores, torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], -1)

    def judge(self, output: Tensor, clean: Tensor, truth: Tensor) -> Statistics:  # noqa: ARG002 - the common shape
        """Return scores, hits and the number of objects of each image."""
        scores, boxes = self.decode(output)
        objects = (truth[:, :, 2] > truth[:, :, 0]).sum(1)
        return {"scores": scores, "hits": metrics.match_boxes(boxes, truth), "objects": objects}

    def score(self, statistics: Statistics, weights: Tensor | None = None) -> float:
        """Return the average precision."""
        return metrics.average_precision(statistics["scores"], statistics["hits"], statistics["objects"], weights)

    def _heat(self, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return N x K x h x w Gaussians, one exactly at the cell of each centre, and the cells' places h x w x 2."""
        places = [(torch.arange(n, device=boxes.device) + 0.5) * self.stride for n in (width, height)]
        cells = torch.stack(torch.meshgrid(*places, indexing="xy"), -1)
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2
        limit = centre.new_tensor([width - 1, height - 1])
        own = torch.minimum((centre / self.stride).floor().clamp(min=0), limit)
        spread = ((boxes[..., 2:] - boxes[..., :2]) / 6.0).clamp(min=self.stride / 2)
        offset = (cells - (own[:, :, None, None] + 0.5) * self.stride) / spread[:, :, None, None]
        heat = torch.exp(-0.5 * offset.square().sum(-1))
        there = boxes[..., 2] > boxes[..., 0]
        return heat * there[:, :, None, None], cells


def _distance_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return overlaps of boxes given as distances left, top, right, bottom from one common point."""
    inter = torch.minimum(a, b)
    area = (inter[..., 0] + inter[..., 2]) * (inter[..., 1] + inter[..., 3])
    own, other = ((box[..., 0] + box[..., 2]) * (box[..., 1] + box[..., 3]) for box in (a, b))
    return area / (own + other - area).clamp(min=math.ulp(1.0))
