"""What a target has already answered, kept so that no query is paid for twice, not even after a kill."""

from __future__ import annotations

import os
import struct
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from maodun.core.errors import StoreError

_MAGIC = b"maodun answers 1\n"
_HEAD = struct.Struct("<16sI")
_CHECK = struct.Struct("<I")
_REQUEST = b"request".ljust(16, b"\0")
_ELSEWHERE = "choose another --out folder with enough space and the right to write"


@dataclass(frozen=True)
class Bill:
    """What a target has cost so far, over all lives of a journal: tries sent, images in them, answers received.

    `reused` counts the images that this process took from the journal instead of asking again.
    """

    requests: int
    images: int
    answers: int
    reused: int

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests with {self.images:,} images sent, {self.answers:,} answers kept, "
            f"{self.reused:,} images answered from them"
        )


class Journal:
    """An append-only file of answers: key (16 bytes) to a row of float32; `path` None keeps them for this process only.

    Every try is noted before it is sent, so the count of requests holds even when the process is killed before the
    answer comes. Records carry a checksum; what a kill left half written at the end is overwritten by the next one.
    `owner` (64 hexadecimal digits) is the fingerprint of the target. Safe to use from several threads, not from two
    processes: the second gets a StoreError. StoreError also for another target's file and for full disks.
    """

    def __init__(self, path: Path | None, owner: str) -> None:
        self.path, self.owner, self.reused = path, owner, 0
        self.requests = self.images = 0
        self._where: dict[bytes, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._file = self._open(path)
        self._end = self._load(_MAGIC + owner.encode() + b"\n")

    @staticmethod
    def at(path: Path, owner: str) -> Journal:
        """Return the journal at `path`, shared by all targets of this process that keep their answers there."""
        name = str(path.resolve())
        with _sharing:
            journal = _shared.get(name)
            if journal is None or journal.owner != owner or not journal.in_place():
                journal = _shared[name] = Journal(path, owner)
            return journal

    def in_place(self) -> bool:
        """Say whether the file is still the one at its path, and not one that was removed since."""
        try:
            return self.path is not None and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except (OSError, ValueError):
            return False

    def _open(self, path: Path | None) -> BinaryIO:
        if path is None:
            return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            file = cast(BinaryIO, path.open("r+b", buffering=0))
        except OSError as error:
            raise StoreError(str(path), f"cannot be written ({error.strerror})", _ELSEWHERE) from error
        if not _lock(file):
            file.close()
            raise StoreError(str(path), "is in use by another process", "wait for that run, or use another --out")
        return file

    def _load(self, header: bytes) -> int:
        """Read the records and return where the whole ones end, which is where the next is written."""
        size = self._file.seek(0, os.SEEK_END)
        if size < len(header):
            # Nothing, or a header that a kill cut short.
            self._write(header, 0)
            return len(header)
        if self._read(len(header), 0) != header:
            reason = "holds the answers of another target or of other settings"
            raise StoreError(str(self.path), reason, "choose another --out, or restore the old settings")
        end = len(header)
        for key, count, start in self._scan(end):
            if key == _REQUEST:
                self.requests, self.images = self.requests + 1, self.images + count
            else:
                self._where[key] = (start, count)
            end = start + (0 if key == _REQUEST else 4 * count) + _CHECK.size
        return end

    def _scan(self, position: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield (key, count, start of the row) of every whole record from `position` on."""
        with os.fdopen(os.dup(self._file.fileno()), "rb", buffering=2**20) as file:
            file.seek(position)
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                key, count = _HEAD.unpack(head)
                # A length that noise made up would ask for gigabytes; reading stops at the file's end by itself.
                row = b"" if key == _REQUEST else file.read(4 * count)
                check = file.read(_CHECK.size)
                if len(check) < _CHECK.size or _CHECK.unpack(check)[0] != zlib.crc32(head + row):
                    return
                yield key, count, position + _HEAD.size
                position += _HEAD.size + len(row) + _CHECK.size

    def _read(self, size: int, position: int) -> bytes:
        self._file.seek(position)
        return self._file.read(size)

    def _write(self, content: bytes, position: int) -> None:
        try:
            # Over what an earlier writer left half written, not behind it.
            self._file.seek(position)
            self._file.truncate()
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise StoreError(str(self.path), f"cannot be written ({error.strerror})", _ELSEWHERE) from error

    def note_request(self, images: int, most: int | None) -> bool:
        """Note that `images` are about to be sent; False, and nothing noted, when that is more than `most` in all."""
        with self._lock:
            if most is not None and self.images + images > most:
                return False
            self._append(_REQUEST, images, b"")
            self.requests, self.images = self.requests + 1, self.images + images
            return True

    def put(self, key: bytes, row: NDArray[np.float32]) -> None:
        """Keep an answer; the first one kept for a key stays."""
        with self._lock:
            if key not in self._where:
                self._where[key] = (self._append(key, row.size, row.astype("<f4").tobytes()), row.size)

    def _append(self, key: bytes, count: int, row: bytes) -> int:
        head = _HEAD.pack(key, count)
        start = self._end + _HEAD.size
        self._write(head + row + _CHECK.pack(zlib.crc32(head + row)), self._end)
        self._end = start + len(row) + _CHECK.size
        return start

    def get(self, key: bytes) -> NDArray[np.float32]:
        """Return a kept answer (C,); KeyError when there is none."""
        start, count = self._where[key]
        with self._lock:
            row = self._read(4 * count, start)
        return np.frombuffer(row, dtype="<f4").astype(np.float32)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    @property
    def width(self) -> int | None:
        """The length of the rows, None before the first answer."""
        return next((count for _, count in self._where.values()), None)

    def adopt(self, other: Journal) -> None:
        """Take over what another journal of the same target holds."""
        for key in other._where:
            self.put(key, other.get(key))
        for number in range(other.requests):
            self.note_request(0 if number else other.images, None)

    def bill(self) -> Bill:
        """Return what has been spent."""
        return Bill(self.requests, self.images, len(self), self.reused)

    def close(self) -> None:
        """Close the file; the journal cannot be used afterwards."""
        self._file.close()


_shared: weakref.WeakValueDictionary[str, Journal] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def _lock(file: BinaryIO) -> bool:
    """Take the file for this process alone; True also where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
