"""Sentences become numbers, networks see words and not padding, and substitutes come from texts alone."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import maodun
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.core.verdict import judge
from maodun.tasks.text import (
    EmbeddingSpace,
    TextNet,
    Vocabulary,
    build_text_net,
    load_text,
    load_text_net,
    misspellings,
    neighbours,
    save_text_net,
    substitutes,
    synonyms,
    tokenise,
)

TEXTS = ("a good film", "a bad film", "a good movie , not bad", "the movie is dull", "the film is dull and bad")


def words() -> Vocabulary:
    return Vocabulary.of(TEXTS, min_count=2)


def net(kind: str = "mean", **options) -> TextNet:
    return build_text_net(words().frequencies, kind=kind, width=6, hidden=8, seed=0, **options)


def written(path: Path, texts: list[str | None], labels: list[int]) -> str:
    pq.write_table(pa.table({"text": texts, "label": labels}), path)
    return f"parquet:{path}"


def test_words_are_lower_case_and_contractions_come_apart():
    assert tokenise("It DOESN'T work - it\u2019s dull!") == ["it", "does", "n't", "work", "-", "it", "'s", "dull", "!"]
    assert tokenise("wo n't sit") == ["wo", "n't", "sit"]


def test_the_vocabulary_counts_the_training_words():
    vocabulary = words()
    assert vocabulary.words == ("a", "bad", "film", "dull", "good", "is", "movie", "the")
    assert vocabulary.counts == (3, 3, 3, 2, 2, 2, 2, 2)
    assert vocabulary.unknown == 3
    tokens = vocabulary.encode(["a splendid film", "dull"])
    assert tokens.tolist() == [[2, 1, 4], [5, 0, 0]]
    assert vocabulary.decode(tokens[0]) == "a <unk> film"
    assert vocabulary.encode(["a good film"], 2).tolist() == [[2, 6]]
    frequencies = vocabulary.frequencies
    assert frequencies[0] == 0
    assert float(frequencies.sum()) == pytest.approx(1.0)
    assert float(frequencies[1]) == pytest.approx(3 / 22)


def test_embeddings_have_mean_zero_and_variance_one_over_the_text():
    table, f = net().embedding.table(), words().frequencies.float()
    assert torch.allclose(f @ table, torch.zeros(6), atol=1e-5)
    assert torch.allclose(f @ table.square(), torch.ones(6), atol=1e-4)
    assert bool((table[0] == 0).all())


@pytest.mark.parametrize("kind", ["mean", "lstm"])
def test_padding_changes_no_answer_and_takes_no_offset(kind):
    model = net(kind).eval()
    tokens = words().encode(TEXTS)
    wide = torch.nn.functional.pad(tokens, (0, 5))
    offset = torch.randn(*wide.shape, 6, generator=torch.Generator().manual_seed(0))
    beyond = offset.clone()
    beyond[wide == 0] = 9.0
    assert torch.allclose(model(tokens), model(wide), atol=1e-6)
    assert torch.allclose(model(wide, offset), model(wide, beyond), atol=1e-6)
    assert not torch.allclose(model(wide, offset), model(wide), atol=1e-3)
    one = torch.cat([model(words().encode([text])) for text in TEXTS])
    assert torch.allclose(model(tokens), one, atol=1e-6)


def test_equal_seeds_build_equal_networks_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, again = net("lstm"), net("lstm")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["mean", "lstm"])
def test_the_space_answers_as_the_network_does(kind):
    model, tokens = net(kind).eval(), words().encode(TEXTS)
    space = EmbeddingSpace(model, reach=2.0).eval()
    x = space.enter(tokens)
    assert x.shape == (5, 6, 7)
    assert torch.allclose(space(x), model(tokens), atol=1e-5)
    offset = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[..., :-1] += offset / space.span
    assert torch.allclose(space(moved), model(tokens, offset), atol=1e-4)
    assert float(x[..., :-1].min()) - space.radius(2.0) >= -1e-6
    assert float(x[..., :-1].max()) + space.radius(2.0) <= 1 + 1e-6


def test_attacks_run_on_the_space_and_reach_the_worst_of_a_linear_network():
    """With a body that passes everything on, the margin falls by eps times the gradient's norm, and no further."""
    model = net().eval()
    with torch.no_grad():
        model.body = nn.Linear(6, 6)
        model.body.weight.copy_(torch.eye(6))
        model.body.bias.fill_(20.0)
        model.head = nn.Linear(6, 2)
        model.head.weight.copy_(torch.randn(2, 6, generator=torch.Generator().manual_seed(1)))
        model.head.bias.copy_(-20.0 * model.head.weight.sum(1))
    tokens = words().encode(TEXTS)
    space = EmbeddingSpace(model, reach=9.0)
    x, z = space.enter(tokens), model(tokens)
    y, length = z.argmax(1), (tokens != 0).sum(1)
    lead = (z.amax(1) - z.amin(1)) / (model.head.weight[0] - model.head.weight[1]).norm() * length.sqrt()
    for factor, falls in ((1.02, True), (0.98, False)):
        for k in range(5):
            threat = Threat("l2", space.radius(factor * lead[k].item()))
            oracle = Oracle(space, stochastic=False)
            attack = build_attack("pgd", steps=40)
            found = attack.run(oracle, x[k : k + 1], y[k : k + 1], threat, check_model=False)
            verdict = judge(oracle, found.x_adv, x[k : k + 1], y[k : k + 1], threat)
            assert bool(verdict.valid)
            assert bool(verdict.success) == falls, (k, factor)
            assert torch.equal(found.x_adv[..., -1] > 0.5, x[k : k + 1, :, -1] > 0.5)


def test_the_arena_evaluates_the_space_as_any_model():
    model, tokens = net().eval(), words().encode(TEXTS * 4)
    y = model(tokens).argmax(1)
    space = EmbeddingSpace(model, reach=2.0)
    summary = maodun.evaluate(
        space, (space.enter(tokens), y), norm="l2", eps=[space.radius(0.01), space.radius(2.0)], attack="pgd,deepfool",
        diagnostics=False,
    )  # fmt: skip
    near, far = summary.worst
    assert near.clean.value == 1.0
    assert near.robust.value > far.robust.value


def test_neighbours_are_words_used_alike_and_leave_the_protected_alone():
    places = ("here", "there", "today", "again", "now")
    texts = [
        f"we saw {size} {thing} {place}" for size in ("big", "small") for thing in ("cats", "dogs") for place in places
    ]
    vocabulary = Vocabulary.of(texts, 1)
    table = neighbours(vocabulary, texts, most=2, alike=0.5, protect=2, rare=2)
    number = vocabulary.numbers
    assert set(vocabulary.words[:2]) == {"saw", "we"}
    for word, other in (("big", "small"), ("small", "big"), ("cats", "dogs"), ("dogs", "cats")):
        assert int(table[number[word], 0]) == number[other]
    assert bool((table[[0, 1, number["we"], number["saw"]]] == -1).all())
    assert not bool((table == number["we"]).any())


def test_misspellings_and_synonyms(tmp_path):
    vocabulary = words()
    table = misspellings(vocabulary)
    spelt = [vocabulary.words[k - 2] for k in (table[:, 0] == 1).nonzero()[:, 0].tolist()]
    assert spelt == ["film", "dull", "good", "movie"]
    (tmp_path / "data.adj").write_text(
        "  1 a licence\n00000001 00 s 03 dull 0 bad(p) 0 slow 0 000 | not good\n00000002 00 a 01 good 0 000 | fine\n"
    )
    (tmp_path / "data.noun").write_text("00000003 06 n 02 film 0 movie 0 000 | a picture\n")
    table = synonyms(vocabulary, tmp_path)
    number = vocabulary.numbers
    found = {vocabulary.words[k - 2]: [w for w in table[k].tolist() if w >= 0] for k in range(2, len(vocabulary))}
    expected = {"bad": "dull", "dull": "bad", "film": "movie", "movie": "film"}
    assert found == {word: [number[expected[word]]] if word in expected else [] for word in vocabulary.words}
    assert torch.equal(substitutes(f"wordnet:{tmp_path}", vocabulary, TEXTS), table)


def test_a_network_comes_back_from_its_file_with_its_words(tmp_path):
    for kind in ("mean", "lstm"):
        model = net(kind).eval()
        path = save_text_net(model, words(), tmp_path / f"{kind}.safetensors")
        again, vocabulary = load_text_net(path)
        assert vocabulary == words()
        assert torch.equal(again(words().encode(TEXTS)), model(words().encode(TEXTS)))
        with pytest.raises(InputError, match="the network's own vocabulary"):
            load_text_net(path, Vocabulary.of(TEXTS, 3))
    save_text_net(model, Vocabulary.of(TEXTS, 3), tmp_path / "short.safetensors")
    with pytest.raises(InputError, match="10 embeddings for 5 words"):
        load_text_net(tmp_path / "short.safetensors")


def test_splits_of_a_file_depend_on_the_row_alone(tmp_path):
    spec = written(tmp_path / "t.parquet", [f"text {k}" for k in range(300)], [k % 2 for k in range(300)])
    parts = {split: load_text(spec, split) for split in ("train", "validation", "test")}
    ids = torch.cat([part.ids for part in parts.values()])
    assert sorted(ids.tolist()) == list(range(300))
    assert 180 < len(parts["train"]) < 240
    assert all(text == f"text {k}" for text, k in zip(parts["test"].texts, parts["test"].ids.tolist(), strict=True))
    few = load_text(spec, "test", 10)
    assert len(few) == 10
    assert set(few.ids.tolist()) < set(load_text(spec, "test", 20).ids.tolist())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: load_text("sst3"), "did you mean 'sst2'"),
        (lambda p: load_text(f"parquet:{p}/none.parquet"), "it cannot be read"),
        (lambda p: load_text("sst2", "tset"), "did you mean 'test'"),
        (lambda p: load_text(written(p / "e.parquet", ["fine", "  "], [0, 1])), "row 1 holds no words"),
        (lambda p: load_text(written(p / "n.parquet", ["fine", None], [0, 1])), "row 1 holds no words"),
        (lambda p: load_text(written(p / "l.parquet", ["fine", "bad"], [0, -1])), "row 1 has the label -1"),
        (lambda p: load_text(written(p / "z.parquet", [], [])), "cannot be read|holds no rows"),
        (lambda p: words().encode(["fine", ""]), "sentence 1: holds no words"),
        (lambda p: words().encode([]), "there are none"),
        (lambda p: Vocabulary.of(TEXTS, 9), "no word stands 9 times"),
        (lambda p: net("gru"), "text network 'gru'"),
        (lambda p: EmbeddingSpace(net(), 0.0), "eps 0.0"),
        (lambda p: EmbeddingSpace(net(), 1.0).radius(2.0), "eps 2.0"),
        (lambda p: EmbeddingSpace(net(), 1.0).radius(-1.0), "eps -1.0"),
        (lambda p: substitutes("neighbors", words(), TEXTS), "did you mean 'neighbours'"),
        (lambda p: substitutes(f"wordnet:{p}", words(), TEXTS), "holds no data.adj"),
        (lambda p: neighbours(words(), TEXTS, most=0), "neighbours 0"),
        (lambda p: load_text_net(p / "none.safetensors"), "it cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, said, tmp_path):
    with pytest.raises(InputError, match=said):
        make(tmp_path)


def test_without_the_data_folder_the_remedy_is_named(monkeypatch):
    monkeypatch.delenv("MAODUN_DATA", raising=False)
    with pytest.raises(InputError, match="MAODUN_DATA: is not set"):
        load_text("sst2")


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("MAODUN_DATA"), reason="MAODUN_DATA is not set")
def test_the_real_sets_have_their_published_sizes():
    sizes = {split: len(load_text("sst2", split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 6920, "validation": 872, "test": 1821}
    assert sum(len(load_text("mr", split)) for split in ("train", "validation", "test")) == 10662
