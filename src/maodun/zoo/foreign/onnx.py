"""ONNX files, run by onnxruntime on the CPU: scores without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maodun.core.errors import InputError, nearest
from maodun.zoo.architectures.normalise import Normalise
from maodun.zoo.cards import file_sha256
from maodun.zoo.foreign.base import Array, Foreign, Reading

_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
_OPTIONS = ("output", "kind", "classes", "layout", "scale", "mean", "std")


class OnnxModel(Foreign):
    """The classifier of an ONNX file: [0, 1] inputs N x ... to scores N x C, computed by onnxruntime.

    `output` names the graph's output that holds the scores (None: its first, or the one called probabilities where the
    first are labels, as converted scikit-learn models have it). `layout` "hwc" moves the channels last. `scale`
    multiplies the inputs, as 255 for graphs that expect 0 to 255. A graph of a fixed batch size is fed in pieces of it.
    Errors: InputError for files that cannot be run, several inputs, unknown outputs and inputs of another shape.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        output: str | None = None,
        kind: str = "auto",
        classes: int | Sequence[Any] | None = None,
        layout: str = "chw",
        scale: float = 1.0,
    ) -> None:
        file, self.thing = Path(path).expanduser(), f"ONNX file '{path}'"
        if layout not in ("chw", "hwc"):
            raise InputError(self.thing, f"layout '{layout}' is unknown", "use chw or hwc")
        if not file.is_file():
            raise InputError(self.thing, "there is no such file", "check the path")
        self._session = _session(file, self.thing)
        self._output, found = self._chosen(output)
        reading = Reading.make(found if kind == "auto" else kind, classes, self.thing)
        super().__init__(reading, f"onnx {file_sha256(file)} {self._output} {reading} {layout} {scale}")
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in _TYPES:
            held = ", ".join(f"{each.name}: {each.type}" for each in inputs)
            raise InputError(self.thing, f"it takes {held}", "export a graph with one input of floating point images")
        self._name, self._shape, self._type = inputs[0].name, inputs[0].shape, _TYPES[inputs[0].type]
        self.layout, self.scale = layout, scale

    def _chosen(self, output: str | None) -> tuple[str, str]:
        """Return the name of the output that is read, and the kind its name suggests."""
        outputs = {each.name: each.type for each in self._session.get_outputs()}
        if output is not None and output not in outputs:
            raise InputError(self.thing, f"it has no output '{output}'", nearest(output, list(outputs)))
        numbers = [name for name, kind in outputs.items() if kind in _TYPES]
        name = output or next(iter(numbers or outputs))
        if not outputs[name].startswith("tensor("):
            remedy = "convert it with zipmap off (options={'zipmap': False})"
            raise InputError(self.thing, f"its output '{name}' is {outputs[name]}, not a table of numbers", remedy)
        whole = outputs[name] not in _TYPES
        return name, "label" if whole else "probabilities" if "prob" in name.lower() else "logits"

    def answers(self, x: Array) -> Array:
        """Return what the graph says of `x`."""
        if self.layout == "hwc" and x.ndim == 4:
            x = x.transpose(0, 2, 3, 1)
        expected = self._shape[1:]
        fits = len(expected) == x.ndim - 1 and all(
            not isinstance(size, int) or size == own for size, own in zip(expected, x.shape[1:], strict=True)
        )
        if self._shape and not fits:
            reason = f"it takes inputs of shape {tuple(expected)}, not {tuple(x.shape[1:])}"
            raise InputError(self.thing, reason, "give data of that shape, or layout=hwc")
        values = np.ascontiguousarray(x * self.scale if self.scale != 1.0 else x, dtype=self._type)
        fixed = self._shape[0] if self._shape and isinstance(self._shape[0], int) else None
        rows = self._run(values) if fixed is None else self._in_pieces(values, fixed)
        return rows.reshape(x.shape[0], -1)

    def _in_pieces(self, values: Array, size: int) -> Array:
        n = values.shape[0]
        padded = np.concatenate([values, np.repeat(values[-1:], -n % size, axis=0)])
        return np.concatenate([self._run(padded[start : start + size]) for start in range(0, n, size)])[:n]

    def _run(self, values: Array) -> Array:
        try:
            return np.asarray(self._session.run([self._output], {self._name: values})[0])
        except Exception as error:
            raise InputError(self.thing, f"it fails on these inputs ({_line(error)})", "check its input") from error


def load_onnx(path: str, options: Mapping[str, Any]) -> nn.Module:
    """Return the classifier of an ONNX file; `options` are those of OnnxModel, and `mean` and `std` per channel.

    Errors: InputError.
    """
    for key in options:
        if key not in _OPTIONS:
            raise InputError(f"ONNX file '{path}'", f"has no option '{key}'", nearest(key, list(_OPTIONS)))
    mean, std = options.get("mean"), options.get("std")
    if (mean is None) != (std is None):
        raise InputError(f"ONNX file '{path}'", "has only one of mean and std", "give both, one number per channel")
    plain = {key: value for key, value in options.items() if key not in ("mean", "std")}
    model = OnnxModel(path, **plain)
    return model if mean is None or std is None else nn.Sequential(Normalise(tuple(mean), tuple(std)), model)


def _session(file: Path, thing: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(thing, "onnxruntime is not installed", "pip install 'maodun[onnx]'") from error
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(thing, f"it cannot be read ({_line(error)})", "export the model again") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:160] or type(error).__name__
