"""Trained attacks as files: what a training has learnt, kept as tensors and words, costs one forward per image.

A universal perturbation, a patch or a generator is trained once and then applied. It becomes a `TrainedAttack`: a
frozen attack like any other, whose options are words and numbers and whose tensors are its weights. The file is
safetensors, which holds no code; options, shapes and provenance stand in its header as JSON. Wherever an attack's name
is accepted, `file:PATH` means such a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from maodun.core.engine import Attack, State
from maodun.core.errors import InputError, UnsupportedError, nearest
from maodun.core.files import write_whole
from maodun.core.problem import Problem
from maodun.core.streams import Stream
from maodun.core.threat import Threat

PREFIX = "file:"
_FORMAT = 1
_HEADER = "maodun"
_CHUNK = 64
KINDS: dict[str, str] = {
    "advgan": "generative.attack",
    "multi-proxy": "generative.attack",
    "gan-sampling": "generative.attack",
    "relation-generator": "multitask.generator",
    "ltp": "multitask.generator",
    "uap": "universal.uap",
    "patch": "universal.patch",
}


@dataclass
class TrainedState(State):
    """The last candidates `x`, and how many tries were made."""

    number: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainedAttack(Attack[TrainedState]):
    """Base of trained attacks: a subclass says in `craft` how its tensors make a candidate out of an image.

    `shape` is one sample's shape, `norm` and `eps` (input units) the ball it was trained for; `tensors` are its
    weights, `about` its provenance (JSON values). Two are equal when options and tensors are. `sha256` is that of the
    file `save_artifact` writes. Needs no gradient: one decision of the target per try, and the clean one. The candidate
    is projected to the ball asked for, so it may be applied under another radius; that is no longer what was trained.
    """

    access: ClassVar[str] = "decision"
    can_target: ClassVar[bool] = False

    shape: tuple[int, ...]
    norm: str = "linf"
    eps: float
    tensors: Mapping[str, Tensor] = field(repr=False, compare=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        frozen = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        object.__setattr__(self, "tensors", MappingProxyType(frozen))
        object.__setattr__(self, "about", MappingProxyType(dict(self.about)))
        object.__setattr__(self, "sha256", hashlib.sha256(_content(self)).hexdigest())

    @property
    def tries(self) -> int:
        """How many candidates a sample gets (those that drew no luck get the next)."""
        return 1

    @property
    def total_steps(self) -> int:
        """One step per try."""
        return self.tries

    def craft(self, x: Tensor, ids: Tensor, stream: Stream, eps: float, number: int) -> Tensor:
        """Return the candidates of the images `x` (N x shape), keyed by `ids` (N,), in the `number`-th try.

        A pure function of its arguments, row by row. `eps` is the radius asked for, in input units.
        """
        raise NotImplementedError("a trained attack makes its candidates")

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse another input shape, another norm, and targets, before any model call."""
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"attack '{self.name}'",
                f"was trained for inputs {self.shape}, got {tuple(x.shape[1:])}",
                "train one for this shape",
            )
        if threat.norm != self.norm:
            reason = f"was trained for {self.norm} and does not search in {threat.norm}"
            raise UnsupportedError(f"attack '{self.name}'", reason, f"ask for {self.norm}, or train another")
        super().check(x, threat)

    def init(self, problem: Problem) -> TrainedState:
        """Start at the clean input; nothing is asked yet."""
        return TrainedState(x=problem.x, done=torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device))

    def step(self, problem: Problem, state: TrainedState) -> TrainedState:
        """Make the next candidate of every sample and look whether the target falls for it."""
        x_adv = self.candidates(problem.x, problem.ids, problem.threat, problem.session.seed, state.number)
        if problem.session.oracle.access == "decision":
            problem.decisions(x_adv)
        else:
            problem.logits(x_adv)
        return dataclasses.replace(state, x=x_adv, number=state.number + 1)

    def finish(self, problem: Problem, state: TrainedState) -> None:
        """Every candidate has been looked at."""

    def candidates(self, x: Tensor, ids: Tensor, threat: Threat, seed: int = 0, number: int = 0) -> Tensor:
        """Return what the attack makes of `x` (N x shape) in its `number`-th try, inside the threat; asks no target."""
        stream = Stream(seed, f"{self.name}/craft")
        with torch.no_grad():
            parts = [
                self.craft(part, few, stream, threat.eps, number)
                for part, few in zip(torch.split(x, _CHUNK), torch.split(ids, _CHUNK), strict=True)
            ]
        return threat.project(torch.cat(parts), x)

    def options(self) -> dict[str, Any]:
        """Return what a file says of it beside tensors and provenance, option -> JSON value."""
        left_out = {"tensors", "about", "sha256"}
        return {
            entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name not in left_out
        }


def save_artifact(attack: TrainedAttack, path: str | Path) -> Path:
    """Write a trained attack to `path`, whole or not at all, and return the path.

    One safetensors file: tensors, and a header with kind, options, shapes and provenance. Errors: InputError when it
    cannot be written.
    """
    return write_whole(path, _content(attack))


def load_attack(path: str | Path, sha256: str | None = None, **options: Any) -> TrainedAttack:
    """Return the trained attack of a file; `options` replace those it was saved with.

    `sha256` is the digest the file must have, where the caller knows it. Errors: InputError when the file is missing,
    is no trained attack, is of a kind or format not known here, does not fit its kind, or has another digest.
    """
    from maodun.attacks.registry import checked

    where = f"trained attack '{path}'"
    tensors, header = _read(Path(path).expanduser(), where)
    kind = kind_of(header["kind"], where)
    for option in ("shape", "norm", "eps"):
        if option in options:
            raise InputError(f"option '{option}'", "was fixed when the attack was trained", "leave it out")
    saved = header["options"] | options
    try:
        made = kind(**checked(header["kind"], kind, saved), tensors=tensors, about=header["about"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(where, f"its parts do not fit together ({error})", "train and save it again") from error
    if sha256 is not None:
        digest = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
        if digest != sha256:
            raise InputError(where, f"its sha256 is {digest[:12]}..., not {sha256[:12]}...", "fetch the file meant")
    return made


def kind_of(name: str, where: str) -> type[TrainedAttack]:
    """Return the class of a kind of trained attack; InputError about `where` when there is none."""
    if name not in KINDS:
        raise InputError(where, f"is of the kind '{name}', which is not known here", nearest(name, list(KINDS)))
    room = importlib.import_module(f"maodun.attacks.{KINDS[name]}")
    return next(
        thing
        for thing in vars(room).values()
        if isinstance(thing, type) and issubclass(thing, TrainedAttack) and vars(thing).get("name") == name
    )


def list_artifacts(folder: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, header) of every trained attack below `folder`, by path; other files are passed over.

    A header has kind, options and about. Errors: InputError when there is no such folder.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise InputError(f"folder '{folder}'", "there is no such folder", "give the folder of trained attacks")
    found = []
    for file in sorted(place.rglob("*.safetensors")):
        try:
            found.append((file, _read(file, f"trained attack '{file}'", header_only=True)[1]))
        except InputError:
            continue
    return found


def _content(attack: TrainedAttack) -> bytes:
    from safetensors.torch import save

    header = {"format": _FORMAT, "kind": attack.name, "options": attack.options(), "about": dict(attack.about)}
    return save(dict(attack.tensors), {_HEADER: json.dumps(header, sort_keys=True)})


def _read(file: Path, where: str, *, header_only: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(where, "there is no such file", "check the path, or train it: maodun train RECIPE")
    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get(_HEADER)
            tensors = {} if header_only or text is None else {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(where, f"is not a whole safetensors file ({error})", "fetch or save it again") from error
    if text is None:
        raise InputError(where, "holds tensors but says nothing of an attack", "give a file that save_artifact wrote")
    try:
        header = json.loads(text)
        known = header["format"] == _FORMAT and isinstance(header["kind"], str)
        parts = isinstance(header["options"], dict) and isinstance(header["about"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(where, f"its header cannot be read ({error!r})", "fetch or save it again") from error
    if not (known and parts):
        raise InputError(where, "is of a format not known here", "use the version of maodun that wrote it")
    return tensors, header
