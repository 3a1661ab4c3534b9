"""Which words may stand for which: lists made without labels and without any model that is attacked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError, nearest
from maodun.tasks.text.data import UNKNOWN, Vocabulary

NONE = -1
"""Fills the rows of a table behind the last substitute."""
LISTS = ("misspellings", "neighbours", "wordnet")
_CLASSES = ("adj", "adv", "verb", "noun")


def substitutes(spec: str, vocabulary: Vocabulary, texts: Sequence[str]) -> Tensor:
    """Return the table V x K of substitutes that `spec` names: misspellings, neighbours, wordnet or wordnet:FOLDER.

    Row k holds the numbers of the words that may stand for word k, then NONE. `texts` are those of the training split.
    WordNet is read from $MAODUN_DATA/wordnet unless a folder is given. InputError for another list.
    """
    kind, _, folder = spec.partition(":")
    if spec == "misspellings":
        return misspellings(vocabulary)
    if spec == "neighbours":
        return neighbours(vocabulary, texts)
    if kind == "wordnet":
        return synonyms(vocabulary, Path(folder or Path(os.environ.get("MAODUN_DATA", "")) / "wordnet"))
    raise InputError(f"substitutes '{spec}'", "there is no such list", nearest(spec, list(LISTS)))


def misspellings(vocabulary: Vocabulary, letters: int = 4) -> Tensor:
    """Return a table V x 1 that lets every word of at least `letters` letters become unknown.

    A misspelt word reads the same to a person and is <unk> to a model of whole words. Li et al. (TextBugger, NDSS
    2019) write such bugs out; here any that leaves the vocabulary is taken as given.
    """
    long = [len(word) >= letters and word.isalpha() for word in vocabulary.words]
    allowed = torch.tensor([False, False, *long])
    return torch.where(allowed, UNKNOWN, NONE).unsqueeze(1)


def neighbours(
    vocabulary: Vocabulary,
    texts: Sequence[str],
    *,
    most: int = 8,
    alike: float = 0.45,
    protect: int = 50,
    rare: int = 8,
) -> Tensor:
    """Return a table V x `most` of the words used most alike in `texts`, nearest first.

    A word's vector is its positive pointwise mutual information with the words one and two places before and behind it
    (a column each), reduced to 100 dimensions by a singular value decomposition; alike are cosines of at least `alike`
    in [-1, 1]. The `protect` most frequent words (articles, not, but), those that stand fewer than `rare` times and
    what is not letters stay as they are and stand for nothing. Words used alike are no synonyms: good and bad are
    neighbours, so a person's label may change with the word. Vectors: Levy and Goldberg (NIPS 2014); Levy, Goldberg
    and Dagan (TACL 2015) for the context distribution raised to 3/4. InputError for most < 1.
    """
    if most < 1:
        raise InputError(f"neighbours {most}", "leave nothing to substitute", "ask for 1 or more")
    counted = zip(vocabulary.words, vocabulary.counts, strict=True)
    allowed = torch.tensor([False, False, *(word.isalpha() and n >= rare for word, n in counted)])
    allowed[: 2 + protect] = False
    table = torch.full((len(vocabulary), most), NONE)
    places = allowed.nonzero()[:, 0]
    if places.numel() < 2:
        return table
    vectors = F.normalize(_vectors(vocabulary, texts)[places], dim=1)
    cosines = vectors @ vectors.T
    cosines.fill_diagonal_(-torch.inf)
    values, order = cosines.topk(min(most, places.numel()), dim=1)
    table[places, : order.shape[1]] = places[order].masked_fill(values < alike, NONE)
    return table


def _vectors(vocabulary: Vocabulary, texts: Sequence[str], size: int = 100) -> Tensor:
    """Return V x size float32 vectors of how the words are used; zero for words that never occur."""
    from scipy import sparse
    from scipy.sparse.linalg import svds

    tokens, n = vocabulary.encode(texts).numpy(), len(vocabulary)
    counts: Any = sparse.csr_matrix((n, 2 * n))
    for gap, weight in ((1, 1.0), (2, 0.5)):
        left, right = tokens[:, :-gap].ravel(), tokens[:, gap:].ravel()
        both = (left > UNKNOWN) & (right > UNKNOWN)
        pairs = sparse.csr_matrix((np.full(int(both.sum()), weight), (left[both], right[both])), shape=(n, n))
        counts = counts + sparse.hstack([pairs.T, pairs])
    counts = counts.tocoo()
    words, contexts = np.asarray(counts.sum(1)).ravel(), np.asarray(counts.sum(0)).ravel() ** 0.75
    expected = words[counts.row] * contexts[counts.col] / contexts.sum()
    information = np.maximum(np.log(counts.data / expected), 0.0)
    positive = sparse.csr_matrix((information, (counts.row, counts.col)), shape=counts.shape)
    left, values, _ = svds(positive, k=min(size, n - 1), v0=np.ones(n))
    return torch.from_numpy((left * np.sqrt(values)).astype(np.float32))


def synonyms(vocabulary: Vocabulary, folder: Path, most: int = 12) -> Tensor:
    """Return a table V x K, K <= `most`, of the words that share a meaning in WordNet, most frequent first.

    `folder` holds WordNet's data.adj, data.adv, data.verb and data.noun (those that are there are read). Two words are
    synonyms when one line, a set of synonyms, names both; inflected forms other than the dictionary's have none.
    Miller (1995). InputError when no such file is there.
    """
    files = [file for file in (folder / f"data.{kind}" for kind in _CLASSES) if file.is_file()]
    if not files:
        raise InputError(
            f"WordNet '{folder}'", "holds no data.adj, data.adv, data.verb or data.noun", "give its folder"
        )
    meant: dict[int, set[int]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            known = _known(line, vocabulary)
            for number in known:
                meant.setdefault(number, set()).update(known - {number})
    width = max(1, min(most, max(map(len, meant.values()), default=1)))
    table = torch.full((len(vocabulary), width), NONE)
    for number, words in meant.items():
        # Numbers are ranks by frequency.
        kept = sorted(words)[:width]
        table[number, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return table


def _known(line: str, vocabulary: Vocabulary) -> set[int]:
    """Return the numbers of the single words that a line of WordNet's data files names."""
    parts = line.split(" ")
    if line.startswith(" ") or len(parts) < 6:
        return set()
    words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
    # good(p) is good, only after a noun.
    plain = (word.partition("(")[0].lower() for word in words)
    return {vocabulary.numbers[word] for word in plain if word in vocabulary.numbers}
