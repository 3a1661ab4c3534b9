"""Several defences as one: what the input passes first stands first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense


class Stack(Defense):
    """The defences `parts` one behind the other, the first nearest to the input, the classifier behind the last.

    `wrap(model)` lets every part wrap what stands behind it, so parts that change the classifier, answer for it or
    refuse to answer may stand among those that change the input. As a map of inputs it is the parts' composition. What
    it is worth to an attacker the parts declare themselves. InputError for no part, the same name twice (equal names
    would draw equal noise), two that draw the same noise, a part that may refuse to answer anywhere but first, and one
    that changes the classifier itself anywhere but last.
    """

    name = "stack"
    parts: nn.ModuleList

    def __init__(self, parts: Sequence[Defense]) -> None:
        super().__init__()
        refuse_incompatible(parts)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs after every part."""
        for part in self.parts:
            x = part(x)
        return x

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the inputs after every part's stand-in."""
        for part in self._defenses:
            x = part.bpda_partner(x)
        return x

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the classifier behind all parts."""
        for part in reversed(self._defenses):
            model = part.wrap(model)
        return model

    @property
    def _defenses(self) -> list[Defense]:
        return [part for part in self.parts if isinstance(part, Defense)]


def refuse_incompatible(parts: Sequence[Defense]) -> None:
    """Raise InputError for parts that cannot stand in this order."""
    names = [part.name for part in parts]
    thing = f"stack {' > '.join(names)}"
    if not parts:
        raise InputError("stack", "holds no defence", "name at least one")
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise InputError(thing, f"'{twice}' stands in it twice", "keep one of them")
    drawn = [part.noise_of or part.name for part in parts]
    place = next((place for place, noise in enumerate(drawn) if noise in drawn[:place]), None)
    if place is not None:
        first = names[drawn.index(drawn[place])]
        raise InputError(thing, f"'{names[place]}' draws the very noise of '{first}'", "keep one of them")
    for place, part in enumerate(parts):
        if part.spec.may_reject and place > 0:
            reason = f"'{part.name}' may refuse to answer and stands behind '{names[place - 1]}'"
            raise InputError(thing, reason, "put what refuses first: detect, purify, preprocess")
        if part.innermost and place + 1 < len(parts):
            reason = f"'{part.name}' changes the classifier itself and stands before '{names[place + 1]}'"
            raise InputError(thing, reason, f"put '{part.name}' last")


__all__ = ["Stack", "refuse_incompatible"]
