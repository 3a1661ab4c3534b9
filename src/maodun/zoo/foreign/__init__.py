"""Classifiers that are no modules of PyTorch: a service behind a URL, an ONNX file, a scikit-learn estimator.

Each is an nn.Module from [0, 1] inputs to scores, without gradients; its `access` ("scores" or "decision") tells the
Oracle what an adversary may ask it for.
"""

from __future__ import annotations

from maodun.zoo.foreign.base import Foreign
from maodun.zoo.foreign.estimators import EstimatorModel, load_estimator
from maodun.zoo.foreign.journal import Bill
from maodun.zoo.foreign.onnx import OnnxModel, load_onnx
from maodun.zoo.foreign.remote import RemoteModel, load_remote

__all__ = [
    "Bill",
    "EstimatorModel",
    "Foreign",
    "OnnxModel",
    "RemoteModel",
    "load_estimator",
    "load_onnx",
    "load_remote",
]
