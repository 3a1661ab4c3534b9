"""Small text classifiers that let a training objective or an attack add something to their word embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.context import noise
from maodun.core.errors import InputError, nearest
from maodun.tasks.text.data import PAD

KINDS = ("mean", "lstm")


class WordEmbedding(nn.Module):
    """Embeddings of mean zero and variance one over the training text, so that a radius in them means something.

        v'_k = (v_k - E v) / sqrt(Var v),  E v = sum_j f_j v_j,  Var v = sum_j f_j (v_j - E v)^2

    with the words' frequencies f, each dimension on its own; without it a network could answer any bounded
    perturbation by longer embeddings. Padding is the zero vector. `frequencies` (V,), `width` D.
    Miyato, Dai and Goodfellow, ICLR 2017, equation 1.
    """

    def __init__(self, frequencies: Tensor, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(frequencies.shape[0], width))
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies.float())

    def table(self) -> Tensor:
        """Return the normalised embeddings V x D; the row of padding is zero."""
        mean = self.frequencies @ self.weight
        apart = self.weight - mean
        table = apart * (self.frequencies @ apart.square() + 1e-12).rsqrt()
        rest = torch.ones(table.shape[0], 1, dtype=table.dtype, device=table.device)
        rest[PAD] = 0.0
        return table * rest

    def forward(self, tokens: Tensor) -> Tensor:
        """Return N x L x D embeddings of N x L word numbers."""
        return F.embedding(tokens, self.table())


class KeyedDropout(nn.Module):
    """Dropout of whole embedding dimensions or features of a sample, the same at every word (Gal, 2016).

    Draws are keyed by sample and step inside a context.draw and come from torch's generator outside of one.
    """

    def __init__(self, share: float, purpose: str) -> None:
        super().__init__()
        self.share, self.purpose = share, purpose

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N x D or N x L x D) with a share of its dimensions zero and the others scaled up, in train mode."""
        if not self.training or self.share == 0:
            return x
        kept = noise(x, self.purpose).uniform((x.shape[-1],)) >= self.share
        scale = kept.to(x.dtype) / (1.0 - self.share)
        return x * (scale if x.ndim == 2 else scale.unsqueeze(1))


class TextNet(nn.Module):
    """Word numbers N x L (0 is padding) to logits N x C: embedding, body, head.

    `kind` of body: "mean" (mean embedding, one hidden layer; word order is lost) or "lstm" (one layer in both
    directions, mean over the sentence). `frequencies` (V,) are the words' shares of the training text; `width` of the
    embeddings, `hidden` features, `dropout` share of embedding dimensions and features. Padding never changes an
    answer. InputError for an unknown kind.
    """

    def __init__(
        self,
        frequencies: Tensor,
        *,
        kind: str = "lstm",
        width: int = 64,
        hidden: int = 64,
        classes: int = 2,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"text network '{kind}'", "there is none of that name", nearest(kind, list(KINDS)))
        self.kind, self.width, self.classes = kind, width, classes
        self.embedding = WordEmbedding(frequencies, width)
        self.drop_words, self.drop_features = KeyedDropout(dropout, "words"), KeyedDropout(dropout, "features")
        self.body: nn.Module = nn.Linear(width, hidden)
        if kind == "lstm":
            self.body = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(hidden if kind == "mean" else 2 * hidden, classes)

    def forward(self, tokens: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return logits; `offset` (N x L x D) is added to the embeddings where there is a word."""
        there = (tokens != PAD).unsqueeze(2)
        embedded = self.drop_words(self.embedding(tokens))
        return self.of_embeddings(embedded if offset is None else embedded + offset, there)

    def of_embeddings(self, embedded: Tensor, there: Tensor) -> Tensor:
        """Return the logits of N x L x D embeddings; `there` (N x L x 1) booleans: a word stands here."""
        count = there.sum(1).clamp(min=1)
        embedded = embedded * there
        if self.kind == "mean":
            features = F.relu(self.body(embedded.sum(1) / count))
        else:
            features = self._recurrent(embedded, there, count)
        logits: Tensor = self.head(self.drop_features(features))
        return logits

    def _recurrent(self, embedded: Tensor, there: Tensor, count: Tensor) -> Tensor:
        lengths = count[:, 0].cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.body(packed)[0], batch_first=True, total_length=embedded.shape[1]
        )
        return (states * there).sum(1) / count


def build_text_net(
    frequencies: Tensor,
    *,
    kind: str = "lstm",
    width: int = 64,
    hidden: int = 64,
    classes: int = 2,
    dropout: float = 0.5,
    seed: int = 0,
) -> TextNet:
    """Return a freshly initialised TextNet in train mode; equal seeds give equal weights.

    Embeddings are standard normal, other matrices normal with variance 1 / inputs (2 / inputs before a ReLU), biases 0,
    the head a tenth of that: the largest of many answers is far from zero, and the first loss should be near log C.
    """
    with torch.random.fork_rng(devices=[]):
        net = TextNet(frequencies, kind=kind, width=width, hidden=hidden, classes=classes, dropout=dropout)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if name == "embedding.weight":
            nn.init.normal_(parameter, std=0.1, generator=generator)
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
        else:
            straight = kind == "lstm" or name.startswith("head")
            nn.init.kaiming_normal_(parameter, nonlinearity="linear" if straight else "relu", generator=generator)
    with torch.no_grad():
        net.head.weight.mul_(0.1)
    return net
