"""Word substitution: the few words whose replacement hurts most, found by trying every one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.losses import margin
from maodun.core.modes import evaluation_mode

_PAD = 0
_HASH = 1_000_003


@dataclass(frozen=True)
class Substituted:
    """What a search hands to the verdict, one row per sentence.

    `tokens` N x L; `success` (N,): inside the threat and misread when scored anew, clean mistakes included; `changed`
    (N,) words replaced; `queries` (N,) sentences shown to the model by the search.
    """

    tokens: Tensor
    success: Tensor
    changed: Tensor
    queries: Tensor


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """Replace up to a share of a sentence's words, each by a word of its row in a table, so that the model misreads it.

    At every step each replacement of each word not yet replaced is tried on the sentences kept so far, and the `beam`
    (>= 1; 1 is greedy) with the largest margin of a wrong class over y are kept; a sentence is left once misread. A
    sentence of W words allows max(1, floor(`share` W)) replacements, `share` in (0, 1]. Every candidate is a query:
    `batch_size` of them (>= 1) pass through the model at once. No gradient is used, so none can be masked; that greedy
    search finds nothing proves nothing (its answer is an upper bound of robust accuracy). InputError for other values.
    After TextFooler (Jin et al., AAAI 2020), with all positions tried at each step instead of one ranking of them.
    """

    share: float = 0.15
    beam: int = 1
    batch_size: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share {self.share}", "is no share of words", "give a number in (0, 1], as 0.15")
        for name in ("beam", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}", "must be at least 1", "give a positive number")

    def run(self, model: nn.Module, tokens: Tensor, y: Tensor, table: Tensor) -> Substituted:
        """Attack sentences `tokens` (int64 N x L, 0 is padding) with labels `y` (N,), and score what was found.

        `table` (int64 V x K) holds in row k the word numbers that may stand for word k; negative entries are none.
        """
        check_words(tokens, table)
        found = tokens.clone()
        queries = torch.zeros_like(y)
        budget = self.budget(tokens)
        with evaluation_mode(model), torch.no_grad():
            clean = self._margins(model, tokens, y)
            queries += 1
            rows = (clean <= 0).nonzero()[:, 0]
            beams = tokens[rows].unsqueeze(1)
            for step in range(int(budget.max()) if budget.numel() else 0):
                open_ = budget[rows] > step
                rows, beams = rows[open_], beams[open_]
                if not rows.numel():
                    break
                beams, best, asked = self._widen(model, beams, tokens[rows], y[rows], table)
                queries[rows] += asked
                found[rows] = beams[:, 0]
                rows, beams = rows[best <= 0], beams[best <= 0]
        success, changed = self.judge(model, found, tokens, y, table)
        return Substituted(found, success, changed, queries)

    def budget(self, tokens: Tensor) -> Tensor:
        """Return (N,) how many words of each sentence may be replaced."""
        # A hair above: a fifth of 15 words is 3, in floating point a little less.
        return ((tokens != _PAD).sum(1) * self.share + 1e-9).long().clamp(min=1)

    def judge(self, model: nn.Module, found: Tensor, tokens: Tensor, y: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return (success, words changed), both (N,), of candidates scored anew; one outside the threat counts clean.

        Inside is what changes at most the budget of words, and each into one its table row allows.
        """
        differs = found != tokens
        allowed = (table[tokens] == found.unsqueeze(2)).any(2)
        inside = (allowed | ~differs).all(1) & (differs.sum(1) <= self.budget(tokens))
        scored = torch.where(inside.unsqueeze(1), found, tokens)
        with evaluation_mode(model), torch.no_grad():
            return self._margins(model, scored, y) > 0, (scored != tokens).sum(1)

    def _widen(
        self, model: nn.Module, beams: Tensor, tokens: Tensor, y: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best beams (n x W x L) one replacement further, the best margins (n,), and queries (n,)."""
        n, width, length = beams.shape
        options = table[tokens].unsqueeze(1).expand(n, width, length, -1)
        may = (options >= 0) & (options != tokens[:, None, :, None]) & (beams == tokens.unsqueeze(1)).unsqueeze(3)
        scores = torch.full((n, width * length * table.shape[1]), -torch.inf, device=tokens.device)
        for row, beam, place, choice in self._parts(may):
            candidates = beams[row, beam]
            candidates[torch.arange(len(row), device=row.device), place] = options[row, beam, place, choice]
            spot = (beam * length + place) * table.shape[1] + choice
            scores[row, spot] = margin(model(candidates), y[row]).float()
        kept = min(self.beam * width, scores.shape[1])
        values, spots = scores.topk(kept, dim=1)
        source = spots // (length * table.shape[1])
        place, choice = spots // table.shape[1] % length, spots % table.shape[1]
        each = torch.arange(n, device=tokens.device).unsqueeze(1)
        made = beams[each, source]
        new = options[each, source, place, choice]
        # Where nothing is left to replace the sentence stays as it is.
        possible = torch.isfinite(values)
        made = torch.where(
            possible.unsqueeze(2), made.scatter(2, place.unsqueeze(2), new.unsqueeze(2)), beams[:, :1].expand_as(made)
        )
        if self.beam > 1:
            made, values = self._distinct(made, values)
        return made, values[:, 0], may.flatten(1).sum(1)

    def _distinct(self, made: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best `beam` different sentences of each row, best first (two beams may meet in one)."""
        powers = torch.ones(made.shape[2], dtype=torch.int64, device=made.device)
        powers[1:] = _HASH
        marks = (made * powers.cumprod(0)).sum(2)
        same = (marks.unsqueeze(2) == marks.unsqueeze(1)).tril(-1).any(2)
        values = values.masked_fill(same, -torch.inf)
        values, order = values.sort(dim=1, descending=True, stable=True)
        order = order[:, : self.beam]
        return made.gather(1, order.unsqueeze(2).expand(-1, -1, made.shape[2])), values

    def _parts(self, may: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the places of true entries, `batch_size` at a time, as index tensors (one per axis)."""
        for part in torch.split(may.nonzero(), self.batch_size):
            yield part.unbind(1)

    def _margins(self, model: nn.Module, tokens: Tensor, y: Tensor) -> Tensor:
        """Return (N,) how far the best wrong class is ahead of y."""
        parts = zip(torch.split(tokens, self.batch_size), torch.split(y, self.batch_size), strict=True)
        return torch.cat([margin(model(part), labels) for part, labels in parts])


def check_words(tokens: Tensor, table: Tensor) -> None:
    """Raise InputError unless `tokens` is N x L with at least one word a row, all words having a row in `table`."""
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise InputError("sentences", f"are {tuple(tokens.shape)} of {tokens.dtype}", "give word numbers N x L")
    empty = ((tokens != _PAD).sum(1) == 0).nonzero()[:, 0]
    if empty.numel():
        raise InputError(f"sentence {int(empty[0])}", "holds no words", "leave it out")
    if tokens.numel() and int(tokens.max()) >= table.shape[0]:
        raise InputError(
            "substitutes",
            f"have rows for {table.shape[0]} words, a sentence holds word number {int(tokens.max())}",
            "make them for the vocabulary that the sentences are written in",
        )
