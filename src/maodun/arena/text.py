"""The text experiment: train every run for every seed, attack each network, and keep who was left standing.

A second start in the same folder makes only what is missing; a training that was stopped goes on.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maodun.arena.text_compare import Line, compare_runs
from maodun.arena.text_recipe import EmbeddingSpec, SubstitutionSpec, TextRecipe, TextRun, load_text_recipe
from maodun.attacks.registry import build_attack
from maodun.attacks.text import Substitution
from maodun.core.errors import InputError
from maodun.core.files import write_whole
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge
from maodun.defenses.training import FitSettings, Trim, fit
from maodun.defenses.training.embedding import UNLABELLED
from maodun.tasks.text import (
    EmbeddingSpace,
    Sentences,
    TextNet,
    Vocabulary,
    build_text_net,
    load_text,
    load_text_net,
    save_text_net,
    substitutes,
)

Say = Callable[[dict[str, float | str]], None]


def train_text(
    recipe: TextRecipe | str | Path, out: str | Path, *, say: Say = lambda _: None, resume: bool = True
) -> list[Line]:
    """Train, attack and compare what a recipe describes in the folder `out`, and return the table's lines.

    Per run and seed: RUN-SEED.safetensors (network and words) and RUN-SEED.outcomes.safetensors (whether each test
    sentence stands under each attack); results.json holds the lines. `say` gets a line per epoch and per attack.
    `resume` False makes all of it anew. Errors: InputError for a recipe, data or a folder that cannot be used.
    """
    if isinstance(recipe, TextRecipe):
        described = recipe
        described.check(f"recipe '{recipe.name}'")
    else:
        described = load_text_recipe(recipe)
    folder = Path(out)
    _claim(folder, described, resume)
    stage = _Stage(described, folder, say)
    for seed in described.seeds:
        for run in described.runs:
            if not (folder / f"{run.name}-{seed}.outcomes.safetensors").exists():
                stage.make(run, seed)
    lines = compare_text(described, folder)
    text = json.dumps({"recipe": described.model_dump(mode="json"), "lines": [vars(line) for line in lines]}, indent=1)
    write_whole(folder / "results.json", text.encode())
    return lines


def compare_text(recipe: TextRecipe, folder: Path) -> list[Line]:
    """Return the lines of the table from the outcomes that lie in `folder`."""
    from safetensors.torch import load_file

    outcomes = {
        run.name: [load_file(folder / f"{run.name}-{seed}.outcomes.safetensors") for seed in recipe.seeds]
        for run in recipe.runs
    }
    return compare_runs(outcomes, recipe.reference, recipe.resamples)


def _claim(folder: Path, recipe: TextRecipe, resume: bool) -> None:
    """Make the folder; refuse one that holds another experiment (runs and seeds may be added)."""
    text = json.dumps(recipe.model_dump(mode="json", exclude={"runs", "seeds", "reference", "resamples"}))
    manifest = folder / "manifest.json"
    runs = {run.name: run.model_dump(mode="json") for run in recipe.runs}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _held(manifest)
        if held is None:
            raise InputError(f"folder '{folder}'", "holds a run of another kind", "choose another")
        if not resume:
            for file in _files(folder, {*held["runs"], *runs}):
                file.unlink(missing_ok=True)
            held["what"] = ""
    except (OSError, ValueError) as error:
        raise InputError(f"folder '{folder}'", f"cannot be used ({error})", "choose another") from error
    if not held["what"]:
        held = {"what": text, "runs": {}}
    changed = [name for name, run in runs.items() if held["runs"].get(name, run) != run]
    if held["what"] != text or changed:
        what = f"run '{changed[0]}'" if changed else "the recipe"
        raise InputError(f"folder '{folder}'", f"was begun with {what} otherwise", "choose another, or --restart")
    write_whole(manifest, json.dumps({"what": text, "runs": held["runs"] | runs}).encode())


def _held(manifest: Path) -> dict[str, Any] | None:
    """Return what a manifest says of the experiment begun here: empty where there is none, None for another's."""
    if not manifest.exists():
        return {"what": "", "runs": {}}
    content = json.loads(manifest.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) and {"what", "runs"} <= content.keys() else None


def _files(folder: Path, runs: set[str]) -> list[Path]:
    """Return the files that an experiment of these runs has made here; a folder may hold other things as well."""
    ours = re.compile(rf"({'|'.join(map(re.escape, runs))})-\d+\.(ckpt|safetensors|outcomes\.safetensors)")
    return [file for file in folder.iterdir() if ours.fullmatch(file.name)]


@dataclass
class _Stage:
    """The data of a recipe, and what is done with it for one run and seed."""

    recipe: TextRecipe
    folder: Path
    say: Say

    @cached_property
    def splits(self) -> dict[str, Sentences]:
        return {split: load_text(self.recipe.text, split) for split in ("train", "validation", "test")}

    @cached_property
    def classes(self) -> int:
        """The number of classes; the training split must know all of them."""
        most = int(self.splits["train"].y.max()) + 1
        for split, sentences in self.splits.items():
            if int(sentences.y.max()) >= most:
                reason = f"the {split} split has label {int(sentences.y.max())}, the training split {most} classes"
                raise InputError(f"text data '{self.recipe.text}'", reason, "train on all classes")
        return max(2, most)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.splits["train"].texts, self.recipe.words.min_count)

    @cached_property
    def attacked(self) -> Tensor:
        """The rows of the test split that attacks are measured on."""
        test = self.splits["test"]
        kept = test.take(self.recipe.measure.limit).ids
        return torch.isin(test.ids, kept).nonzero()[:, 0]

    def encoded(self, split: str) -> Tensor:
        return self.vocabulary.encode(self.splits[split].texts, self.recipe.words.length if split == "train" else None)

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """The substitutes of every list that the recipe names."""
        names = dict.fromkeys(spec.substitutes for spec in self.recipe.measure.words)
        return {name: substitutes(name, self.vocabulary, self.splits["train"].texts) for name in names}

    def make(self, run: TextRun, seed: int) -> None:
        """Train one network, from its checkpoint where there is one, attack it, and write both."""
        _ = self.classes, self.tables  # refused before any training
        place = self.folder / f"{run.name}-{seed}.safetensors"
        if not place.exists():
            save_text_net(self.train(run, seed), self.vocabulary, place)
            (self.folder / f"{run.name}-{seed}.ckpt").unlink(missing_ok=True)
        net, _ = load_text_net(place, self.vocabulary)
        from safetensors.torch import save

        found = self.measure(net, seed, f"{run.name}-{seed}")
        write_whole(self.folder / f"{run.name}-{seed}.outcomes.safetensors", save(found))

    def train(self, run: TextRun, seed: int) -> TextNet:
        """Return the network of the epoch that answers most validation sentences rightly."""
        recipe, net = self.recipe, self.recipe.network
        model = build_text_net(
            self.vocabulary.frequencies, kind=net.kind, width=net.width, hidden=net.hidden, classes=self.classes,
            dropout=net.dropout, seed=seed,
        )  # fmt: skip
        held, truth = self.encoded("validation"), self.splits["validation"].y
        began = time.process_time()

        def tell(line: dict[str, float]) -> None:
            self.say({"run": f"{run.name}-{seed}", **line})

        fit(
            model, self.encoded("train"), self.labels(seed), run.build(seed), FitSettings(**recipe.fit.model_dump()),
            validate=lambda network: float(right(network, held, truth).float().mean()), augment=Trim(), seed=seed,
            checkpoint=self.folder / f"{run.name}-{seed}.ckpt",
            label=recipe.model_dump_json(include={"text", "labels", "words", "network"}) + run.model_dump_json(),
            on_epoch=tell,
        )  # fmt: skip
        self.say({"run": f"{run.name}-{seed}", "trained": "yes", "cpu seconds": time.process_time() - began})
        return model

    def labels(self, seed: int) -> Tensor:
        """Return the training labels, UNLABELLED where the recipe hides them."""
        train, kept = self.splits["train"], self.recipe.labels
        if kept is None or kept >= len(train):
            return train.y
        shown = Stream(seed, "text/labels").words(train.ids, 1)[:, 0].argsort(stable=True)[:kept]
        hidden = torch.full_like(train.y, UNLABELLED)
        hidden[shown] = train.y[shown]
        return hidden

    def measure(self, net: TextNet, seed: int, name: str) -> dict[str, Tensor]:
        """Return per attack and sentence whether the network still answers rightly (bool).

        Clean accuracy is that of the whole split; the validation split's is there to choose a radius by.
        """
        tokens, y, rows = self.encoded("test"), self.splits["test"].y, self.attacked
        found = {
            "clean": right(net, tokens, y),
            "validation": right(net, self.encoded("validation"), self.splits["validation"].y),
        }
        spec = self.recipe.measure.embedding
        for eps in spec.eps:
            began = time.process_time()
            found[f"embedding, eps {eps:g}"] = embedding_robust(
                net, tokens[rows], y[rows], eps, spec, seed=seed, ids=self.splits["test"].ids[rows]
            )
            self.say({"run": name, "attack": f"embedding {eps:g}", "cpu seconds": time.process_time() - began})
        for each in self.recipe.measure.words:
            began = time.process_time()
            found[each.label] = words_robust(net, tokens[rows], y[rows], each, self.tables[each.substitutes])
            self.say({"run": name, "attack": each.label, "cpu seconds": time.process_time() - began})
        return found


def right(net: torch.nn.Module, tokens: Tensor, y: Tensor) -> Tensor:
    """Return (N,) booleans: the network, in evaluation mode, answers y."""
    place = next(net.parameters()).device
    with torch.no_grad():
        answers = torch.cat([net(part.to(place)) for part in torch.split(tokens, 256)])
    return answers.argmax(1).cpu() == y


def embedding_robust(
    net: TextNet, tokens: Tensor, y: Tensor, eps: float, spec: EmbeddingSpec, *, seed: int, ids: Tensor
) -> Tensor:
    """Return (N,) booleans: no attack of `spec` fells the sentence within l2 `eps` of its embeddings.

    Every candidate is judged anew. `ids` (N,) key the random starts.
    """
    space = EmbeddingSpace(net, eps)
    x, threat = space.enter(tokens), Threat("l2", space.radius(eps))
    oracle = Oracle(space, stochastic=False)
    standing = torch.ones_like(y, dtype=torch.bool)
    for each in spec.attacks:
        attack = build_attack(each.attack, **each.options)
        found = attack.run(oracle, x, y, threat, seed=seed, ids=ids, check_model=False)
        standing &= ~judge(oracle, found.x_adv, x, y, threat, seed=seed, ids=ids).success
    return standing


def words_robust(net: TextNet, tokens: Tensor, y: Tensor, spec: SubstitutionSpec, table: Tensor) -> Tensor:
    """Return (N,) booleans: word substitution does not fell the sentence; judged anew."""
    return ~Substitution(share=spec.share, beam=spec.beam).run(net, tokens, y, table).success
