"""What a network is for: five tasks, each with a small model, a loss, a metric and real data."""

from __future__ import annotations

from maodun.tasks.base import Statistics, Task
from maodun.tasks.classification import Classification
from maodun.tasks.data import DATA, Labelled, load_camvid, load_cifar10, load_penn_fudan
from maodun.tasks.detection import Detection
from maodun.tasks.fit import FitSettings, fit_task, load_weights, save_weights
from maodun.tasks.reconstruction import Reconstruction
from maodun.tasks.retrieval import Retrieval
from maodun.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {
    "segmentation": Segmentation,
    "detection": Detection,
    "classification": Classification,
    "reconstruction": Reconstruction,
    "retrieval": Retrieval,
}
"""The tasks by name."""

__all__ = [
    "DATA",
    "TASKS",
    "Classification",
    "Detection",
    "FitSettings",
    "Labelled",
    "Reconstruction",
    "Retrieval",
    "Segmentation",
    "Statistics",
    "Task",
    "fit_task",
    "load_camvid",
    "load_cifar10",
    "load_penn_fudan",
    "load_weights",
    "save_weights",
]
