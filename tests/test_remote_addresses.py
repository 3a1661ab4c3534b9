"""Where a service may be, and what may be said of it: addresses are checked before a packet, secrets kept nowhere."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Outcome
from service import Service, remote, scores, serving

import maodun
from maodun.core.errors import InputError, TargetError
from maodun.zoo import load_data, load_model


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=24)


@pytest.fixture
def no_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any) -> None:
        raise AssertionError("a packet was sent")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "0.0.0.0", "10.0.0.1:8000"])
def test_other_machines_are_refused_before_any_packet(no_packets, host, maodun: Callable[..., Outcome]):
    with pytest.raises(InputError, match="which is not this machine; give --allow-remote"):
        load_model(f"http://{host}/predict")
    words = ("--data", "digits", "--limit", 4, "--attack", "square", "--eps", 0.1)
    assert "which is not this machine" in maodun("evaluate", "--model", f"http://{host}/predict", *words).error


def test_every_address_of_a_name_must_be_this_machine(monkeypatch, no_packets):
    def resolve(*words: Any, **more: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, 80)) for address in ("127.0.0.1", "192.0.2.7")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(InputError, match=r"classifier.example is 192\.0\.2\.7"):
        load_model("http://classifier.example/predict")


def test_a_name_cannot_be_made_to_mean_another_machine_later(monkeypatch, digits):
    plain = socket.getaddrinfo
    with serving(Service()) as url:
        port = url.split(":")[2].split("/")[0]
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *words, **more: plain("127.0.0.1" if host == "toy" else host, *words, **more),
        )
        model = remote(f"http://toy:{port}/predict")

        def later(host: str, *words: Any, **more: Any) -> Any:
            assert host == "127.0.0.1"
            return plain(host, *words, **more)

        monkeypatch.setattr(socket, "getaddrinfo", later)
        assert scores(model, digits.x).shape == (24, 10)


def test_a_name_of_two_addresses_is_asked_at_the_one_that_listens(monkeypatch, digits):
    plain, service = socket.getaddrinfo, Service()
    with serving(service) as url:
        port = int(url.split(":")[2].split("/")[0])

        def resolve(host: str, *words: Any, **more: Any) -> Any:
            found = ["::1", "127.0.0.1"] if host == "toy" else [host]
            return [entry for each in found for entry in plain(each, *words, **more)]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        model = remote(f"http://toy:{port}/predict", retries=0)
        assert scores(model, digits.x).shape == (24, 10)
        assert service.headers[0]["Host"] == f"toy:{port}"
        assert service.requests == model.bill().requests == 3


def test_services_that_repeat_a_token_do_not_get_it_printed(monkeypatch, digits):
    monkeypatch.setenv("TOY_TOKEN", "hush-hush-123")
    for status, words in ((403, r"answers 403 \(bad \*\*\*\)"), (200, r"it is no JSON \(bad \*\*\*\)")):
        service = Service(before=lambda n, handler, code=status: handler.say(code, b"bad hush-hush-123"))
        with serving(service) as url, pytest.raises(TargetError, match=words):
            scores(remote(url, headers={"X-Token": "${TOY_TOKEN}"}), digits.x)


def test_allow_remote_is_refused_where_nothing_is_sent(maodun: Callable[..., Outcome]):
    words = ("--data", "digits", "--attack", "square", "--eps", 0.1, "--allow-remote")
    assert "is of no use for 'zoo:digits-cnn'" in maodun("evaluate", "--model", "zoo:digits-cnn", *words).error


def test_tokens_come_from_the_environment_and_are_kept_nowhere(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("TOY_TOKEN", "hush-hush-123")
    service = Service()
    with serving(service) as url:
        model = load_model(url + "?key=${TOY_TOKEN}", options={"headers": {"Authorization": "Bearer ${TOY_TOKEN}"}})
        attack = {"attack": "square", "options": {"queries": 2}}
        maodun.evaluate(model, digits.take(4), norm="linf", eps=0.1, attack=attack, out=tmp_path / "run")
    assert all(each["Authorization"] == "Bearer hush-hush-123" for each in service.headers)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not any(b"hush-hush" in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("url", "headers", "words"),
    [
        ("http://me:secret@127.0.0.1/x", {}, "has a password in its URL"),
        ("http://127.0.0.1/x?api_key=123", {}, "'api_key' is written out"),
        ("http://127.0.0.1/x", {"Authorization": "Bearer 123"}, "'Authorization' is written out"),
        ("http://127.0.0.1/x", {"X-Api-Key": "${NO_SUCH_VARIABLE_HERE}"}, "NO_SUCH_VARIABLE_HERE is not set"),
    ],
)
def test_secrets_that_are_written_out_are_refused(url, headers, words):
    with pytest.raises(InputError, match=words) as caught:
        load_model(url, options={"headers": headers})
    assert "secret@" not in str(caught.value)
    assert "123" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeouts": 3}, "has no option 'timeouts'; did you mean 'timeout'"),
        ({"body": "xml"}, "option 'body' is wrong"),
        ({"kind": "label"}, "how many classes there are is not known"),
        ({"classes": 1}, "leaves nothing to confuse"),
        ({"mapping": "nowhere.yaml"}, "mapping 'nowhere.yaml': it cannot be read"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_without_a_query(options, words):
    with pytest.raises(InputError, match=words):
        load_model("http://127.0.0.1:9/predict", options=options)


def test_a_model_that_needs_gradients_is_refused_before_the_first_query(maodun: Callable[..., Outcome], tmp_path):
    service = Service()
    with serving(service) as url:
        words = ("--data", "digits", "--limit", 4, "--eps", 0.1, "--out", tmp_path / "run")
        error = maodun("evaluate", "--model", url, "--attack", "pgd", *words).error
    assert "access 'gradient' is needed, and the model grants scores only; give it gradient nes" in error
    assert service.requests == 0
    assert not (tmp_path / "run").exists()
