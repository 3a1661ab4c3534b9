"""ONNX files and scikit-learn estimators answer as the same model in PyTorch does, and give no gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Outcome
from onnx import TensorProto, helper, numpy_helper
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import nn
from victims import Nearest

import maodun
from maodun.attacks.gradient.pgd import PGD
from maodun.attacks.query.square import Square
from maodun.core.errors import InputError
from maodun.core.estimators import NES
from maodun.core.oracle import Oracle, granted
from maodun.core.threat import Threat
from maodun.zoo import load_data, load_model
from maodun.zoo.foreign import EstimatorModel, OnnxModel


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=48)


def write(path: Path, *, batch: object = "n", shape: tuple[int, ...] = (1, 8, 8), softmax: bool = False) -> str:
    """Write the nearest-mean classifier as a graph: flatten, matrix product, bias, perhaps softmax and a label."""
    score = Nearest().score
    weights = [
        numpy_helper.from_array(score.weight.detach().numpy().T.copy(), "w"),
        numpy_helper.from_array(score.bias.detach().numpy(), "b"),
    ]
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["logits"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
        nodes.append(helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0))
        outputs = [
            helper.make_tensor_value_info("label", TensorProto.INT64, [batch]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, 10]),
        ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])]
    graph = helper.make_graph(nodes, "nearest", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return str(path)


def scores(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def robust(model: Any, data: Any, **more: Any) -> Any:
    attack = {"attack": "square", "options": {"queries": 60}}
    return maodun.evaluate(model, data, norm="linf", eps=0.15, attack=attack, diagnostics=False, **more)


# --- ONNX


@pytest.mark.parametrize("batch", ["n", 1, 7])
def test_a_graph_answers_as_the_module_it_came_from(digits, tmp_path, batch):
    model = load_model("onnx:" + write(tmp_path / "m.onnx", batch=batch)).model
    for n in (1, 7, 48):
        assert torch.allclose(scores(model, digits.x[:n]), scores(Nearest(), digits.x[:n]), atol=1e-5)


def test_an_attack_on_a_graph_ends_as_on_the_module(digits, tmp_path):
    there = robust(load_model("onnx:" + write(tmp_path / "m.onnx")), digits)
    here = robust(Nearest().eval(), digits)
    assert 0 < there.cells[0].robust.value < there.cells[0].clean.value
    assert (there.cells[0].robust, there.cells[0].queries) == (here.cells[0].robust, here.cells[0].queries)


def test_outputs_are_read_as_what_they_are_called(digits, tmp_path):
    path, logits = write(tmp_path / "m.onnx", softmax=True), scores(Nearest(), digits.x)
    chosen = OnnxModel(path)
    assert (chosen.reading.kind, chosen.access) == ("probabilities", "scores")
    assert torch.allclose(scores(chosen, digits.x), logits.log_softmax(1), atol=1e-4)
    label = OnnxModel(path, output="label", classes=10)
    assert (label.reading.kind, label.access) == ("label", "decision")
    assert torch.equal(scores(label, digits.x).argmax(1), logits.argmax(1))


def test_normalisation_scale_and_layout_are_done_before(digits, tmp_path):
    path = write(tmp_path / "m.onnx", shape=(8, 8, 1))
    model = load_model("onnx:" + path, options={"layout": "hwc", "mean": [0.25], "std": [0.5], "scale": 2.0}).model
    assert torch.allclose(scores(model, digits.x), scores(Nearest(), (digits.x - 0.25) / 0.5 * 2.0), atol=1e-4)
    assert granted(model) == "scores"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": "logit"}, "has no output 'logit'; did you mean 'logits'"),
        ({"layout": "nchw"}, "layout 'nchw' is unknown"),
        ({"kind": "margin"}, "kind 'margin' is none that can be read"),
        ({"kind": "label"}, "how many classes there are is not known"),
        ({"mean": [0.5]}, "only one of mean and std"),
        ({"batch": 3}, "has no option 'batch'"),
    ],
)
def test_options_of_graphs_that_cannot_be_meant(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        load_model("onnx:" + write(tmp_path / "m.onnx"), options=options)


def test_files_that_are_no_graphs_and_inputs_of_another_shape(digits, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"PK not a graph")
    with pytest.raises(InputError, match="it cannot be read"):
        load_model(f"onnx:{tmp_path / 'bad.onnx'}")
    with pytest.raises(InputError, match="there is no such file"):
        load_model(f"onnx:{tmp_path / 'none.onnx'}")
    with pytest.raises(InputError, match=r"takes inputs of shape \(4, 16, 1\), not \(1, 8, 8\)"):
        scores(load_model("onnx:" + write(tmp_path / "m.onnx", shape=(4, 16, 1))).model, digits.x)
    with pytest.raises(InputError, match="it brings its weights"):
        load_model("onnx:" + write(tmp_path / "w.onnx"), weights="w.safetensors")


def test_another_file_is_another_model(tmp_path):
    one = load_model("onnx:" + write(tmp_path / "a.onnx"))
    two = load_model("onnx:" + write(tmp_path / "b.onnx", softmax=True))
    again = load_model("onnx:" + write(tmp_path / "c.onnx"))
    assert one.sha256 == again.sha256 != two.sha256


# --- scikit-learn


@pytest.fixture(scope="module")
def training():
    data = load_data("digits", split="train", limit=400)
    return data.x.flatten(1).numpy().astype(np.float64), data.y.numpy()


@pytest.fixture(scope="module")
def logistic(training):
    return LogisticRegression(max_iter=200).fit(*training)


def linear(estimator: Any) -> nn.Module:
    """The same classifier in PyTorch."""
    layer = nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(estimator.coef_))
        layer.bias.copy_(torch.tensor(estimator.intercept_))
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_a_linear_estimator_is_the_same_model_in_pytorch(digits, logistic):
    model, twin = EstimatorModel(logistic), linear(logistic)
    assert model.reading.kind == "logits"
    assert torch.allclose(scores(model, digits.x), scores(twin, digits.x), atol=1e-4)
    there, here = robust(model, digits), robust(twin, digits)
    assert 0 < there.cells[0].robust.value < there.cells[0].clean.value
    assert (there.cells[0].robust, there.cells[0].queries) == (here.cells[0].robust, here.cells[0].queries)


def test_probabilities_become_logarithms_without_infinities(digits, training):
    forest = RandomForestClassifier(20, random_state=0).fit(*training)
    model = EstimatorModel(forest)
    found = scores(model, digits.x)
    assert model.reading.kind == "probabilities"
    assert bool(torch.isfinite(found).all())
    expected = torch.tensor(forest.predict_proba(digits.x.flatten(1).double().numpy()), dtype=torch.float32)
    assert torch.allclose(found.exp(), expected, atol=1e-6)
    assert robust(model, digits).cells[0].robust.value < 0.9


def test_decisions_only(digits, training):
    model = EstimatorModel(KNeighborsClassifier(3).fit(*training), kind="label")
    assert granted(model) == "decision"
    with pytest.raises(InputError, match="is needed, and the model grants decision only; use an attack by decisions"):
        Square().run(Oracle(model), digits.x, digits.y, Threat("linf", 0.1))
    assert torch.equal(scores(model, digits.x).sum(1), torch.ones(48))


def test_scores_that_do_not_decide_are_refused(digits, training):
    class Contrary(LogisticRegression):
        def predict(self, values: Any) -> Any:
            return (super().predict(values) + 1) % 10

    estimator = Contrary(max_iter=100).fit(*training)
    with pytest.raises(InputError, match="on 48 of 48 inputs its largest score is not what predict says"):
        scores(EstimatorModel(estimator), digits.x)
    assert scores(EstimatorModel(estimator, kind="logits"), digits.x).shape == (48, 10)


def test_two_classes_make_two_scores(digits, training):
    x, y = training
    model = EstimatorModel(SVC(kernel="linear").fit(x[y < 2], y[y < 2]))
    few = digits.x[digits.y < 2]
    found = scores(model, few)
    assert found.shape == (len(few), 2)
    assert torch.equal(found.argmax(1), digits.y[digits.y < 2])


def test_classes_by_name_and_scaled_inputs(digits, training):
    x, y = training
    names = np.array(["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    estimator = LogisticRegression(max_iter=300).fit(x * 16, names[y])
    with pytest.raises(InputError, match="its classes are eight, five, four"):
        EstimatorModel(estimator)
    model = EstimatorModel(estimator, classes=names.tolist(), scale=16.0)
    assert float((scores(model, digits.x).argmax(1) == digits.y).float().mean()) > 0.8


def test_what_is_no_fitted_classifier_is_refused(digits, logistic):
    with pytest.raises(InputError, match="not a fitted classifier"):
        EstimatorModel(LogisticRegression())
    with pytest.raises(InputError, match="it has no predict"):
        EstimatorModel(object())
    with pytest.raises(InputError, match="cannot be asked for 'scores'"):
        EstimatorModel(logistic, kind="scores")
    with pytest.raises(InputError, match="it takes 64 features, and the inputs have 16"):
        scores(EstimatorModel(logistic), torch.zeros(2, 1, 4, 4))


def test_files_of_estimators_are_not_unpickled(tmp_path):
    with pytest.raises(InputError, match="reading a pickle runs whatever code is in it"):
        load_model(f"sklearn:{tmp_path / 'model.joblib'}")
    with pytest.raises(InputError, match="names no factory"):
        load_model("sklearn:victims")


FACTORY = """
from sklearn.linear_model import LogisticRegression
from maodun.zoo import load_data

def build(strength=1.0):
    data = load_data("digits", split="train", limit=300)
    return LogisticRegression(C=strength, max_iter=200).fit(data.x.flatten(1).double().numpy(), data.y.numpy())
"""


def test_estimators_from_the_command_line_and_again(tmp_path, maodun: Callable[..., Outcome]):
    (tmp_path / "mine.py").write_text(FACTORY)
    spec, out = f"sklearn:{tmp_path / 'mine.py'}:build", tmp_path / "run"
    words = ("evaluate", "--model", spec, "--data", "digits", "--limit", 20, "--eps", 0.1, "--out", out)
    attack = ("--attack", "square:queries=20", "--access", "scores", "--query-budget", 15)
    assert maodun(*words, *attack).code == 0
    assert maodun(*words, *attack).code == 0
    changed = FACTORY.replace("C=strength", "C=0.01")
    (tmp_path / "mine.py").write_text(changed)
    assert "weights" in maodun(*words, *attack).error
    assert load_model(spec, options={"strength": 0.5, "kind": "probabilities"}).model.reading.kind == "probabilities"
    error = maodun(*words[:-1], tmp_path / "other", "--attack", "pgd").error
    assert "access 'gradient' is needed, and the model grants scores only" in error


# --- gradients are asked for by other means


def test_pgd_by_finite_differences_works_where_gradients_are_refused(digits, logistic):
    oracle = Oracle(EstimatorModel(logistic), gradient=NES(samples=20))
    found = PGD(steps=4).run(oracle, digits.x, digits.y, Threat("linf", 0.15))
    assert int(found.found.sum()) > 8
    with pytest.raises(InputError, match=r"use NES\(\) or SPSA\(\), or a query attack"):
        PGD().run(Oracle(EstimatorModel(logistic)), digits.x, digits.y, Threat("linf", 0.15))


def test_access_is_the_narrowest_of_oracle_and_model(logistic):
    model = EstimatorModel(logistic)
    assert Oracle(model).access == "scores"
    assert Oracle(nn.Sequential(nn.Identity(), model), access="decision").access == "decision"
    assert Oracle(nn.Flatten()).access == "gradient"
