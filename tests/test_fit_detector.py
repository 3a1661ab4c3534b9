"""A detector is fitted to a model, kept, and loaded by an evaluation; what cannot be meant is one line."""

from __future__ import annotations

import hashlib
import json

import pytest
from safetensors import safe_open

from maodun.arena.fit_detector import fit_detector_file
from maodun.core.errors import InputError

WORDS = ("fit-detector", "zoo:digits-cnn", "--data", "digits", "--limit", 60)


def test_fitted_kept_and_used(maodun, tmp_path) -> None:
    file = tmp_path / "new" / "d.safetensors"
    done = maodun(*WORDS, "--detector", "knn:k=5:samples=300", "--out", file)
    assert done.code == 0, done.err
    assert hashlib.sha256(file.read_bytes()).hexdigest() in done.out
    assert f"--defense knn:k=5:samples=300:file={file} --limit 60" in " ".join(done.out.split())
    with safe_open(str(file), framework="pt") as kept:
        about = json.loads(kept.metadata()["maodun-detector"])
        memory = kept.get_tensor("memory")
    assert about["name"] == "knn"
    assert about["model"] in done.out
    assert memory.shape[0] == 300

    common = ("evaluate", "--data", "digits", "--limit", 60, "--norm", "linf", "--eps", "0.1", "--attack")
    line = ("pgd:steps=2", "--no-diagnostics", "--defense", f"knn:k=5:samples=300:file={file}")
    used = maodun(*common, *line, "--model", "zoo:digits-cnn", "--out", tmp_path / "run")
    assert used.code == 0, used.err
    other = maodun(*common, *line, "--model", "zoo:digits-cnn-at", "--out", tmp_path / "other")
    assert "fitted to a model whose weights begin" in other.error


def test_the_share_that_is_refused_is_that_of_unseen_samples(tmp_path) -> None:
    options = {"samples": 300, "fpr": 0.2}
    made = fit_detector_file(
        "zoo:digits-cnn", "digits", tmp_path / "m.safetensors", detector="max_softmax", options=options, limit=200
    )
    assert made.refused.n == 200
    assert 0.08 < made.refused.value < 0.4
    again = fit_detector_file(
        "zoo:digits-cnn", "digits", tmp_path / "n.safetensors", detector="max_softmax", options=options, limit=200
    )
    assert (again.threshold, again.sha256) == (made.threshold, made.sha256)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--detector", "mahalanobi"), "did you mean 'mahalanobis'"),
        (("--detector", "jpeg"), "is none"),
        (("--detector", "knn:file=x.safetensors"), "loads a detector that is fitted already"),
        (("--detector", "trained_detector"), "give eps, as 8/255"),
        (("--detector", "knn:kk=3"), "does not take it"),
        (("--detector", "mahalanobis:layers=liner"), "none of that name"),
        (("--detector", "max_softmax:fpr=0.0001"), "cannot tell a share"),
        (("--eps", "much"), "is not a number"),
        (("--out", "d.pt"), "ends in .safetensors"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(maodun, tmp_path, words, complaint) -> None:
    out = () if "--out" in words else ("--out", tmp_path / "d.safetensors")
    assert complaint in maodun(*WORDS, *words, *out).error
    assert not list(tmp_path.iterdir())


def test_a_service_is_not_sent_thousands_of_samples(tmp_path) -> None:
    with pytest.raises(InputError, match="is a service"):
        fit_detector_file("http://127.0.0.1:9/predict", "digits", tmp_path / "d.safetensors", detector="max_softmax")
