"""Writing a report's file whole or not at all, with an error a person can act on."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import fsspec
from fsspec.implementations.local import LocalFileSystem

from maodun.core.errors import InputError


def write_text(path: str | Path, text: str) -> Path | str:
    """Write `text` as UTF-8 to any fsspec path and return where; a local file appears whole or not at all.

    Missing folders are made. Raises InputError when the place cannot be written.
    """
    target = str(path)
    try:
        files, place = fsspec.core.url_to_fs(target)
        if isinstance(files, LocalFileSystem):
            return _replace(Path(place), text.encode())
        files.makedirs(files._parent(place), exist_ok=True)
        files.pipe_file(place, text.encode())
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(target, f"cannot be written ({reason})", "choose another place for the report") from error
    return target


def _replace(target: Path, content: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def need(module: str, thing: str, remedy: str = "pip install 'maodun[report]'") -> ModuleType:
    """Import an optional package; raises InputError saying what needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(thing, f"needs the package {package}, which is not installed", remedy) from error
