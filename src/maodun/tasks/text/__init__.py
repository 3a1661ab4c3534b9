"""Text classification: sentences, words, small networks over word embeddings, and the space those embeddings span."""

from __future__ import annotations

from maodun.tasks.text.data import Sentences, Vocabulary, load_text, tokenise
from maodun.tasks.text.files import load_text_net, save_text_net
from maodun.tasks.text.nets import TextNet, build_text_net
from maodun.tasks.text.space import EmbeddingSpace
from maodun.tasks.text.substitutes import misspellings, neighbours, substitutes, synonyms

__all__ = [
    "EmbeddingSpace",
    "Sentences",
    "TextNet",
    "Vocabulary",
    "build_text_net",
    "load_text",
    "load_text_net",
    "misspellings",
    "neighbours",
    "save_text_net",
    "substitutes",
    "synonyms",
    "tokenise",
]
