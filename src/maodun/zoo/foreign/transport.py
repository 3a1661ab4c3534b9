"""Requests to a service: checked addresses, no redirects, limited patience, and no more haste than was asked for."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import numpy as np

from maodun.core.errors import InputError, TargetError
from maodun.zoo.foreign.answers import excerpt
from maodun.zoo.foreign.dialect import Conduct

if TYPE_CHECKING:
    import httpx

_AGAIN = (408, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 60.0
_MOST_BYTES = 64 * 2**20
_SECRET = re.compile(r"auth|cookie|token|secret|passw|(^|[-_])key$|api-?key", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def expand(text: str, thing: str, secrets: list[str]) -> str:
    """Replace every ${NAME} by that environment variable, noted in `secrets`; InputError when it is unset."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            reason = f"the environment variable {match[1]} is not set"
            raise InputError(thing, reason, f"export {match[1]} before the run")
        secrets.append(found)
        return found

    return _VARIABLE.sub(value, text)


def refuse_secrets(url: str, headers: Mapping[str, str], thing: str) -> None:
    """Raise InputError for a password or token written out, because options end up in manifests and reports."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise InputError("target", "has a password in its URL, which would be kept with the run", _remedy("TOKEN"))
    for name, value in [*headers.items(), *parse_qsl(parts.query)]:
        if _SECRET.search(name) and not _VARIABLE.search(value):
            reason = f"'{name}' is written out, and would be kept with the run"
            raise InputError(thing, reason, _remedy(name))


def _remedy(name: str) -> str:
    variable = re.sub(r"\W", "_", name).upper()
    return f"put it into an environment variable and write ${{{variable}}}"


def addresses(parts: SplitResult, thing: str) -> list[str]:
    """Return the addresses that the host of a URL stands for; InputError when there are none."""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise InputError(thing, f"its host cannot be found ({error})", "check the name and the port") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Bucket:
    """A token bucket: `rate` tokens a second, at most `burst` saved up; None hands out tokens without limit."""

    def __init__(self, rate: float | None, burst: int) -> None:
        self.rate, self.burst = rate, float(burst)
        self._tokens, self._then = float(burst), time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Take one token and return the seconds to wait until it is there."""
        if self.rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self.burst, self._tokens + (now - self._then) * self.rate) - 1.0
            self._then = now
            return max(0.0, -self._tokens / self.rate)


class Client:
    """A connection to one URL that sends bodies and returns answers.

    Unless `conduct.allow_remote`, every address of the host must be this machine's own, and only the address that was
    checked is ever connected to. Proxies of the environment are not used, redirects not followed. `stop` ends all
    waiting. Raises InputError for URLs that are refused, TargetError when the service fails for good.
    """

    def __init__(self, url: str, headers: Mapping[str, str], conduct: Conduct, thing: str) -> None:
        self.thing, self.conduct, self.stop = thing, conduct, threading.Event()
        refuse_secrets(url, headers, thing)
        self._secrets: list[str] = []
        url = expand(url, thing, self._secrets)
        parts = urlsplit(url)
        if not parts.hostname:
            raise InputError(thing, "names no host", "write http://127.0.0.1:8000/predict, for example")
        self._headers = {name: expand(value, thing, self._secrets) for name, value in headers.items()}
        self._headers["Host"] = parts.netloc
        self._extensions: dict[str, Any] = {}
        self._urls = [parts.geturl()] if conduct.allow_remote else self._pinned(parts)
        self._bucket = Bucket(conduct.rate, conduct.burst)
        self._random = np.random.default_rng()
        self._client = _httpx(thing).Client(
            timeout=conduct.timeout,
            follow_redirects=False,
            trust_env=False,
            limits=_httpx(thing).Limits(max_connections=conduct.concurrency),
        )

    def _pinned(self, parts: SplitResult) -> list[str]:
        """Return the URL with each address of the host in its place, so that a second look-up cannot lead elsewhere."""
        found = addresses(parts, self.thing)
        away = [each for each in found if not ipaddress.ip_address(each.partition("%")[0]).is_loopback]
        if away:
            reason = f"{parts.hostname} is {away[0]}, which is not this machine"
            remedy = "give --allow-remote (allow_remote: true) if you may query it"
            raise InputError(self.thing, reason, remedy)
        if parts.scheme == "https":
            self._extensions["sni_hostname"] = parts.hostname
        hosts = [f"[{each}]" if ":" in each else each for each in found]
        return [
            parts._replace(netloc=host if parts.port is None else f"{host}:{parts.port}").geturl() for host in hosts
        ]

    def hide(self, text: str) -> str:
        """Return `text` without the values that came from the environment, as services like to repeat them."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        return text

    def send(self, content: bytes, kind: str, note: Callable[[], None]) -> bytes:
        """Return the body of the answer to a POST of `content`; `note` is called before every try."""
        reason = ""
        for number in range(self.conduct.retries + 1):
            self._wait(self._bucket.take())
            note()
            answer, reason, pause = self._try(content, kind)
            if answer is not None:
                return answer
            if number < self.conduct.retries:
                self._wait(max(pause, self._pause(number)))
        tries = self.conduct.retries + 1
        raise TargetError(self.thing, f"{reason}, {tries} times", "see to the service; the same command line goes on")

    def _pause(self, number: int) -> float:
        """Double from try to try, and scatter by half either way, so that many clients do not return as one."""
        longest = min(_LONGEST_PAUSE, self.conduct.backoff * 2.0**number)
        return longest * float(self._random.uniform(0.5, 1.5))

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds) if seconds > 0 else self.stop.is_set():
            raise TargetError(self.thing, "stopped", "start again")

    def _try(self, content: bytes, kind: str) -> tuple[bytes | None, str, float]:
        """Return the answer, or None with the reason why trying again may help and the pause the service asked for."""
        httpx = _httpx(self.thing)
        try:
            response, body = self._post(content, kind)
        except httpx.TimeoutException:
            return None, f"does not answer within {self.conduct.timeout:g} s", 0.0
        except httpx.DecodingError:
            return None, "sends an answer that cannot be unpacked", 0.0
        except httpx.TransportError as error:
            return None, f"cannot be reached ({self.hide(str(error))[:120] or type(error).__name__})", 0.0
        status = response.status_code
        if 200 <= status < 300:
            return body, "", 0.0
        if status in _AGAIN:
            asked = response.headers.get("Retry-After", "")
            return None, f"answers {status}", min(_LONGEST_PAUSE, float(asked) if asked.isdigit() else 0.0)
        if 300 <= status < 400:
            where = str(response.headers.get("Location", "nowhere")).partition("?")[0][:120]
            raise TargetError(self.thing, f"redirects to {where}, which is not followed", "give the final address")
        remedy = "check the address, the token and what the service expects"
        raise TargetError(self.thing, f"answers {status} ({self.hide(excerpt(body))})", remedy)

    def _post(self, content: bytes, kind: str) -> tuple[httpx.Response, bytes]:
        """Return status, headers and body; of several addresses of one name the first that takes connections."""
        httpx = _httpx(self.thing)
        headers = {"Content-Type": kind, "Accept": "application/json", **self._headers}
        for url in list(self._urls):
            try:
                with self._client.stream(
                    "POST", url, content=content, headers=headers, extensions=self._extensions
                ) as response:
                    return response, self._body(response)
            except httpx.ConnectError:
                if len(self._urls) == 1:
                    raise
                self._urls = [*(each for each in self._urls if each != url), url]
        raise httpx.ConnectError("no address of the host takes connections")

    def _body(self, response: httpx.Response) -> bytes:
        httpx, parts, size = _httpx(self.thing), [], 0
        deadline = time.monotonic() + self.conduct.timeout
        for part in response.iter_bytes():
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                raise TargetError(self.thing, f"answers more than {_MOST_BYTES >> 20} MiB", "check the address")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the answer trickles")
        return b"".join(parts)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def _httpx(thing: str) -> Any:
    try:
        import httpx
    except ImportError as error:
        raise InputError(thing, "httpx is not installed", "pip install 'maodun[remote]'") from error
    return httpx
