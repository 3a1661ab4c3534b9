"""What users write as package.module:name or file.py:name: found, called, and every mistake told in one line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from maodun.core.errors import InputError, nearest


def find_attribute(module: str, attribute: str, thing: str, kinds: Sequence[str] = ()) -> Any:
    """Return the attribute (dots allowed) of `module`, a dotted name or a .py file.

    `thing` names the specification in errors, `kinds` what it could have begun with instead. Errors: InputError.
    """
    holder = _import(module, thing, kinds)
    found: Any = holder
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(holder) if not name.startswith("_")]
            raise InputError(thing, f"'{module}' has no '{part}'", nearest(part, public))
        found = getattr(found, part)
    return found


def call_factory(factory: Any, options: Mapping[str, Any], thing: str) -> Any:
    """Return what the callable `factory` makes of keyword arguments; InputError for options that do not fit."""
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        where = f"options of {thing.partition(' ')[2] or thing}"
        raise InputError(where, str(error), "match the factory's arguments") from error
    except ValueError:
        pass  # a built-in without a signature: the call itself will tell
    return factory(**options)


def read_mapping(path: str, thing: str) -> Any:
    """Return the content of a YAML or JSON file; InputError when it cannot be read."""
    try:
        return yaml.safe_load(Path(path).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = f"it cannot be read ({str(error).splitlines()[0]})"
        raise InputError(thing, reason, "give a YAML or JSON file") from error


def _import(module: str, thing: str, kinds: Sequence[str]) -> Any:
    if module.endswith(".py"):
        path = Path(module).expanduser()
        if not path.is_file():
            raise InputError(thing, f"there is no file '{module}'", "check the path")
        described = importlib.util.spec_from_file_location(path.stem, path)
        if described is None or described.loader is None:
            raise InputError(thing, f"'{module}' cannot be imported", "give a Python file")
        loaded = importlib.util.module_from_spec(described)
        described.loader.exec_module(loaded)
        return loaded
    # A console script does not look in the folder it is started from; python -m does, and so does this.
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        words = "".join(f", {kind}:" for kind in kinds)
        remedy = f"check the name, or use {words[2:]}" if words else "check the name"
        raise InputError(thing, f"module '{module}' cannot be imported ({error})", remedy) from error
    finally:
        if added:
            sys.path.remove(here)
