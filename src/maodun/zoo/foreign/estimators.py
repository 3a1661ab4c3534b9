"""Fitted scikit-learn classifiers: scores or decisions of flattened inputs, without gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maodun.core.errors import InputError, nearest
from maodun.zoo.factories import call_factory, find_attribute
from maodun.zoo.foreign.base import Array, Foreign, Reading

_METHODS = {"logits": "decision_function", "probabilities": "predict_proba", "label": "predict"}
_OPTIONS = ("kind", "classes", "scale")
_PROBES = 64


class EstimatorModel(Foreign):
    """A fitted scikit-learn classifier: [0, 1] inputs N x ..., flattened and multiplied by `scale`, to scores N x C.

    `kind` says what is asked: logits (decision_function; a binary score s becomes (-s, s) / 2), probabilities
    (predict_proba, as logarithms) or label (predict, decisions only). "auto" is the first of these that the estimator
    has, and is refused where the largest score is not what `predict` answers. `classes` are the estimator's classes in
    the order of the labels, needed when they are not the numbers 0 to C - 1. `fingerprint` digests its answers
    to fixed inputs. Errors: InputError for what is not a fitted classifier or takes another number of features.
    """

    def __init__(
        self, estimator: Any, *, kind: str = "auto", classes: Sequence[Any] | None = None, scale: float = 1.0
    ) -> None:
        self.thing = f"estimator {type(estimator).__name__}"
        self.estimator, self.scale = estimator, scale
        has = [name for name, method in _METHODS.items() if callable(getattr(estimator, method, None))]
        if "label" not in has:
            raise InputError(self.thing, "it has no predict", "give a scikit-learn classifier")
        if kind not in ("auto", *has):
            raise InputError(self.thing, f"it cannot be asked for '{kind}'", "known: " + ", ".join(has))
        own = getattr(estimator, "classes_", None)
        if own is None:
            raise InputError(self.thing, "it is not a fitted classifier (no classes_)", "fit it first")
        self._own = np.asarray(own)
        self._order = self._ordered(classes)
        self._checked = kind != "auto"
        chosen = has[0] if kind == "auto" else kind
        super().__init__(Reading.make(chosen, len(self._order), self.thing), "")
        self._features = getattr(estimator, "n_features_in_", None)
        self.fingerprint = self._digest()

    def _ordered(self, classes: Sequence[Any] | None) -> list[int]:
        """Return the estimator's column of every label."""
        own = self._own.tolist()
        wanted = list(range(len(own))) if classes is None else list(classes)
        if sorted(map(str, own)) != sorted(map(str, wanted)):
            held = ", ".join(map(str, own))[:120]
            remedy = "give classes=[...], its classes in the order of the labels"
            raise InputError(self.thing, f"its classes are {held}, and labels are numbered from 0", remedy)
        return [list(map(str, own)).index(str(name)) for name in wanted]

    def answers(self, x: Array) -> Array:
        """Return what the estimator says of `x`."""
        values = x.reshape(x.shape[0], -1).astype(np.float64) * self.scale
        if self._features is not None and values.shape[1] != self._features:
            reason = f"it takes {self._features} features, and the inputs have {values.shape[1]}"
            raise InputError(self.thing, reason, "give the data it was fitted on")
        rows = self._ask(values)
        if not self._checked:
            self._refuse_disagreement(values, rows)
        return rows

    def _ask(self, values: Array) -> Array:
        method = getattr(self.estimator, _METHODS[self.reading.kind])
        try:
            found = np.asarray(method(values))
        except Exception as error:
            line = " ".join(str(error).split())[:160]
            raise InputError(self.thing, f"it fails on these inputs ({line})", "check what it was fitted on") from error
        if self.reading.kind == "label":
            return self._labels(found)
        if found.ndim == 1:
            found = np.stack([-found, found], axis=1) / 2
        if found.shape != (values.shape[0], len(self._order)):
            remedy = "use kind=probabilities or kind=label"
            raise InputError(self.thing, f"its scores have shape {found.shape}, not one per class", remedy)
        return np.asarray(found[:, self._order], dtype=np.float32)

    def _labels(self, found: Array) -> Array:
        columns = {name: label for label, name in enumerate(self._own[self._order].tolist())}
        return np.asarray([[columns[name]] for name in found.tolist()], dtype=np.float32)

    def _refuse_disagreement(self, values: Array, rows: Array) -> None:
        """Compare, on the first inputs, the largest score with the decision: some estimators decide otherwise."""
        self._checked = True
        if self.reading.kind == "label":
            return
        decided = self._labels(np.asarray(self.estimator.predict(values)))[:, 0]
        wrong = int((rows.argmax(1) != decided).sum())
        if wrong:
            reason = f"on {wrong} of {len(rows)} inputs its largest score is not what predict says"
            raise InputError(self.thing, reason, "use kind=label, or say kind=logits or probabilities if you mean them")

    def _digest(self) -> str:
        """Return what stands for the weights: the answers to fixed inputs, so that any estimator has one."""
        count = self._features
        if count is None:
            return f"sklearn {type(self.estimator).__name__} {self.scale}"
        probes = np.random.default_rng(0).random((_PROBES, int(count))) * self.scale
        said = np.round(self._ask(probes).astype(np.float64), 5)
        about = f"sklearn {type(self.estimator).__name__} {self.reading} {self.scale} {self._order}".encode()
        return hashlib.sha256(about + said.tobytes()).hexdigest()


def load_estimator(target: str, options: Mapping[str, Any]) -> EstimatorModel:
    """Return the estimator that package.module:factory (or file.py:factory) makes or is.

    `options` are those of EstimatorModel; others go to the factory. Files of estimators are pickles, which run code
    when they are read, so they are not read here. Errors: InputError.
    """
    thing = f"model 'sklearn:{target}'"
    module, colon, attribute = target.rpartition(":")
    if target.endswith((".joblib", ".pkl", ".pickle")):
        remedy = "write a function that loads it and give sklearn:file.py:function, or convert it to ONNX"
        raise InputError(thing, "reading a pickle runs whatever code is in it", remedy)
    if not colon:
        raise InputError(thing, "it names no factory", "write sklearn:package.module:factory")
    own = {key: value for key, value in options.items() if key in _OPTIONS}
    rest = {key: value for key, value in options.items() if key not in _OPTIONS}
    made = find_attribute(module, attribute, thing)
    if not hasattr(made, "predict"):
        if not callable(made):
            raise InputError(thing, "it is neither an estimator nor callable", "name a function or an estimator")
        made = call_factory(made, rest, thing)
    elif isinstance(made, type):
        raise InputError(thing, "it is a class, not a fitted estimator", "name a function that returns a fitted one")
    elif rest:
        raise InputError(thing, f"has no option '{next(iter(rest))}'", nearest(next(iter(rest)), list(_OPTIONS)))
    return EstimatorModel(made, **own)
