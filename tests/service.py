"""A toy service for tests: the nearest-mean classifier of the digits behind HTTP, with every way of misbehaving."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from victims import Nearest

from maodun.zoo import load_model

QUICK = {"timeout": 20.0, "retries": 2, "backoff": 0.01}


def remote(url: str, **options: Any) -> Any:
    return load_model(url, options={**QUICK, **options}).model


def scores(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


class Service:
    """Counts every image it answers in `asked`, every request in `requests`; `before(n)` may misbehave first.

    `before` gets the number of the request and the handler and returns True when it has replied itself.
    """

    def __init__(self, key: str = "logits", before: Callable[[int, Any], bool] | None = None) -> None:
        self.model, self.key, self.before = Nearest().eval(), key, before
        self.asked: Counter[bytes] = Counter()
        self.requests, self.busy, self.most_busy = 0, 0, 0
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[Any] = []
        self.lock = threading.Lock()

    def reply(self, x: np.ndarray) -> dict[str, Any]:
        with torch.no_grad():
            logits = self.model(torch.from_numpy(x).to(torch.float32))
        if self.key == "probabilities":
            return {self.key: logits.softmax(1).tolist()}
        if self.key == "label":
            return {self.key: logits.argmax(1).tolist()}
        return {self.key: logits.tolist()}

    def pixels(self, body: bytes, kind: str) -> np.ndarray:
        if kind == "image/png":
            return np.asarray(Image.open(io.BytesIO(body)), dtype=np.float32)[None, None] / 255
        if kind == "application/x-npy":
            return np.load(io.BytesIO(body))[None]
        values = json.loads(body)["inputs"]
        if isinstance(values[0], str):
            pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in values]
            return np.stack([np.asarray(each, dtype=np.float32)[None] for each in pictures]) / 255
        array = np.asarray(values)
        return array.astype(np.float32) / (255 if array.dtype.kind == "i" else 1)


class Handler(BaseHTTPRequestHandler):
    """One request: count, misbehave if told to, answer."""

    protocol_version = "HTTP/1.1"
    service: Service

    def do_POST(self) -> None:
        service = self.service
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with service.lock:
            service.requests += 1
            number = service.requests
            service.busy += 1
            service.most_busy = max(service.most_busy, service.busy)
            service.times.append(time.monotonic())
            service.headers.append(dict(self.headers))
        try:
            if service.before is not None and service.before(number, self):
                return
            x = service.pixels(body, self.headers["Content-Type"])
            with service.lock:
                service.asked.update(row.tobytes() for row in x)
            self.say(200, json.dumps(service.reply(x)).encode())
        finally:
            with service.lock:
                service.busy -= 1

    def say(self, status: int, content: bytes, **headers: str) -> bool:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return True

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serve on a free port of this machine and yield the URL."""

    class Mine(Handler):
        pass

    Mine.service = service
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/predict"
    finally:
        server.shutdown()
        server.server_close()
