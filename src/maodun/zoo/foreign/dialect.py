"""How a service is spoken to: what a request looks like, and where in an answer the scores stand."""

from __future__ import annotations

import base64
import copy
import hashlib
import inspect
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maodun.core.errors import InputError, nearest
from maodun.zoo.foreign import answers
from maodun.zoo.foreign.base import Array, Reading


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Dialect(_Options):
    """What is said to a service and how it is understood; all of it decides what an answer means.

    `body` is json (a nested list under the key `input`), png or npy (one raw file per request). `pixels` says how json
    carries an image: float (nested lists in [0, 1]), byte (whole numbers 0 to 255) or png (base64). byte and png round
    every pixel to 1/255. `layout` is chw or hwc. `single` sends one image without a batch axis per request, which raw
    files always do; else up to `batch` images go together. `extra` are further keys of the json body, `headers` those
    of the request, where ${NAME} stands for an environment variable. `output` is the dotted path to the scores (left
    out: logits, scores, probabilities, label or labels, whichever is there), `kind` what stands there, `classes` their
    number or names. `stochastic` says that equal images get different answers.
    `request(images) -> (bytes, content type)` and `response(bytes) -> N rows` replace both directions, from Python.
    """

    body: Literal["json", "png", "npy"] = "json"
    pixels: Literal["float", "byte", "png"] = "float"
    layout: Literal["chw", "hwc"] = "chw"
    input: str = "inputs"
    extra: dict[str, Any] = Field(default_factory=dict)
    headers: dict[str, str] = Field(default_factory=dict)
    single: bool = False
    batch: int = Field(default=64, ge=1)
    output: str | None = None
    kind: Literal["auto", "scores", "logits", "probabilities", "label"] = "auto"
    classes: int | list[str] | None = None
    stochastic: bool = False
    request: Callable[[Array], tuple[bytes, str]] | None = None
    response: Callable[[bytes], Any] | None = None

    @property
    def eight_bit(self) -> bool:
        """Whether pixels are rounded to 1/255 on their way."""
        return self.request is None and (self.body == "png" or (self.body == "json" and self.pixels != "float"))

    @property
    def together(self) -> int:
        """The most images of one request."""
        raw = self.request is None and self.body != "json"
        return 1 if self.single or raw else self.batch

    def digest(self, *more: str) -> str:
        """Return the SHA-256 of everything that decides what an answer means, with `more` such as the URL."""
        said = self.model_dump(mode="json", exclude={"batch", "request", "response"})
        said["functions"] = [_source(each) for each in (self.request, self.response) if each]
        return hashlib.sha256(json.dumps([said, *more], sort_keys=True).encode()).hexdigest()

    def sent(self, x: Array) -> Array:
        """Return images as they are sent: uint8 levels for 8-bit transports, float32 for the others.

        Halves go up, always: so a change by whole levels before rounding is the same change after it.
        """
        if self.eight_bit:
            return np.floor(x * 255.0 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(x, dtype=np.float32)

    def encode(self, images: Array) -> tuple[bytes, str]:
        """Return body and content type of a request for `images`, N x ... as `sent` gives them."""
        if self.request is not None:
            return self.request(images)
        if self.layout == "hwc" and images.ndim == 4:
            images = images.transpose(0, 2, 3, 1)
        if self.body == "png":
            return _png(images[0], self.layout), "image/png"
        if self.body == "npy":
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(images[0]), allow_pickle=False)
            return buffer.getvalue(), "application/x-npy"
        if self.pixels == "png":
            values: list[Any] = [base64.b64encode(_png(image, self.layout)).decode() for image in images]
        else:
            values = images.tolist()
        content: dict[str, Any] = copy.deepcopy(self.extra)
        _place(content, self.input, values[0] if self.single else values)
        return json.dumps(content, separators=(",", ":")).encode(), "application/json"

    def decode(self, content: bytes, n: int) -> Array:
        """Return what an answer to `n` images says as float32: n x C scores, or n x 1 class numbers for kind label.

        Probabilities come back as their logarithms. Raises GarbageError with the reason when it cannot be read.
        """
        kind: str = self.kind
        if self.response is not None:
            value = answers.foreign(self.response, content)
        else:
            value, kind = answers.find(content, self.output, kind)
        if kind == "label":
            return answers.labels(value, n, self.classes)
        rows = answers.rows(value, n)
        if kind == "probabilities":
            return Reading(kind).scores(rows).numpy()
        return rows


class Conduct(_Options):
    """How a service is treated; none of it changes an answer, so a run may go on with other values.

    `timeout` seconds for one try, `retries` further tries after timeouts, broken connections and the answers 408, 429
    and 5xx, waiting `backoff` seconds, twice as long each time, up to a minute, with jitter. `rate` is the most tries
    per second (`burst` at once after a pause), `concurrency` the most at a time, `most` the most images ever sent.
    `allow_remote` permits addresses beyond this machine. `journal` is the file of answers, by default in the run's
    folder.
    """

    timeout: float = Field(default=30.0, gt=0)
    retries: int = Field(default=4, ge=0)
    backoff: float = Field(default=0.5, ge=0)
    rate: float | None = Field(default=None, gt=0)
    burst: int = Field(default=1, ge=1)
    concurrency: int = Field(default=4, ge=1)
    most: int | None = Field(default=None, ge=1)
    allow_remote: bool = False
    journal: str | None = None


def make_options(options: Mapping[str, Any], thing: str) -> tuple[Dialect, Conduct]:
    """Return dialect and conduct from one mapping of options; InputError names the wrong key or value."""
    known = [*Dialect.model_fields, *Conduct.model_fields]
    for key in options:
        if key not in known:
            raise InputError(thing, f"has no option '{key}'", nearest(key, [*known, "mapping"]))
    try:
        dialect = Dialect(**{key: value for key, value in options.items() if key in Dialect.model_fields})
        conduct = Conduct(**{key: value for key, value in options.items() if key in Conduct.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        raise InputError(thing, f"option '{name}' is wrong ({first['msg']})", "correct its value") from None
    return dialect, conduct


def _source(function: Any) -> str:
    """Return the text of a function, so that a changed one does not answer for the old."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return str(getattr(function, "__qualname__", type(function).__name__))


def _png(image: Array, layout: str) -> bytes:
    from PIL import Image

    plain = image if layout == "hwc" else image.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(plain[:, :, 0] if plain.shape[2] == 1 else plain).save(buffer, "PNG")
    return buffer.getvalue()


def _place(content: dict[str, Any], path: str, value: Any) -> None:
    """Set `content` at a dotted path, making the mappings on the way."""
    *parents, last = path.split(".")
    for part in parents:
        content = content.setdefault(part, {})
    content[last] = value
