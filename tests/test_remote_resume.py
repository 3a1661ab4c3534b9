"""Nothing is asked twice: a run against a service that fails or is killed goes on; and the tutorial works."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from service import QUICK, Service, remote, scores, serving
from test_resume_kill import start

import maodun as package
from maodun.arena.store import Store
from maodun.core.errors import MaodunError
from maodun.zoo import load_data, load_model
from maodun.zoo.foreign.dialect import Conduct, Dialect

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=24)


def command(url: str, out: Path, *more: object) -> tuple[object, ...]:
    quick = [word for key, value in QUICK.items() for word in ("--model-option", f"{key}={value}")]
    attack = ("--attack", "square:queries=30", "--access", "scores", "--query-budget", 25)
    data = ("--data", "digits", "--limit", 12, "--eps", 0.1)
    return ("evaluate", "--model", url, *data, *attack, "--out", out, *quick, *more)


def asked_once(service: Service) -> None:
    counts = sorted(service.asked.values())
    assert counts[-2:] == [1, 2], "only the very first image may be asked for twice"


def test_a_service_that_fails_half_way_costs_no_answer(maodun: Callable[..., Outcome], tmp_path):
    service = Service(before=lambda n, handler: 10 <= n < 13 and handler.say(500, b"ouch"))
    with serving(service) as url:
        out = tmp_path / "run"
        error = maodun(*command(url, out)).error
        assert f"answers 500, 3 times; see to the service; the same command line goes on (--out {out})" in error
        # At another pace it is still the same run.
        again = maodun(*command(url, out, "--model-option", "rate=2000"))
        assert again.code == 0, again.err
        asked_once(service)
        bill = [event["bill"] for event in Store(out).events() if event["event"] == "bill"][-1]
        assert bill.startswith(f"{service.requests:,} requests")
        assert bill.split(" answers kept")[0].endswith(f" {len(service.asked):,}")
        assert bill.split(",")[0] in again.out
        assert "holds a run of another recipe" in maodun(*command(url, out, "--model-option", "output=logits")).error


def test_an_answer_is_for_one_target_only(tmp_path, digits):
    journal = str(tmp_path / "mine.bin")
    with serving(Service()) as one, serving(Service()) as two:
        scores(remote(one, journal=journal), digits.x)
        with pytest.raises(MaodunError, match="holds the answers of another target"):
            remote(two, journal=journal)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_ask_for_no_image_twice(tmp_path, maodun: Callable[..., Outcome]):
    victim: list[int] = []
    deaths = {4, 60}

    def kill(n: int, handler: Any) -> bool:
        if n not in deaths:
            return False
        os.kill(victim[-1], signal.SIGKILL)
        return True

    service = Service(before=kill)
    recipe, out = tmp_path / "r.yaml", tmp_path / "run"
    with serving(service) as url:
        recipe.write_text(
            "data: {spec: digits, limit: 16}\nthreats: [{norm: linf, eps: 0.1}]\nshard_size: 8\n"
            f"shields: [{{model: '{url}', model_options: {{batch: 4, concurrency: 1, backoff: 0.01}}}}]\n"
            "spears: [{attack: square, options: {queries: 40}}]\n"
        )
        for _ in deaths:
            process = start(recipe, out)
            victim.append(process.pid)
            process.join(100)
            assert process.exitcode == -signal.SIGKILL
        process = start(recipe, out)
        process.join(100)
        assert process.exitcode == 0
    asked_once(service)
    bill = [event["bill"] for event in Store(out).events() if event["event"] == "bill"][-1]
    # Requests whose answers a kill swallowed are on the bill too.
    assert bill.startswith(f"{service.requests:,} requests with ")
    assert service.requests > max(deaths)
    same = tmp_path / "same.yaml"
    same.write_text(
        recipe.read_text().partition("shields")[0] + "shields: [{model: 'victims:linear'}]\n"
        "spears: [{attack: square, options: {queries: 40}}]\ndiagnostics: false\n"
    )
    from maodun.arena.summary import summarise

    assert maodun("arena", same, "--out", tmp_path / "same", "--quiet").code == 0
    there, here = (summarise(str(folder)).cells[0] for folder in (out, tmp_path / "same"))
    assert (there.robust, there.clean, there.queries) == (here.robust, here.clean, here.queries)


# --- the tutorial


@pytest.fixture
def toy():
    described = importlib.util.spec_from_file_location("toy_service", DOCS / "toy_service.py")
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    server = module.make_server("zoo:digits-cnn-at", 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_toy_service_of_the_tutorial_is_attacked_like_the_model_it_serves(toy, maodun: Callable[..., Outcome]):
    url = f"http://127.0.0.1:{toy.server_address[1]}/predict"
    attacks = [
        {"attack": "square", "options": {"queries": 20}, "access": "scores", "budget": {"queries": 15}},
        {"attack": "pgd", "gradient": "nes", "gradient_options": {"samples": 4}, "options": {"steps": 2}},
    ]
    target = load_model(url, options={"timeout": 20})
    for attack in attacks:
        there = package.evaluate(target, "digits", norm="linf", eps=0.15, attack=attack, limit=10)
        here = package.evaluate("zoo:digits-cnn-at", "digits", norm="linf", eps=0.15, attack=attack, limit=10)
        assert there.cells[0].robust == here.cells[0].robust
        assert there.cells[0].queries == here.cells[0].queries > 0
    assert target.model.bill().images == toy.images


def test_the_page_names_every_option():
    text = (DOCS / "query-a-service.md").read_text()
    own = {"request", "response", "burst"}
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert rows - {"mapping"} == ({*Dialect.model_fields} | {*Conduct.model_fields}) - own
    assert all(f"`{name}`" in text for name in own)


def test_the_mapping_of_the_page_works(tmp_path, digits):
    code = re.search(r"```python\n(# mapping.py.*?)```", (DOCS / "query-a-service.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "mapping.py").write_text(code)

    class Pets(Service):
        def pixels(self, body: bytes, kind: str) -> Any:
            return super().pixels(body.replace(b"pictures", b"inputs"), kind)

        def reply(self, x: Any) -> dict[str, Any]:
            rows = super().reply(x)["probabilities"]
            return {"beliefs": [{"dog": row[1], "cat": row[0]} for row in rows]}

    service = Pets("probabilities")
    with serving(service) as url:
        found = scores(remote(url, mapping=f"{tmp_path / 'mapping.py'}:build"), digits.x)
    expected = service.model(digits.x).log_softmax(1)[:, :2]
    assert found.shape == (24, 2)
    assert bool((found - expected).abs().max() < 1e-3)
