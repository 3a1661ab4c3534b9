"""What there is to fight over: architectures, weights with their cards, and data sets, one loader each."""

from __future__ import annotations

from maodun.zoo.data import DataInfo, Dataset, list_data, load_data
from maodun.zoo.models import LoadedModel, ModelCard, list_models, load_model

__all__ = ["DataInfo", "Dataset", "LoadedModel", "ModelCard", "list_data", "list_models", "load_data", "load_model"]
