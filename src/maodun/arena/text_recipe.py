"""Recipes of text experiments: one data set, several ways to train the same network, the same attacks on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from maodun.arena.train_recipe import FitSpec, read_recipe
from maodun.attacks.registry import build_attack
from maodun.attacks.text import Substitution
from maodun.core.errors import InputError, nearest
from maodun.defenses.training import EmbeddingAdversarial, EmbeddingNoise, EmbeddingObjective, VirtualAdversarial

OBJECTIVES: dict[str, type[EmbeddingObjective]] = {
    "standard": EmbeddingObjective,
    "noise": EmbeddingNoise,
    "adversarial": EmbeddingAdversarial,
    "virtual": VirtualAdversarial,
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WordsSpec(_Part):
    """The vocabulary: words that stand `min_count` times in the training split; training texts are cut at `length`."""

    min_count: int = Field(default=2, ge=1)
    length: int = Field(default=48, ge=1)


class NetworkSpec(_Part):
    """The arguments of maodun.tasks.text.build_text_net."""

    kind: Literal["mean", "lstm"] = "lstm"
    width: int = Field(default=64, ge=1)
    hidden: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)


class TextFitSpec(FitSpec):
    """The arguments of maodun.defenses.training.FitSettings, with what suits words: AdamW, and few epochs."""

    epochs: int = Field(default=6, ge=1)
    batch_size: int = Field(default=64, ge=1)
    rate: float = Field(default=3e-3, gt=0)
    decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=5.0, gt=0)
    optimiser: Literal["sgd", "adamw"] = "adamw"


class TextRun(_Part):
    """One way to train: an `objective` (standard, noise, adversarial, virtual) and its own options.

    `eps` is the l2 radius over a whole sentence in normalised embeddings, `weight` that of the perturbed term; `xi` and
    `iterations` are for virtual only.
    """

    name: str
    objective: Literal["standard", "noise", "adversarial", "virtual"] = "standard"
    eps: float = 1.0
    weight: float = 1.0
    xi: float | None = None
    iterations: int | None = None

    def build(self, seed: int) -> EmbeddingObjective:
        """Return the objective; InputError for values it refuses, or options it has not."""
        own = {name: value for name in ("xi", "iterations") if (value := getattr(self, name)) is not None}
        if own and self.objective != "virtual":
            raise InputError(f"run '{self.name}'", f"{', '.join(own)} belong to virtual training", "leave them out")
        return OBJECTIVES[self.objective](eps=self.eps, weight=self.weight, seed=seed, **own)


class AttackSpec(_Part):
    """A registered attack on [0, 1] inputs and its options."""

    attack: str = "pgd"
    options: dict[str, Any] = Field(default_factory=dict)


class EmbeddingSpec(_Part):
    """Attacks in the embedding space, within each l2 radius of `eps`; a sentence falls when any of them fells it."""

    eps: tuple[float, ...] = ()
    attacks: tuple[AttackSpec, ...] = (AttackSpec(options={"steps": 20}),)


class SubstitutionSpec(_Part):
    """Word substitution: a list (misspellings, neighbours, wordnet, wordnet:FOLDER) and Substitution's arguments."""

    substitutes: str
    share: float = 0.15
    beam: int = 1

    @property
    def label(self) -> str:
        """A short name, as "neighbours, 15 % of words"."""
        beam = "" if self.beam == 1 else f", beam {self.beam}"
        return f"{self.substitutes.partition(':')[0]}, {100 * self.share:g} % of words{beam}"


class TextMeasure(_Part):
    """What is measured on the test split: clean accuracy, and the accuracy that each attack leaves.

    Clean accuracy is measured on all of it, attacks on `limit` sentences of it, the same for every network (None: all).
    """

    limit: int | None = Field(default=None, ge=1)
    embedding: EmbeddingSpec = EmbeddingSpec()
    words: tuple[SubstitutionSpec, ...] = ()


class TextRecipe(_Part):
    """A text experiment: every run is trained once per seed, attacked, and compared with the run named `reference`.

    `text` is sst2, mr or parquet:FILE. With `labels` only so many training sentences keep their label, drawn by the
    seed; the others are seen without one (only virtual training learns from them). The epoch is chosen by accuracy on
    the validation split. `resamples` draws of the bootstrap over test sentences.
    """

    name: str
    text: str
    seeds: tuple[int, ...] = (0,)
    labels: int | None = Field(default=None, ge=2)
    words: WordsSpec = WordsSpec()
    network: NetworkSpec = NetworkSpec()
    fit: TextFitSpec = TextFitSpec()
    runs: tuple[TextRun, ...]
    reference: str | None = None
    measure: TextMeasure = TextMeasure()
    resamples: int = Field(default=2000, ge=100)

    def check(self, source: str) -> None:
        """Refuse, before any work, what cannot be meant; `source` names the recipe."""
        names = [run.name for run in self.runs]
        if not names or not self.seeds:
            raise InputError(source, "it has no runs or no seeds", "give at least one of each")
        if len(set(names)) < len(names) or len(set(self.seeds)) < len(self.seeds):
            raise InputError(source, "two runs have the same name, or two seeds are equal", "give each its own")
        for run in self.runs:
            run.build(0)
        if self.reference is not None and self.reference not in names:
            raise InputError(f"{source}, reference '{self.reference}'", "is no run", nearest(self.reference, names))
        for eps in self.measure.embedding.eps:
            if not 0 < eps < float("inf"):
                raise InputError(f"{source}, eps {eps}", "is no radius to attack with", "give a positive number")
        for spec in self.measure.embedding.attacks:
            build_attack(spec.attack, **spec.options)
        for words in self.measure.words:
            Substitution(share=words.share, beam=words.beam)


def trains_text(path: str | Path) -> bool:
    """Tell whether the YAML file at `path` describes a text experiment: its top level names a text."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        # Whoever loads it next says what is wrong.
        return False
    return isinstance(content, dict) and "text" in content


def load_text_recipe(path: str | Path) -> TextRecipe:
    """Return the text recipe of a YAML file; InputError names the file, the line and what is wrong."""
    recipe = read_recipe(path, TextRecipe)
    recipe.check(f"recipe '{path}'")
    return recipe
