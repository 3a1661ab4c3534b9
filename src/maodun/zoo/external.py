"""Models of other libraries, when those are installed; their normalisation moves into the model."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.zoo.architectures.normalise import IMAGENET_MEAN, IMAGENET_STD, Normalise


def _library(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"model '{spec}'", f"{name} is not installed", f"pip install {name}") from error
    except Exception as error:
        # A build for another PyTorch fails in its own ways, at import.
        reason = f"{name} is installed but cannot be imported ({_first_line(error)})"
        raise InputError(f"model '{spec}'", reason, "install the version made for this PyTorch") from error


def _call(spec: str, remedy: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a foreign library; whatever it raises becomes one line."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise InputError(f"model '{spec}'", _first_line(error), remedy) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def bare(model: nn.Module) -> nn.Module:
    """Return the library's own network inside a loaded model, whose names a file of weights uses."""
    inner = model[1] if isinstance(model, nn.Sequential) and isinstance(model[0], Normalise) else model
    return inner.network if isinstance(inner, HubClassifier) else inner


def load_torchvision(name: str, spec: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """Return torchvision's model `name` behind the normalisation its weights expect (ImageNet's by default).

    `options["weights"]` names an enum entry (default: torchvision's own "DEFAULT"); without `pretrained` the weights
    are random, to be filled from a file.
    """
    models = _library("torchvision.models", spec)
    wanted = options.pop("weights", "DEFAULT")
    model = _call(spec, "see torchvision.models.list_models()", models.get_model, name, weights=None, **options)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if pretrained:
        enum = _call(spec, "see torchvision.models.list_models()", models.get_model_weights, name)
        weights = _call(spec, f"known: {[entry.name for entry in enum]}", lambda: enum[wanted])
        state = _call(
            spec, "check the network", weights.get_state_dict, progress=False, check_hash=True, weights_only=True
        )
        model.load_state_dict(state)
        preset = weights.transforms()
        mean, std = tuple(preset.mean), tuple(preset.std)
    return nn.Sequential(Normalise(mean, std), model)


def load_timm(name: str, spec: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """Return timm's model `name` behind the normalisation of its pretrained configuration."""
    timm = _library("timm", spec)
    model = _call(spec, "see timm.list_models()", timm.create_model, name, pretrained=pretrained, **options)
    config = getattr(model, "pretrained_cfg", None) or {}
    return nn.Sequential(Normalise(config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)), model)


class HubClassifier(nn.Module):
    """A transformers image classifier that returns its logits instead of an output record."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalised pixels."""
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def load_transformers(name: str, spec: str, options: dict[str, Any]) -> nn.Module:
    """Return an image classifier of the hub or a local folder, normalisation inside; no remote code."""
    transformers = _library("transformers", spec)
    remedy = "give the id or folder of an image classifier with safetensors weights"
    kwargs = {"use_safetensors": True, "trust_remote_code": False, **options}
    network = _call(spec, remedy, transformers.AutoModelForImageClassification.from_pretrained, name, **kwargs)
    processor = _call(spec, remedy, transformers.AutoImageProcessor.from_pretrained, name)
    classifier = HubClassifier(network)
    if not getattr(processor, "do_normalize", True):
        return classifier
    return nn.Sequential(Normalise(tuple(processor.image_mean), tuple(processor.image_std)), classifier)
