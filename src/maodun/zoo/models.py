"""Models by one line of text; every one maps [0, 1] inputs to logits, and no file is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from maodun.core.errors import InputError, nearest
from maodun.zoo.architectures import ARCHITECTURES, build_architecture
from maodun.zoo.cards import ModelCard, all_cards, file_sha256, list_models
from maodun.zoo.checkpoints import apply_weights, read_weights, state_sha256
from maodun.zoo.external import bare, load_timm, load_torchvision, load_transformers
from maodun.zoo.factories import call_factory, find_attribute
from maodun.zoo.programs import load_exported, load_torchscript

KINDS = (
    "zoo",
    "witness",
    "torchscript",
    "exported",
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "sklearn",
    "http",
    "https",
)
FOREIGN = ("onnx", "sklearn", "http", "https")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be attacked.

    `model` maps [0, 1] inputs to logits with its normalisation inside and is in evaluation mode (a factory that brings
    its own weights keeps the mode it was returned in). `sha256` hashes the state dict; `card` is there for the zoo.
    """

    model: nn.Module
    name: str
    spec: str
    sha256: str
    card: ModelCard | None = None


def load_model(spec: str, *, weights: str | None = None, options: Mapping[str, Any] | None = None) -> LoadedModel:
    """Return the model that `spec` names.

    Specs: `zoo:NAME` (a model of the package or its checkout, or an architecture when `weights` are given) ·
    `witness:NAME` (published weights under $MAODUN_DATA/weights) ·
    `package.module:factory` or `file.py:factory` · `torchscript:FILE` · `exported:FILE` ·
    `torchvision:NAME`, `timm:NAME`, `transformers:ID_OR_DIR` (when installed) · and three kinds that can be asked but
    not differentiated (zoo/foreign): `onnx:FILE`, `sklearn:package.module:factory` (a fitted estimator),
    `http://HOST/PATH`.
    `weights` is a .safetensors file or a checkpoint that reads with weights_only; `options` are keyword arguments of
    the architecture or factory. Errors: InputError naming what is wrong: unknown names, missing files, files that
    would run code, keys and shapes that do not fit.
    """
    kind, colon, target = spec.partition(":")
    arguments = dict(options or {})
    if not colon or not target:
        known = [card.spec for card in all_cards()]
        raise InputError(f"model '{spec}'", "it names no kind and model", nearest(spec, known))
    if kind in ("zoo", "witness"):
        return _from_zoo(kind, target, spec, weights, arguments)
    if kind in ("torchscript", "exported"):
        if weights is not None:
            raise InputError(f"model '{spec}'", "the file brings its weights", "leave out the weights")
        model = load_torchscript(target) if kind == "torchscript" else load_exported(target)
        return LoadedModel(model, Path(target).stem, spec, state_sha256(model))
    if kind in FOREIGN:
        return _from_abroad(kind, target, spec, weights, arguments)
    if kind == "torchvision":
        model = load_torchvision(target, spec, arguments, weights is None)
    elif kind == "timm":
        model = load_timm(target, spec, arguments, weights is None)
    elif kind == "transformers":
        model = load_transformers(target, spec, arguments)
    else:
        model = _from_factory(kind, target, spec, arguments)
    if weights is not None:
        inner = bare(model) if kind in ("torchvision", "timm", "transformers") else model
        apply_weights(inner, read_weights(weights), f"weights '{weights}' for '{spec}'")
    if weights is not None or kind in KINDS:
        model.eval()
    return LoadedModel(model, target, spec, state_sha256(model))


def _from_zoo(kind: str, name: str, spec: str, weights: str | None, options: dict[str, Any]) -> LoadedModel:
    card = next((card for card in all_cards() if card.spec == spec), None)
    if card is None and (kind == "witness" or name not in ARCHITECTURES):
        known = [card.spec for card in all_cards()] + [f"zoo:{each}" for each in ARCHITECTURES]
        raise InputError(f"model '{spec}'", "there is none of that name", nearest(spec, known))
    if card is None and weights is None:
        raise InputError(f"model '{spec}'", "it is an architecture without shipped weights", "give weights=FILE")
    if card is not None:
        options = {**card.options, **options}
    model = build_architecture(card.architecture if card else name, options)
    file = weights if weights is not None else str(_weights_of(card, spec) if card else "")
    apply_weights(model, read_weights(file), f"weights '{file}' for '{spec}'")
    model.eval()
    return LoadedModel(model, name, spec, state_sha256(model), card if weights is None else None)


def _from_abroad(kind: str, target: str, spec: str, weights: str | None, options: dict[str, Any]) -> LoadedModel:
    from maodun.zoo.foreign import load_estimator, load_onnx, load_remote

    if weights is not None:
        raise InputError(f"model '{spec}'", "it brings its weights", "leave out the weights")
    if kind == "onnx":
        model: nn.Module = load_onnx(target, options)
    elif kind == "sklearn":
        model = load_estimator(target, options)
    else:
        model = load_remote(spec, options)
    return LoadedModel(model.eval(), Path(target).stem if kind == "onnx" else target, spec, state_sha256(model))


def _weights_of(card: ModelCard, spec: str) -> Path:
    """Return the card's file after comparing its hash."""
    path = card.path()
    if path is None and card.kind == "checkout":
        raise InputError(
            f"model '{spec}'",
            "its weights lie in the repository's folder weights/, and this package is installed without it",
            f"install from a checkout (pip install -e .), or train them: maodun train {card.recipe}",
        )
    if path is None:
        raise InputError(
            f"model '{spec}'",
            "its weights are read from the folder that MAODUN_DATA names, and that is unset",
            f"export MAODUN_DATA=/path so that weights/{card.weights} is in it",
        )
    if not path.is_file():
        raise InputError(f"model '{spec}'", f"'{path}' does not exist", f"put {card.weights} there")
    found = file_sha256(path)
    if found != card.sha256:
        raise InputError(
            f"weights '{path}'",
            f"their SHA-256 begins {found[:12]}, the model card says {card.sha256[:12]}",
            "restore the original file",
        )
    return path


def _from_factory(module: str, attribute: str, spec: str, options: dict[str, Any]) -> nn.Module:
    """Import `module` (dotted, or a .py file) and call `attribute` with `options`."""
    thing = f"model '{spec}'"
    factory = find_attribute(module, attribute, thing, KINDS)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise InputError(thing, "it is neither a module nor callable", "name a function or class")
    model = call_factory(factory, options, thing)
    if not isinstance(model, nn.Module):
        raise InputError(thing, f"it returned {type(model).__name__}", "return a torch.nn.Module")
    return model


__all__ = ["KINDS", "LoadedModel", "ModelCard", "list_models", "load_model"]
