"""What a recipe may say of a shield: a model or several, and the defences around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DefensePart(_Part):
    """One defence of a stack: its name and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


def _stack(value: object) -> object:
    """Return a list of names and {name: options} as parts; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    parts: list[object] = []
    for each in value:
        if isinstance(each, str):
            parts.append({"name": each})
        elif isinstance(each, dict) and len(each) == 1 and "name" not in each:
            name, options = next(iter(each.items()))
            parts.append({"name": name, "options": options or {}})
        else:
            parts.append(each)
    return parts


class MemberSpec(_Part):
    """A model specification, its weights and options, and a defence with its `options`.

    `defense` may be a list, the first nearest to the input, of names and {name: options}.
    """

    model: str
    weights: str | None = None
    model_options: dict[str, Any] = Field(default_factory=dict)
    defense: Annotated[str | tuple[DefensePart, ...], BeforeValidator(_stack)] = "none"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _options_of_one(self) -> MemberSpec:
        if self.options and not isinstance(self.defense, str):
            raise ValueError("options of a list of defences stand in the list, as in [{jpeg: {quality: 50}}]")
        return self

    @property
    def parts(self) -> tuple[DefensePart, ...]:
        """The defences in order, without those that do nothing."""
        one = isinstance(self.defense, str)
        parts = (DefensePart(name=str(self.defense), options=self.options),) if one else self.defense
        return tuple(part for part in parts if isinstance(part, DefensePart) and part.name != "none")

    @property
    def title(self) -> str:
        """The model and the defences."""
        return " + ".join([self.model, *(part.name for part in self.parts)])


def _member(value: object) -> object:
    """Return a specification as a member."""
    return {"model": value} if isinstance(value, str) else value


def usual_gradient(model: str, *, defended: bool) -> str:
    """Return the estimator of a spear that names none: what the parts leave (auto) behind defences, else exact.

    The exact gradient of a part that has none of use is zero, and would flatter it. A service keeps exact, which it
    refuses: what it is asked instead costs queries, and is for its user to name.
    """
    return "auto" if defended and not model.startswith(("http:", "https:")) else "exact"


class ShieldSpec(MemberSpec):
    """What is defended: a model as a member's, or several of them that answer as one.

    Written as a list, `model` holds the `members` of an ensemble: specifications, or mappings with model, weights,
    defense and so on. They answer by `fusion`, the mean of logits or of probabilities or the majority of votes;
    `subset` of them, drawn for every query, if given. The shield's own defences stand in front of all of them.
    """

    name: str = ""
    model: str = ""
    members: tuple[Annotated[MemberSpec, BeforeValidator(_member)], ...] = ()
    fusion: Literal["logits", "probabilities", "majority"] = "logits"
    subset: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _model_or_members(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("model"), list | tuple):
            value = {**value, "members": value["model"], "model": ""}
        if isinstance(value, dict) and not value.get("model") and not value.get("members"):
            raise ValueError("key 'model' is missing: give a specification, or a list of them for an ensemble")
        return value

    @property
    def label(self) -> str:
        """The given name, or one made of the models and the defences."""
        return self.name or self.title

    @property
    def title(self) -> str:
        """The model or the members, and the defences."""
        if not self.members:
            return super().title
        how = self.fusion if self.subset is None else f"{self.fusion}, a random {self.subset}"
        models = " & ".join(member.title for member in self.members)
        return " + ".join([f"{models} ({how})", *(part.name for part in self.parts)])
