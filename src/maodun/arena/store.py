"""The folder of a run: append-only, whole or absent in every part, safe to kill at any moment.

`manifest.json` · `clean/<shield>/part-*.parquet` · `records/<cell>/part-*.parquet` ·
`adversarials/<cell>/part-*.npz` · `findings/<shield>.json` · `events.jsonl`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from maodun.core.errors import StoreError

MANIFEST = "manifest.json"
EVENTS = "events.jsonl"
_PROBE_LIMIT = 64 * 2**20
_ELSEWHERE = "choose another --out folder with enough space and the right to write"


def part_name(shard: int) -> str:
    """Return the file stem of a shard, such as part-00000."""
    return f"part-{shard:05d}"


class Store:
    """A run's folder behind any fsspec path; `root` may be local or a bucket such as s3://bucket/run.

    A local file is written under a temporary name, synced and renamed. On other file systems one put of the
    whole content has the same effect: object stores show an object whole or not at all.
    """

    def __init__(self, root: str | Path) -> None:
        self.location = str(root)
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise StoreError(self.location, f"is not a usable path ({error})", _ELSEWHERE) from error
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Return the full path of a file of the store."""
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Say whether a part is there; a part that is there is whole."""
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """Return a part's bytes; raises StoreError when it is absent or cannot be read."""
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except OSError as error:
            raise StoreError(self.path(name), f"cannot be read ({error})", "check the folder") from error

    def write(self, name: str, content: bytes) -> None:
        """Write a part whole: a reader, or the next start after a kill, sees all of it or nothing.

        Raises StoreError when the folder cannot be written or the disk is full; nothing is left behind then.
        """
        target = self.path(name)
        try:
            if not self.local:
                self.fs.makedirs(self.fs._parent(target), exist_ok=True)
                self.fs.pipe_file(target, content)
                return
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            _replace(Path(target), content)
        except OSError as error:
            raise StoreError(target, f"cannot be written ({error.strerror or error})", _ELSEWHERE) from error

    # --- the manifest

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; raises StoreError when the folder holds no run or a broken one."""
        if not self.exists(MANIFEST):
            raise StoreError(self.location, "holds no run (no manifest.json)", "give a run's --out folder")
        try:
            content = json.loads(self.read(MANIFEST))
        except ValueError as error:
            raise StoreError(self.path(MANIFEST), f"is not JSON ({error})", "use a new folder") from error
        if not isinstance(content, dict):
            raise StoreError(self.path(MANIFEST), "is not a manifest", "start in a new folder")
        return content

    def open_for(self, manifest: dict[str, Any], keys: tuple[str, ...], expected: int) -> dict[str, Any]:
        """Begin a run of about `expected` bytes here or continue it; returns the manifest that holds.

        A new folder gets `manifest`. An old one must agree with it in the entries named by `keys`;
        otherwise StoreError says which key differs first. In both cases the space is probed before anything
        else is written, and the litter of killed writers is swept.
        """
        old = self.manifest() if self.exists(MANIFEST) else None
        if old is None and not self._empty():
            reason = "is not empty and holds no run (no manifest.json)"
            raise StoreError(self.location, reason, "choose another --out folder")
        for key in keys if old is not None else ():
            difference = first_difference((old or {}).get(key), manifest.get(key), key)
            if difference is not None:
                reason = f"holds a run of another recipe ({difference})"
                raise StoreError(self.location, reason, "choose another --out or restore the old recipe")
        self._sweep()
        self.probe(expected)
        if old is not None:
            return old
        self.write_json(MANIFEST, manifest)
        return manifest

    def _empty(self) -> bool:
        try:
            names = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise StoreError(self.location, f"cannot be listed ({error})", _ELSEWHERE) from error
        return all(str(name).rstrip("/").rpartition("/")[2].startswith(".") for name in names)

    def _sweep(self) -> None:
        """Remove temporary files of writers of this machine that are no longer alive."""
        if not self.local:
            return
        for litter in Path(self.root).rglob(f".*.{socket.gethostname()}.*.tmp"):
            pid = litter.name.split(".")[-3]
            if pid.isdigit() and not _alive(int(pid)):
                litter.unlink(missing_ok=True)

    def probe(self, expected: int) -> None:
        """Make sure that `expected` bytes can be written, before any attack has cost anything.

        Really writes and removes a file of that size, at most 64 MiB, and compares the whole with the free
        space that the disk reports. Raises StoreError when the folder is not writable or the disk too full.
        """
        name = f".probe.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            # Random bytes, because a compressing disk would take zeros for nothing.
            self.write(name, np.random.default_rng().bytes(min(max(expected, 1), _PROBE_LIMIT)))
            if self.local and (free := shutil.disk_usage(self.root).free) < expected:
                reason = f"needs {expected / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free"
                raise StoreError(self.location, reason, _ELSEWHERE)
        finally:
            with contextlib.suppress(OSError):  # the write's own error says more
                if self.exists(name):
                    self.fs.rm_file(self.path(name))

    # --- tables and arrays

    def write_table(self, name: str, columns: dict[str, Any], schema: pa.Schema) -> None:
        """Write columns as one parquet part."""
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
        self.write(name, buffer.getvalue())

    def read_table(self, names: list[str]) -> pa.Table:
        """Return the rows of several parquet parts, in that order."""
        try:
            return pa.concat_tables([pq.read_table(io.BytesIO(self.read(name))) for name in names])
        except pa.ArrowInvalid as error:
            reason = f"holds a broken part ({error})"
            raise StoreError(self.location, reason, "delete it; the next start makes it again") from error

    def write_arrays(self, name: str, **arrays: np.ndarray[Any, Any]) -> None:
        """Write named arrays as one npz part, exactly."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        self.write(name, buffer.getvalue())

    def read_arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays of one npz part; nothing in it is unpickled."""
        with np.load(io.BytesIO(self.read(name)), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON part."""
        self.write(name, json.dumps(content, indent=1, ensure_ascii=False).encode())

    # --- events

    def event(self, kind: str, **details: object) -> None:
        """Append one line to events.jsonl: time, process, kind and details."""
        entry = {"time": time.time(), "pid": os.getpid(), "event": kind, **details}
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        target = self.path(EVENTS)
        try:
            if not self.local:
                # Not every file system makes a new file when asked to append to none.
                with self.fs.open(target, "ab" if self.fs.exists(target) else "wb") as file:
                    file.write(line)
                return
            with Path(target).open("ab", buffering=0) as file:
                # A kill may have cut the last line: a newline keeps this one apart from its remains.
                file.write((b"\n" if _cut(Path(target)) else b"") + line)
        except OSError as error:
            raise StoreError(target, f"cannot be written ({error.strerror or error})", _ELSEWHERE) from error

    def events(self) -> list[dict[str, Any]]:
        """Return all whole events in order; a line that a kill cut short is left out."""
        if not self.exists(EVENTS):
            return []
        found = []
        for line in self.read(EVENTS).decode(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [event for event in found if isinstance(event, dict)]


def _replace(target: Path, content: bytes) -> None:
    mark = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    temporary = target.with_name(f".{target.name}.{mark}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself lives in the folder, which has to reach the disk too.
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cut(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def first_difference(old: object, new: object, place: str) -> str | None:
    """Say in which entry two JSON values first differ, None when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in old or key not in new:
                side = "only in the store" if key in old else "only in the new recipe"
                return f"{place}.{key} is {side}"
            found = first_difference(old[key], new[key], f"{place}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            found = first_difference(left, right, f"{place}.{number}")
            if found is not None:
                return found
        return None
    return None if old == new else f"{place} was {_short(old)} and is now {_short(new)}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
