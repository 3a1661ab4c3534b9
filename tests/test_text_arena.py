"""A text experiment from its recipe: trained, attacked, compared, resumed; and refused where it cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy.stats import binomtest

from maodun.app.cli import run
from maodun.arena import text as room
from maodun.arena.text import train_text
from maodun.arena.text_compare import bootstrap, compare_runs, sign_flips
from maodun.arena.text_recipe import load_text_recipe, trains_text
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.report.text import HEADERS, to_markdown, words
from maodun.tasks.text import load_text_net

GOOD, BAD = ("good", "lovely", "bright"), ("bad", "awful", "dull")
RECIPES = Path(__file__).parents[1] / "recipes" / "train"
PLAIN = ("film", "story", "plot", "scene", "actor", "music")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Sentences of five words, one of which tells the label."""
    draws = Stream(0, "test").integers(torch.arange(300), (6,), 6)
    texts, labels = [], []
    for k, row in enumerate(draws.tolist()):
        tells = (GOOD, BAD)[k % 2][row[5] % 3]
        texts.append(" ".join([*(PLAIN[i] for i in row[:4]), tells]))
        labels.append(1 - k % 2)
    path = tmp_path_factory.mktemp("data") / "t.parquet"
    pq.write_table(pa.table({"text": texts, "label": labels}), path)
    return f"parquet:{path}"


def content(data: str, **changes) -> dict:
    return {
        "name": "toy",
        "text": data,
        "seeds": [0, 1],
        "network": {"kind": "mean", "width": 8, "hidden": 8, "dropout": 0.1},
        "fit": {"epochs": 4, "batch_size": 32, "rate": 0.02},
        "runs": [{"name": "plain"}, {"name": "vat", "objective": "virtual", "eps": 0.5}],
        "reference": "plain",
        "measure": {"limit": 30, "embedding": {"eps": [1.0]}, "words": [{"substitutes": "misspellings", "share": 0.2}]},
        "resamples": 100,
        **changes,
    }


def recipe(folder: Path, data: str, **changes) -> str:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(content(data, **changes)))
    return str(path)


def test_trains_attacks_compares_and_resumes(data, tmp_path, monkeypatch):
    path = recipe(tmp_path, data)
    assert trains_text(path)
    seen: list[dict] = []
    stopped = tmp_path / "stopped"

    def stop(line):
        if line.get("run") == "vat-0" and line.get("epoch") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(path, stopped, say=stop)
    resumed = train_text(path, stopped, say=seen.append)
    assert {line["run"] for line in seen} == {"vat-0", "plain-1", "vat-1"}
    assert next(line for line in seen if "epoch" in line)["epoch"] == 2.0
    lines = train_text(path, tmp_path / "whole")
    assert lines == resumed
    for name in ("plain-0", "vat-0", "plain-1", "vat-1"):
        one, other = (load_text_net(tmp_path / each / f"{name}.safetensors")[0] for each in ("stopped", "whole"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    by = {(line.attack, line.run): line for line in lines}
    assert by["clean", "plain"].share > 0.95
    assert by["clean", "plain"].n > by["embedding, eps 1", "plain"].n == 30
    # The one telling word can be misspelt, so whatever is right falls to about a coin's toss.
    assert by["misspellings, 20 % of words", "plain"].share < 0.8
    assert by["embedding, eps 1", "vat"].gap == pytest.approx(
        by["embedding, eps 1", "vat"].share - by["embedding, eps 1", "plain"].share
    )
    kept = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert len(kept["lines"]) == len(lines)
    monkeypatch.setattr(room._Stage, "make", lambda *_: pytest.fail("nothing is missing"))
    assert train_text(path, stopped) == lines


def test_a_folder_of_another_recipe_is_refused(data, tmp_path):
    small = {"seeds": [0], "runs": [{"name": "plain"}], "fit": {"epochs": 1}}
    out = tmp_path / "out"
    train_text(recipe(tmp_path, data, **small), out)
    with pytest.raises(InputError, match="was begun with the recipe otherwise"):
        train_text(recipe(tmp_path, data, **{**small, "fit": {"epochs": 2}}), out)
    with pytest.raises(InputError, match="was begun with run 'plain' otherwise"):
        train_text(recipe(tmp_path, data, **{**small, "runs": [{"name": "plain", "objective": "noise"}]}), out)
    (out / "somebody-elses.safetensors").write_bytes(b"weights")
    train_text(recipe(tmp_path, data, **{**small, "fit": {"epochs": 2}}), out, resume=False)
    assert (out / "somebody-elses.safetensors").read_bytes() == b"weights"
    other = tmp_path / "arena"
    other.mkdir()
    (other / "manifest.json").write_text('{"format": 1, "recipe": {}}')
    for resume in (True, False):
        with pytest.raises(InputError, match="holds a run of another kind"):
            train_text(recipe(tmp_path, data, **small), other, resume=resume)


def test_hidden_labels_are_drawn_by_the_seed(data, tmp_path):
    described = load_text_recipe(recipe(tmp_path, data, labels=20))
    stage = room._Stage(described, tmp_path, lambda _: None)
    first, again, other = stage.labels(0), stage.labels(0), stage.labels(1)
    assert int((first >= 0).sum()) == 20
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    shown = first >= 0
    assert torch.equal(first[shown], stage.splits["train"].y[shown])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runs": [{"name": "a", "objective": "adversarial", "eps": 0}]}, "eps 0.0: is no radius"),
        ({"runs": [{"name": "a", "xi": 0.1}]}, "belong to virtual"),
        ({"runs": [{"name": "a", "epss": 1}]}, "did you mean 'eps'"),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"runs": []}, "no runs"),
        ({"reference": "plane"}, "did you mean 'plain'"),
        ({"measure": {"embedding": {"eps": [-1.0]}}}, "eps -1.0"),
        ({"measure": {"embedding": {"eps": [1.0], "attacks": [{"attack": "pdg"}]}}}, "did you mean 'pgd'"),
        ({"measure": {"words": [{"substitutes": "misspellings", "share": 2}]}}, "share 2.0"),
        ({"measure": {"words": [{"substitutes": "thesaurus"}]}}, "no such list"),
        ({"text": "imdb"}, "text data 'imdb'"),
        ({"words": {"min_count": 9999}}, "no word stands 9999 times"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_training(changes, said, data, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "fit", lambda *_, **__: pytest.fail("work had begun"))
    with pytest.raises(InputError, match=said):
        train_text(recipe(tmp_path, data, **changes), tmp_path / "out")


def test_test_labels_the_training_split_lacks_are_refused(tmp_path):
    path = tmp_path / "odd.parquet"
    drawn = Stream(0, "text/split").uniform(torch.arange(60), ())
    labels = [2 if float(share) < 0.2 else k % 2 for k, share in enumerate(drawn)]
    pq.write_table(pa.table({"text": ["one two three"] * 60, "label": labels}), path)
    with pytest.raises(InputError, match="the test split has label 2, the training split 2 classes"):
        train_text(recipe(tmp_path, f"parquet:{path}"), tmp_path / "out")


def test_the_command_line_prints_the_table_and_one_line_errors(data, tmp_path, capsys):
    path = recipe(tmp_path, data, seeds=[0], fit={"epochs": 1})
    assert run(["train", path, "--out", str(tmp_path / "out")]) == 0
    assert "misspellings" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.md").read_text().startswith("| attack | run |")
    assert run(["train", recipe(tmp_path, data, text="imdb"), "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "text data 'imdb'" in said
    assert "Traceback" not in said
    assert run(["train", path, "--seed", "3", "--out", str(tmp_path / "b")]) == 2


@pytest.mark.parametrize("path", sorted(RECIPES.glob("text-*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert load_text_recipe(path).name == path.stem


def flags(*values: int) -> dict[str, torch.Tensor]:
    return {"clean": torch.tensor(values).bool()}


def test_lines_pair_the_sentences_and_average_the_seeds():
    outcomes = {"a": [flags(1, 1, 0, 0), flags(1, 0, 0, 0)], "b": [flags(1, 1, 1, 0), flags(1, 1, 1, 0)]}
    first, second = compare_runs(outcomes, "a", 200)
    assert (first.share, first.seeds, first.n, first.gap) == (0.375, (0.5, 0.25), 4, None)
    assert second.gap == 0.375
    assert second.gap_low <= 0.375 <= second.gap_high
    assert compare_runs(outcomes, None, 100)[1].gap is None
    assert len(words(second)) == len(HEADERS)
    assert to_markdown([first, second]).count("\n") == 4


def test_sign_flips_of_one_seed_are_mcnemars_test():
    for gained, lost in ((14, 4), (30, 25), (3, 0), (0, 0)):
        gaps = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 100)
        exact = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert sign_flips(gaps) == pytest.approx(exact, abs=0.015)


def test_the_bootstrap_covers_a_known_mean():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        low, high = bootstrap((generator.random(200) < 0.3).astype(np.float64), 200)
        inside += low <= 0.3 <= high
    assert 88 <= inside <= 100
