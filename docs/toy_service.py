"""A model behind HTTP, for trying out attacks on services: python docs/toy_service.py zoo:digits-cnn-at 8000

Answers POST /predict with {"inputs": N x C x H x W in [0, 1]} by {"logits": N x classes}, on this machine only.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from maodun.zoo import load_model


def make_server(spec: str, port: int) -> ThreadingHTTPServer:
    """Return a server of the model `spec`; `server.images` counts what it was asked."""
    model, lock = load_model(spec).model, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock, torch.no_grad():
                logits = model(torch.tensor(body["inputs"]))
                self.server.images += len(logits)
            content = json.dumps({"logits": logits.tolist()}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.images = 0
    return server


if __name__ == "__main__":
    served = make_server(sys.argv[1], int(sys.argv[2]))
    print(f"http://127.0.0.1:{served.server_address[1]}/predict", flush=True)
    try:
        served.serve_forever()
    except KeyboardInterrupt:
        print(f"{served.images} images were asked for")
