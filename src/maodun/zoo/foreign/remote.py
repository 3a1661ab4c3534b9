"""A classifier behind a URL: every image is asked for once, and what was answered stays answered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from maodun.core import context
from maodun.core.errors import InputError, TargetError
from maodun.zoo.factories import call_factory, find_attribute, read_mapping
from maodun.zoo.foreign.answers import GarbageError
from maodun.zoo.foreign.base import Array, Foreign, Reading
from maodun.zoo.foreign.dialect import Conduct, Dialect, make_options
from maodun.zoo.foreign.journal import Bill, Journal
from maodun.zoo.foreign.transport import Client


class RemoteModel(Foreign):
    """A service that is asked over HTTP: [0, 1] images N x ... to scores N x C, or one-hot decisions.

    Equal images are asked for once: search, verdict and a later start of the same run share the answers in the
    journal (`keep_answers`). Transports that carry 8 bits round every pixel to 1/255 here, so that search and verdict
    speak of the image that was sent. The first image is asked for twice, and a service that answers it differently is
    refused unless `stochastic` says so; then every draw is a query of its own, keyed like any stochastic model's.
    Errors: InputError for options and addresses that cannot be used; TargetError when the service fails or answers
    garbage; what it had answered until then is kept.
    """

    metered = True

    def __init__(self, url: str, dialect: Dialect, conduct: Conduct) -> None:
        self.thing = f"target {url.partition('?')[0]}"
        # What has to be announced before the first query, the reading of the answers, has been done by the dialect.
        kind = "label" if dialect.kind == "label" else "scores"
        reading = Reading.make(kind, dialect.classes, self.thing)
        super().__init__(reading, dialect.digest(url), stochastic=dialect.stochastic)
        self.url, self.dialect, self.conduct = url, dialect, conduct
        self._client = Client(url, dialect.headers, conduct, self.thing)
        self._journal = Journal(None, self.fingerprint)
        if conduct.journal is not None:
            self._journal = Journal.at(Path(conduct.journal).expanduser(), self.fingerprint)

    @property
    def eight_bit(self) -> bool:
        """Whether images are rounded to 1/255 on their way."""
        return self.dialect.eight_bit

    def keep_answers(self, folder: Path) -> None:
        """Keep answers in a file of `folder` from now on, and answer from what is there; an own journal goes before."""
        if self.conduct.journal is None:
            journal = Journal.at(folder / f"{self.fingerprint[:16]}.bin", self.fingerprint)
            if journal is not self._journal:
                journal.adopt(self._journal)
                self._journal = journal

    def bill(self) -> Bill:
        """Return what this target has cost so far, with the runs before that its journal knows."""
        return self._journal.bill()

    def answers(self, x: Array) -> Array:
        """Return what the service says of `x`; only images without a kept answer are sent."""
        if not x.shape[0]:
            return np.zeros((0, self._journal.width or 1), dtype=np.float32)
        images = self.dialect.sent(self._checked(x))
        keys = self._keys(images)
        missing = list({key: row for row, key in enumerate(keys) if key not in self._journal}.values())
        self._journal.reused += len(keys) - len(missing)
        if missing:
            self._ask(images[missing], [keys[row] for row in missing])
        return np.stack([self._journal.get(key) for key in keys])

    def _checked(self, x: Array) -> Array:
        pictures = "png" in (self.dialect.body, self.dialect.pixels) and self.dialect.request is None
        if pictures and (x.ndim != 4 or x.shape[1] not in (1, 3, 4)):
            reason = f"PNG cannot carry inputs of shape {tuple(x.shape[1:])}"
            raise InputError(self.thing, reason, "use body=json or body=npy")
        return x

    def _keys(self, images: Array) -> list[bytes]:
        """Return what names each question: the bytes that are sent, and for a stochastic service the draw."""
        draws = self._draws(images.shape[0])
        shape = str((images.dtype.str, images.shape[1:])).encode()
        return [
            hashlib.blake2b(shape + draw + image.tobytes(), digest_size=16).digest()
            for image, draw in zip(images, draws, strict=True)
        ]

    def _draws(self, n: int) -> list[bytes]:
        if not self.stochastic:
            return [b""] * n
        draw = context.current()
        if draw is None or draw.ids.shape[0] != n:
            # Asked outside of any run: every draw is a fresh one.
            return [os.urandom(16) for _ in range(n)]
        place = f"{draw.stream.seed}|{draw.stream.purpose}"
        pairs = zip(draw.ids.tolist(), draw.number.tolist(), strict=True)
        return [f"{place}|{name}|{number}".encode() for name, number in pairs]

    def _ask(self, images: Array, keys: Sequence[bytes]) -> None:
        """Send the images in requests of a size the service takes, and keep each answer as it comes."""
        first = 0
        if len(self._journal) == 0 and not self.stochastic:
            self._settle(images[:1], keys[0])
            first = 1
        size = self.dialect.together
        parts = [slice(start, start + size) for start in range(first, len(keys), size)]
        if len(parts) < 2:
            for part in parts:
                self._keep(keys[part], self._one(images[part]))
            return

        def ask(part: slice) -> None:
            self._keep(keys[part], self._one(images[part]))

        with ThreadPoolExecutor(min(self.conduct.concurrency, len(parts))) as pool:
            futures = [pool.submit(ask, part) for part in parts]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                # What is under way still arrives and is kept; nothing new is sent.
                self._client.stop.set()
                pool.shutdown(cancel_futures=True)
                self._client.stop.clear()
                raise

    def _settle(self, image: Array, key: bytes) -> None:
        """Ask for the first image twice: a verdict from kept answers is worth nothing when answers change."""
        first, second = self._one(image), self._one(image)
        if not np.allclose(first, second, rtol=1e-3, atol=1e-5):
            remedy = "give stochastic=true, and the verdict takes fresh draws"
            raise TargetError(self.thing, "answers the same image in two ways", remedy)
        self._keep([key], first)

    def _one(self, images: Array) -> Array:
        """Return the rows of one request's answer."""
        n = images.shape[0]
        content, kind = self.dialect.encode(images)

        def note() -> None:
            if not self._journal.note_request(n, self.conduct.most):
                reason = f"{self._journal.images} images have been sent, and most={self.conduct.most} are allowed"
                raise TargetError(self.thing, reason, "raise most; the same command line goes on")

        body = self._client.send(content, kind, note)
        try:
            rows = self.dialect.decode(body, n)
            expected = 1 if self.reading.kind == "label" else self.reading.classes or self._journal.width
            if expected is not None and rows.shape[1] != expected:
                raise GarbageError(f"it has {rows.shape[1]} classes instead of {expected}")
        except GarbageError as error:
            reason = f"its answer cannot be used: {self._client.hide(str(error))}"
            raise TargetError(self.thing, reason, "check the service and its mapping") from None
        return rows

    def _keep(self, keys: Sequence[bytes], rows: Array) -> None:
        for key, row in zip(keys, rows, strict=True):
            self._journal.put(key, row)


def load_remote(url: str, options: Mapping[str, Any]) -> RemoteModel:
    """Return the service at `url` as a model; `options` are those of Dialect and Conduct.

    The option `mapping` names a YAML or JSON file with such options, or package.module:function (file.py:function)
    that returns them, where `request` and `response` may be functions. What is given beside it goes before.
    Errors: InputError.
    """
    given = dict(options)
    thing = f"target {url.partition('?')[0]}"
    mapping = given.pop("mapping", None)
    if mapping is not None:
        given = {**_mapping(str(mapping), thing), **given}
    return RemoteModel(url, *make_options(given, thing))


def _mapping(spec: str, thing: str) -> dict[str, Any]:
    module, colon, attribute = spec.rpartition(":")
    if colon and not spec.endswith((".yaml", ".yml", ".json")):
        found = find_attribute(module, attribute, f"mapping '{spec}'")
        found = call_factory(found, {}, f"mapping '{spec}'") if callable(found) else found
    else:
        found = read_mapping(spec, f"mapping '{spec}'")
    if not isinstance(found, dict):
        raise InputError(f"mapping '{spec}'", "holds no options", f"give keys and values such as input: x ({thing})")
    return found
