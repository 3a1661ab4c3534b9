"""Labelled sentences and the words they are made of: reading, splitting into words, numbering the words."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maodun.core.errors import InputError, nearest
from maodun.core.streams import Stream

PAD, UNKNOWN = 0, 1
"""The numbers of no word at all, and of a word that the vocabulary lacks."""
NAMED = ("sst2", "mr")
SPLITS = ("train", "validation", "test")
_SHARES = {"test": (0.0, 0.2), "validation": (0.2, 0.3), "train": (0.3, 1.0)}
# n't is a word of its own, as the Penn treebank has it: "not" in every contraction.
_WORDS = re.compile(r"\w+(?=n't)|n't|'\w+|\w+|[^\w\s]")


def tokenise(text: str) -> list[str]:
    """Return the lower-case words and punctuation marks of a sentence; don't becomes do and n't."""
    return _WORDS.findall(text.lower().replace("\u2019", "'"))


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences: `texts`, `y` int64 (N,) classes, `ids` int64 (N,) positions in the source file."""

    name: str
    texts: tuple[str, ...]
    y: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, n: int | None) -> Sentences:
        """Return `n` sentences drawn once and for all by their ids (all for None), in order of position."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise InputError(f"limit {n}", "no sentences measure nothing", "ask for 1 or more")
        drawn = Stream(0, "text/take").words(self.ids, 1)[:, 0].argsort(stable=True)[:n].sort().values
        return self.rows(drawn)

    def rows(self, rows: Tensor) -> Sentences:
        """Return the sentences at `rows` (positions)."""
        texts = tuple(self.texts[row] for row in rows.tolist())
        return replace(self, texts=texts, y=self.y[rows], ids=self.ids[rows])


@dataclass(frozen=True)
class Vocabulary:
    """The words a model knows: `words[k]` has number k + 2 and stands `counts[k]` times in the training split.

    Number 0 is padding, 1 an unknown word. Most frequent words first, ties in the order of the alphabet.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]
    unknown: int = 0

    @staticmethod
    def of(texts: Sequence[str], min_count: int = 2) -> Vocabulary:
        """Return the words that stand at least `min_count` times in `texts`, which must be training texts only.

        `unknown` counts the rest. InputError when no word is that frequent.
        """
        counted = Counter(word for text in texts for word in tokenise(text))
        kept = sorted(((-n, word) for word, n in counted.items() if n >= min_count))
        if not kept:
            raise InputError("vocabulary", f"no word stands {min_count} times in the texts", "lower min_count")
        rest = sum(n for n in counted.values() if n < min_count)
        return Vocabulary(tuple(word for _, word in kept), tuple(-n for n, _ in kept), rest)

    def __len__(self) -> int:
        return len(self.words) + 2

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of every word."""
        return {word: number for number, word in enumerate(self.words, start=2)}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the words in their order."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    @property
    def frequencies(self) -> Tensor:
        """Shares (V,) of every number in the training texts, float64; padding has none."""
        counts = torch.tensor([0, max(1, self.unknown), *self.counts], dtype=torch.float64)
        return counts / counts.sum()

    def encode(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Return int64 N x L word numbers, padded behind; L is `length`, or that of the longest sentence.

        Longer sentences lose their end. InputError for no sentences, or one without a word (it names which).
        """
        split = [tokenise(text) for text in texts]
        for place, words in enumerate(split):
            if not words:
                raise InputError(f"sentence {place}", "holds no words", "leave it out")
        if not split:
            raise InputError("texts", "there are none", "give at least one sentence")
        width = length or max(map(len, split))
        numbers = torch.zeros(len(split), width, dtype=torch.int64)
        for row, words in enumerate(split):
            known = [self.numbers.get(word, UNKNOWN) for word in words[:width]]
            numbers[row, : len(known)] = torch.tensor(known)
        return numbers

    def decode(self, numbers: Tensor) -> str:
        """Return the words of one row of numbers, <unk> for an unknown one."""
        return " ".join("<unk>" if k == UNKNOWN else self.words[k - 2] for k in numbers.tolist() if k != PAD)


def load_text(spec: str, split: str = "test", limit: int | None = None) -> Sentences:
    """Return the sentences of a data set: `sst2` (its own splits), `mr`, or `parquet:FILE` with text and label.

    `split` is train, validation or test. mr and files have no splits: each row falls into one by a draw that depends on
    its position alone (.7, .1, .2). `sst2` and `mr` lie under $MAODUN_DATA/text. Sources: SST-2, Socher et al. (2013);
    MR, Pang and Lee (2005). InputError for an unknown name or split, or a file that cannot be read.
    """
    if split not in SPLITS:
        raise InputError(f"split '{split}'", "there is none of that name", nearest(split, list(SPLITS)))
    kind, _, place = spec.partition(":")
    if kind == "parquet" and place:
        whole = _read(Path(place).expanduser(), spec)
    elif spec == "sst2":
        name = {"train": "train", "validation": "dev", "test": "test"}[split]
        return _read(_shelf(f"sst2_{name}.parquet"), spec).take(limit)
    elif spec == "mr":
        whole = _read(_shelf("mr_rt_polarity.parquet"), spec)
    else:
        raise InputError(f"text data '{spec}'", "there is none of that name", nearest(spec, [*NAMED, "parquet:FILE"]))
    low, high = _SHARES[split]
    drawn = Stream(0, "text/split").uniform(whole.ids, ())
    rows = ((drawn >= low) & (drawn < high)).nonzero()[:, 0]
    if not rows.numel():
        raise InputError(f"text data '{spec}'", f"no row falls into the {split} split", "give more rows")
    return whole.rows(rows).take(limit)


def _shelf(name: str) -> Path:
    place = os.environ.get("MAODUN_DATA")
    if not place:
        raise InputError("MAODUN_DATA", "is not set", "export MAODUN_DATA=/path/of/the/data, or give parquet:FILE")
    return Path(place).expanduser() / "text" / name


def _read(path: Path, spec: str) -> Sentences:
    import pyarrow as pa
    import pyarrow.parquet as pq

    thing = f"text data '{path}'"
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=["text", "label"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(thing, f"it cannot be read ({error})", "give Parquet with columns text and label") from error
    if not rows:
        raise InputError(thing, "it holds no rows", "give at least one")
    for place, row in enumerate(rows):
        if not isinstance(row["text"], str) or not tokenise(row["text"]):
            raise InputError(thing, f"row {place} holds no words", "leave it out")
        if not isinstance(row["label"], int) or row["label"] < 0:
            raise InputError(thing, f"row {place} has the label {row['label']}", "give whole numbers from 0")
    texts, labels = tuple(row["text"] for row in rows), torch.tensor([row["label"] for row in rows])
    return Sentences(spec, texts, labels, torch.arange(len(rows)))
