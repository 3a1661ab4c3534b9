"""The models and batches everything is measured on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True)
class Subject:
    """A model spec, its data spec, and the radius per norm at which attacks are compared on it."""

    name: str
    model: str
    data: str
    eps: dict[str, float]
    needs_data: bool = False


SUBJECTS: dict[str, Subject] = {
    s.name: s
    for s in (
        Subject("toy", "toy", "digits", {"linf": 0.15, "l2": 0.6, "l1": 3.0}),
        Subject("digits-cnn", "zoo:digits-cnn", "digits", {"linf": 0.15, "l2": 0.6, "l1": 3.0}),
        Subject("digits-cnn-at", "zoo:digits-cnn-at", "digits", {"linf": 0.15, "l2": 0.6, "l1": 3.0}),
        Subject("cifar10-resnet8", "zoo:cifar10-resnet8", "cifar10", {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}, True),
        Subject(
            "cifar10-resnet8-at", "zoo:cifar10-resnet8-at", "cifar10", {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}, True
        ),
        Subject("mnist-cnn", "zoo:mnist-cnn", "mnist", {"linf": 0.2, "l2": 1.5, "l1": 8.0}, True),
        Subject("trades-mnist", "witness:trades-mnist", "mnist", {"linf": 0.3, "l2": 2.0, "l1": 10.0}, True),
        Subject("resnet4b", "witness:resnet4b", "cifar10", {"linf": 4 / 255, "l2": 0.5, "l1": 12.0}, True),
        Subject("resnet56", "witness:resnet56", "cifar10", {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}, True),
    )
}


@dataclass(frozen=True)
class Batch:
    """A loaded subject: model in evaluation mode, x [N, ...] in [0, 1], y [N], number of classes."""

    subject: Subject
    model: nn.Module
    x: Tensor
    y: Tensor
    classes: int

    def head(self, n: int) -> Batch:
        """The first `n` samples."""
        return Batch(self.subject, self.model, self.x[:n], self.y[:n], self.classes)


def load(name: str, n: int, *, offset: int = 0) -> Batch:
    """Load a subject and `n` test samples from `offset` on, in their original order.

    KeyError for an unknown name; LookupError with a remedy when its weights or data are not there.
    """
    subject = SUBJECTS[name]
    if subject.needs_data and not os.environ.get("MAODUN_DATA"):
        raise LookupError(f"{name} needs real data: set MAODUN_DATA to the folder that holds it")
    if subject.model == "toy":
        model, x, y = _toy()
    else:
        from maodun.core.errors import InputError
        from maodun.zoo import load_data, load_model

        try:
            data = load_data(subject.data, split="test", limit=offset + n)
            model = load_model(subject.model).model
        except InputError as error:
            raise LookupError(str(error)) from error
        x, y = data.x, data.y
    x, y = x[offset : offset + n].contiguous(), y[offset : offset + n]
    model.eval()
    with torch.inference_mode():
        classes = model(x[:2]).shape[1]
    return Batch(subject, model, x, y, classes)


def _toy_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def _toy() -> tuple[nn.Module, Tensor, Tensor]:
    """A small digits net trained for a minute against 7-step PGD: a stand-in that needs no weights of the zoo."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[1000:], order[:1000]
    torch.manual_seed(0)
    net, path = _toy_net(), CACHE / "toy.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net, x[test], y[test]
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(40):
        for rows in train[torch.randperm(len(train))].split(64):
            adv = (x[rows] + (torch.rand_like(x[rows]) * 2 - 1) * 0.15).clamp(0, 1)
            for _ in range(7):
                adv.requires_grad_(True)
                (grad,) = torch.autograd.grad(nn.functional.cross_entropy(net(adv), y[rows]), adv)
                adv = torch.clamp(adv.detach() + 0.05 * grad.sign(), x[rows] - 0.15, x[rows] + 0.15).clamp(0, 1)
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(adv), y[rows]).backward()
            optimiser.step()
    CACHE.mkdir(exist_ok=True)
    torch.save(net.state_dict(), path)
    return net, x[test], y[test]
