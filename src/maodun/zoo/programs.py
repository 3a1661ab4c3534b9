"""Whole models in files: TorchScript archives, and torch.export programs after they have been searched for code."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.zoo.checkpoints import restricted_load

_TARGET = re.compile(r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")
# Sizes are written as sympy prints them: symbols with assumptions, its own classes, numbers, arithmetic.
_SIZE = re.compile(
    r"(?:Symbol\('\w+'(?:, \w+=(?:True|False))*+\)|[su]\d++|[A-Z][A-Za-z]*+|\d++(?:\.\d++)?+|[\s()+\-*/,<>=&|~%])*+"
)


def load_torchscript(path: str) -> nn.Module:
    """Return the model of a TorchScript archive, in evaluation mode, on the CPU.

    TorchScript is a closed language: its interpreter calls tensor operations, not Python.
    Errors: InputError for a missing or unreadable file.
    """
    thing = f"TorchScript file '{path}'"
    file = _existing(path, thing)
    try:
        model: nn.Module = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(thing, f"it cannot be read ({reason})", "save it with torch.jit.save") from error
    return model.eval()


class ExportedModel(nn.Module):
    """A torch.export program as a module: [0, 1] inputs N x ... to logits, any N."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        """Return the program's output."""
        logits: Tensor = self.program(x)
        return logits


def load_exported(path: str) -> nn.Module:
    """Return the model of a torch.export file (.pt2).

    PyTorch's own reader falls back to unpickling, resolves operators by any dotted name and evaluates size
    expressions as code. So every record is searched first, and what passed is handed over as a fresh archive.
    The program must have a free batch size and be exported in evaluation mode.
    Errors: InputError for a missing or unreadable file, for code in it, and for a fixed batch size.
    """
    thing = f"exported program '{path}'"
    file = _existing(path, thing)
    clean = _vetted(file, thing)
    try:
        with _restricted():
            program = torch.export.load(clean)
        module = program.module()
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise InputError(thing, f"it cannot be read ({reason})", "save it with torch.export.save") from error
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in names and isinstance(value, Tensor) and isinstance(value.shape[0], int):
            raise InputError(
                thing,
                f"it only takes batches of {value.shape[0]}",
                "export with dynamic_shapes=({0: torch.export.Dim('n')},)",
            )
    return ExportedModel(module)


def _existing(path: str, thing: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(thing, "there is no such file", "check the path")
    return file


@contextmanager
def _restricted() -> Iterator[None]:
    """Make every torch.load inside read plain tensors only, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _vetted(file: Path, thing: str) -> io.BytesIO:
    """Return a copy of the archive in memory after a look at every record."""
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as fresh:
            for name in archive.namelist():
                content = archive.read(name)
                _vet(name, content, thing)
                fresh.writestr(name, content)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(thing, f"it is not an archive of torch.export ({error})", "save it again") from error
    copy.seek(0)
    return copy


def _vet(name: str, content: bytes, thing: str) -> None:
    """Refuse a record that holds code: native libraries, pickles, foreign operators, size expressions with calls."""
    base = name.rsplit("/", 1)[-1]
    if "/aotinductor/" in name or base.endswith((".so", ".dll", ".dylib", ".pyd")):
        raise InputError(thing, f"it holds a compiled library ('{name}')", "save it with torch.export.save")
    if base.startswith(("custom_obj_", "opaque_obj_")):
        raise InputError(thing, f"it holds a pickled object ('{name}')", "export a model of tensors only")
    if base.endswith(".pt") and content:
        restricted_load(content, f"{thing}, record '{name}'")
    elif base.endswith(".json"):
        _vet_json(json.loads(content), thing)


def _vet_json(value: Any, thing: str) -> None:
    if isinstance(value, list):
        for entry in value:
            _vet_json(entry, thing)
    elif isinstance(value, dict):
        if value.get("use_pickle"):
            raise InputError(thing, "it holds a pickled tensor", "export a model of plain tensors")
        for key, entry in value.items():
            known = {"target": _TARGET, "expr_str": _SIZE}.get(key)
            if known is not None and isinstance(entry, str) and not known.fullmatch(entry):
                raise InputError(thing, f"it calls '{entry[:80]}'", "export a model of PyTorch's own operators")
            _vet_json(entry, thing)
