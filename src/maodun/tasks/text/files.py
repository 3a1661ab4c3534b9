"""A text network in one file: weights, words, and what is needed to build it again."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from maodun.core.errors import InputError
from maodun.core.files import write_whole
from maodun.tasks.text.data import Vocabulary
from maodun.tasks.text.nets import TextNet


def save_text_net(net: TextNet, vocabulary: Vocabulary, path: str | Path) -> Path:
    """Write `net` with its words and their counts as safetensors, whole or not at all, and return the path."""
    from safetensors.torch import save

    hidden = net.head.in_features // (1 if net.kind == "mean" else 2)
    about = {"kind": net.kind, "width": net.width, "hidden": hidden, "classes": net.classes}
    words = {"words": vocabulary.words, "counts": vocabulary.counts, "unknown": vocabulary.unknown}
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    return write_whole(path, save(state, {"network": json.dumps(about), "vocabulary": json.dumps(words)}))


def load_text_net(path: str | Path, vocabulary: Vocabulary | None = None) -> tuple[TextNet, Vocabulary]:
    """Return the network of a file, in evaluation mode, and its vocabulary.

    InputError when the file is not there or not one of save_text_net's, when its words and its embeddings differ in
    number, and when a `vocabulary` is given that is not the network's: its numbers would mean other words.
    """
    from safetensors import SafetensorError, safe_open

    thing = f"text network '{path}'"
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        words = json.loads(about["vocabulary"])
        own = Vocabulary(tuple(words["words"]), tuple(words["counts"]), int(words["unknown"]))
        options = json.loads(about["network"])
    except (OSError, SafetensorError) as error:
        raise InputError(thing, f"it cannot be read ({error})", "check the path") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(thing, "it holds no words and no network", "give a file that maodun train made") from error
    if vocabulary is not None and vocabulary.sha256 != own.sha256:
        reason = f"it knows {len(own.words)} words, the given vocabulary {len(vocabulary.words)}, and they differ"
        raise InputError(thing, reason, "encode the texts with the network's own vocabulary")
    embeddings = state.get("embedding.weight", torch.zeros(0)).shape[0]
    if embeddings != len(own):
        raise InputError(thing, f"it has {embeddings} embeddings for {len(own)} words", "save it again")
    net = TextNet(own.frequencies, dropout=0.0, **options)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(thing, f"its weights do not fit ({str(error).splitlines()[0]})", "save it again") from error
    return net.eval(), own
