"""A service behind a URL as victim: asked once per image, never beyond its limits, and every failure is one line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from service import QUICK, Service, remote, scores, serving
from victims import Nearest

import maodun
from maodun.attacks.query.square import Square
from maodun.core.errors import InputError, MaodunError, TargetError
from maodun.core.oracle import Budget, Oracle
from maodun.core.threat import Threat
from maodun.zoo import load_data, load_model
from maodun.zoo.foreign.dialect import Dialect
from maodun.zoo.foreign.transport import Bucket


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=24)


# --- what is sent and what is read


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ({}, False),
        ({"batch": 5}, False),
        ({"body": "npy"}, False),
        ({"pixels": "byte"}, True),
        ({"pixels": "png"}, True),
        ({"body": "png"}, True),
    ],
)
def test_every_transport_brings_the_same_scores_of_the_pixels_it_sends(digits, options, rounds):
    service = Service()
    with serving(service) as url:
        found = scores(remote(url, **options), digits.x)
    x = torch.round(digits.x * 255) / 255 if rounds else digits.x
    assert torch.allclose(found, service.model(x), atol=2e-4)
    assert service.asked.total() == len(digits) + 1


@pytest.mark.parametrize("key", ["logits", "probabilities"])
def test_an_attack_on_a_service_ends_as_on_the_same_model_here(digits, key):
    attack = {"attack": "square", "options": {"queries": 40}}
    service = Service(key)
    with serving(service) as url:
        there = maodun.evaluate(load_model(url), digits, norm="linf", eps=0.1, attack=attack)
    here = maodun.evaluate(Nearest().eval(), digits, norm="linf", eps=0.1, attack=attack, diagnostics=False)
    assert there.cells[0].robust == here.cells[0].robust
    assert there.cells[0].clean == here.cells[0].clean
    # Ties between rounded logarithms may cost a query more or less.
    assert there.cells[0].queries == pytest.approx(here.cells[0].queries, rel=0.05)


def test_what_is_rounded_on_its_way_needs_a_radius_of_whole_levels(digits):
    attack = {"attack": "square", "options": {"queries": 2}}
    service = Service()
    with serving(service) as url:
        model = load_model(url, options={**QUICK, "body": "png"})
        with pytest.raises(InputError, match=r"25\.5 levels of 8 bits.*; give 25/255, or body=npy"):
            maodun.evaluate(model, digits.take(4), norm="linf", eps=0.1, attack=attack)
        assert service.requests == 0
        assert maodun.evaluate(model, digits.take(4), norm="linf", eps="25/255", attack=attack).cells


def test_rounding_never_leaves_a_ball_of_whole_levels():
    levels = torch.arange(256).repeat(50)
    x = levels / 255.0
    change = (torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 8 / 255
    sent = Dialect(body="png").sent((x + change).clamp(0, 1).numpy()).astype(int)
    assert int(np.abs(sent - levels.numpy()).max()) == 8


def test_log_probabilities_keep_the_sign_and_the_order_of_margins(digits):
    with serving(Service("probabilities")) as url:
        found = scores(remote(url), digits.x)
    logits = scores(Nearest(), digits.x)
    assert torch.allclose(found.log_softmax(1), logits.log_softmax(1), atol=1e-3)


def test_a_service_of_labels_grants_decisions_only(digits):
    with serving(Service("label")) as url:
        model = remote(url, kind="label", classes=10)
        assert torch.equal(scores(model, digits.x).argmax(1), scores(Nearest(), digits.x).argmax(1))
        oracle = Oracle(model)
        assert oracle.access == "decision"
        with pytest.raises(InputError, match="'scores': is needed, and the model grants decision only"):
            Square().run(oracle, digits.x, digits.y, Threat("linf", 0.1))


def test_a_mapping_file_and_a_mapping_of_functions(digits, tmp_path):
    (tmp_path / "map.yaml").write_text("input: inputs\noutput: logits\nbatch: 7\n")
    (tmp_path / "map.py").write_text(
        "import json\n"
        "def build():\n"
        "    def request(images):\n"
        "        return json.dumps({'inputs': images.tolist()}).encode(), 'application/json'\n"
        "    def response(content):\n"
        "        return [row[::-1] for row in json.loads(content)['logits']]\n"
        "    return {'request': request, 'response': response}\n"
    )
    service = Service()
    with serving(service) as url:
        plain = scores(remote(url, mapping=str(tmp_path / "map.yaml")), digits.x)
        turned = scores(remote(url, mapping=f"{tmp_path / 'map.py'}:build"), digits.x)
    assert torch.equal(plain, turned.flip(1))


# --- misbehaviour


def raised(before: Callable[[int, Any], bool], digits: Any, **options: Any) -> tuple[MaodunError, Service]:
    service = Service(before=before)
    with serving(service) as url, pytest.raises(TargetError) as caught:
        scores(remote(url, **options), digits.x)
    assert "\n" not in str(caught.value)
    return caught.value, service


def test_a_service_that_does_not_answer_is_given_up_after_the_retries(digits):
    error, service = raised(lambda n, handler: time.sleep(0.6) or True, digits, timeout=0.15, retries=1)
    assert "does not answer within 0.15 s, 2 times" in str(error)
    assert service.requests == 2


def test_an_answer_that_trickles_is_a_timeout(digits):
    def trickle(n: int, handler: Any) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(8):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
        return True

    error, _ = raised(trickle, digits, timeout=0.2, retries=0)
    assert "does not answer within 0.2 s" in str(error)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_that_pass_are_waited_for(digits, status):
    service = Service(before=lambda n, handler: n <= 2 and handler.say(status, b"later", Retry_After="0"))
    with serving(service) as url:
        model = remote(url)
        assert torch.allclose(scores(model, digits.x), service.model(digits.x), atol=1e-4)
        assert service.requests == model.bill().requests == 5


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (200, b"<html>welcome</html>", "it is no JSON (<html>welcome</html>)"),
        (200, b'{"answer": 42}', "it holds answer, and none of logits, scores"),
        (200, b'{"logits": [[1, 2, 3], [1, 2, 3]]}', "its scores have shape (2, 3) instead of (1, classes)"),
        (200, b'{"logits": [[1, 2], [3]]}', "not a table of numbers"),
        (200, b'{"logits": "yes"}', "not a table of numbers"),
        (200, b'{"scores": [[NaN, 1.0]]}', "not all finite"),
        (200, b'{"label": [3]}', "it tells labels only, which kind=label and classes=N have to announce"),
        (200, b"", "it is no JSON (empty)"),
        (200, b"[" * 200_000, "it is no JSON ([[["),
        (200, b"\x93NUMPY garbage", "it cannot be read (ValueError"),
        (200, b'{"scores": [[1e300, 1]]}', "not all finite"),
        (200, b'{"scores": [[%s, 1]]}' % (b"9" * 400), "not a table of numbers"),
        (200, b'{"scores": null}', "instead of (1, classes)"),
        (404, b"no such page", "answers 404 (no such page)"),
        (401, b"who are you", "answers 401 (who are you)"),
    ],
)
def test_garbage_is_told_at_once_and_in_one_line(digits, status, content, words):
    error, service = raised(lambda n, handler: handler.say(status, content), digits)
    assert words in str(error)
    assert service.requests == 1


def test_another_number_of_classes_half_way_is_garbage(digits):
    few = json.dumps({"logits": [[1.0, 2.0]]}).encode()
    error, _ = raised(lambda n, handler: n == 4 and handler.say(200, few), digits, batch=1, concurrency=1)
    assert "it has 2 classes instead of 10" in str(error)


def test_labels_beyond_the_classes_are_garbage(digits):
    service = Service("label")
    with serving(service) as url, pytest.raises(TargetError, match="none of its 3 classes"):
        scores(remote(url, kind="label", classes=3), digits.x)


def test_an_answer_that_cannot_be_unpacked_is_tried_again_and_given_up(digits):
    def broken(n: int, handler: Any) -> bool:
        return handler.say(200, b"no gzip", Content_Encoding="gzip")

    error, service = raised(broken, digits)
    assert "sends an answer that cannot be unpacked, 3 times" in str(error)
    assert service.requests == 3


def test_a_connection_that_breaks_is_tried_again(digits):
    def hang_up(n: int, handler: Any) -> bool:
        handler.close_connection = True
        return n < 3

    service = Service(before=hang_up)
    with serving(service) as url:
        assert scores(remote(url), digits.x[:2]).shape == (2, 10)
    error, _ = raised(lambda n, handler: hang_up(1, handler), digits)
    assert "cannot be reached" in str(error)


def test_a_service_that_is_not_there_is_one_line(maodun: Callable[..., Outcome], tmp_path):
    words = [word for key, value in {**QUICK, "retries": 1}.items() for word in ("--model-option", f"{key}={value}")]
    rest = ("--data", "digits", "--limit", 2, "--attack", "square", "--eps", 0.1, "--out", tmp_path / "run")
    error = maodun("evaluate", "--model", "http://127.0.0.1:9/predict", *rest, *words).error
    assert "cannot be reached" in error
    assert error.endswith(f"2 times; see to the service; the same command line goes on (--out {tmp_path / 'run'})")


def test_redirects_are_refused(digits):
    elsewhere = Service()
    with serving(elsewhere) as away:
        error, service = raised(lambda n, handler: handler.say(307, b"", Location=away), digits)
    assert "redirects to" in str(error)
    assert (service.requests, elsewhere.requests) == (1, 0)


def test_a_service_that_changes_its_mind_is_refused_unless_it_is_announced(digits):
    class Moody(Service):
        def reply(self, x):
            said = np.asarray(super().reply(x)["logits"])
            return {"logits": (said + np.random.default_rng().normal(0, 1.0, said.shape)).tolist()}

    service = Moody()
    with serving(service) as url:
        with pytest.raises(TargetError, match="answers the same image in two ways; give stochastic=true"):
            scores(remote(url), digits.x)
        model = load_model(url, options={**QUICK, "stochastic": True})
        attack = {"attack": "square", "options": {"queries": 3}}
        found = maodun.evaluate(model, digits.take(6), norm="linf", eps=0.05, attack=attack, draws=4)
        assert found.cells[0].draws == 4
        # Every draw is a question of its own, and the same run again repeats none of them.
        asked = model.model.bill().images
        assert asked == service.asked.total() - 2 > 6 * 4
        again = maodun.evaluate(model, digits.take(6), norm="linf", eps=0.05, attack=attack, draws=4)
        assert again.cells[0].robust == found.cells[0].robust
        assert model.model.bill().images == asked
        assert scores(model.model, digits.x[:0]).shape[0] == 0


# --- limits


def test_the_rate_is_kept(digits):
    service = Service()
    with serving(service) as url:
        scores(remote(url, batch=1, rate=40, concurrency=4), digits.x[:9])
    assert service.requests == 10
    assert service.times[-1] - service.times[0] >= 9 / 40 * 0.9


def test_a_bucket_saves_no_more_than_its_burst():
    bucket = Bucket(10.0, 2)
    waits = [bucket.take() for _ in range(4)]
    assert waits[:2] == [0.0, 0.0]
    assert waits[2:] == pytest.approx([0.1, 0.2], abs=0.02)


def test_no_more_requests_at_once_than_allowed(digits):
    # After the first image, which is asked for alone, nine requests wait for each other in threes.
    gate = threading.Barrier(3)
    service = Service(before=lambda n, handler: n > 2 and gate.wait(20) < 0)
    with serving(service) as url:
        scores(remote(url, batch=1, concurrency=3), digits.x[:10])
    assert service.most_busy == 3


def test_no_image_is_sent_beyond_the_most(digits):
    service = Service()
    with serving(service) as url:
        model = remote(url, batch=4, most=11, concurrency=1)
        with pytest.raises(TargetError, match="10 images have been sent, and most=11 are allowed"):
            scores(model, digits.x)
    assert service.asked.total() == 10


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_the_budget_of_a_sample_holds_to_the_query(digits, budget):
    service = Service()
    right = scores(Nearest(), digits.x).argmax(1) == digits.y
    x, y = digits.x[right][:1], digits.y[right][:1]
    with serving(service) as url:
        oracle = Oracle(remote(url), access="scores", budget=Budget(queries=budget))
        found = Square(queries=50).run(oracle, x, y, Threat("linf", 1e-4))
    assert found.queries.tolist() == [budget]
    # One more for the first image, which is asked for twice before anything else; equal points are asked for once.
    assert service.asked.total() <= budget + 1


def test_a_budget_of_nothing_is_one_line(maodun: Callable[..., Outcome], tmp_path, digits):
    service = Service()
    with serving(service) as url:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            f"data: {{spec: digits, limit: 4}}\nthreats: [{{norm: linf, eps: 0.1}}]\nshields: [{{model: '{url}'}}]\n"
            "spears: [{attack: square, budget: {queries: 0}}]\n"
        )
        assert "has a budget of 0" in maodun("arena", recipe, "--out", tmp_path / "run").error
        with pytest.raises(InputError, match="does not pay for a single query"):
            Square().run(Oracle(remote(url), budget=Budget(queries=0)), digits.x, digits.y, Threat("linf", 0.1))
    assert service.requests == 0
