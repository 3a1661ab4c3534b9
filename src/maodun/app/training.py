"""What `maodun train` prints while a recipe is trained, and what it made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maodun.app.consoles import console
from maodun.app.endings import Interrupted
from maodun.core.errors import InputError

if TYPE_CHECKING:
    from maodun.zoo.cards import Measured

_TELL_EVERY = 30.0


def train(
    recipe: str, out: str, *, resume: bool, quiet: bool, seed: int | None = None, tensorboard: bool = False
) -> None:
    """Train `recipe` into the folder `out`, a line per epoch on standard error, then what was measured.

    A recipe that names an attack at its top level trains that, one that has a score a score network, one that names a
    text is a text experiment; any other trains a model and writes its card.
    """
    from maodun.arena.text_recipe import trains_text

    if trains_text(recipe):
        if seed is not None or tensorboard:
            raise InputError("--seed and --tensorboard", "are not for text recipes", "name the seeds in the recipe")
        from maodun.app.text import train_text

        train_text(recipe, out, resume=resume, quiet=quiet)
        return

    watch = console(error=True)
    names: dict[str, str] = {}

    def epoch(line: dict[str, float | str]) -> None:
        if not quiet:
            named = ((names.get(key, key), value) for key, value in line.items())
            numbers = (f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in named)
            watch.print("  ".join(numbers))

    last = time.monotonic()

    def step(done: int, steps: int) -> None:
        nonlocal last
        if not quiet and time.monotonic() - last > _TELL_EVERY:
            last = time.monotonic()
            watch.print(f"step {done} of {steps}")

    try:
        where, measured = _made(recipe, out, names, epoch, step, resume=resume, seed=seed, tensorboard=tensorboard)
    except KeyboardInterrupt:
        raise Interrupted(f"what was done is kept in {out}, the same command line resumes") from None
    if not quiet:
        say = console()
        say.print(where, soft_wrap=True)
        for number in measured:
            span = "" if number.low is None or number.high is None else f" [{number.low:.4f}, {number.high:.4f}]"
            say.print(f"{number.metric}: {number.value:.4f}{span}, n = {number.n}, seed {number.seed}", soft_wrap=True)


def _made(
    recipe: str,
    out: str,
    names: dict[str, str],
    epoch: Callable[[dict[str, float | str]], None],
    step: Callable[[int, int], None],
    *,
    resume: bool,
    seed: int | None,
    tensorboard: bool,
) -> tuple[str, Sequence[Measured]]:
    """Train and return where the result lies, in words, and what was measured; `names` learns what a score is."""
    from maodun.arena import train as room
    from maodun.arena.train_recipe import load_train_recipe, trains_attack
    from maodun.arena.train_score import train_score, trains_score

    of_score, of_attack = trains_score(recipe), trains_attack(recipe)
    if (of_score or of_attack) and (seed is not None or tensorboard):
        raise InputError("--seed and --tensorboard", "are for recipes that train a model", "leave them out")
    if of_score:
        names["score"] = "minus the validation loss"
        learnt = train_score(recipe, out, on_epoch=epoch, on_step=step, resume=resume)
        return f"{learnt.file}  (card: {learnt.card_file})", learnt.measured
    if of_attack:
        from maodun.arena.train_universal import train_attack

        trained = train_attack(recipe, out, on_epoch=epoch, on_step=step, resume=resume)
        return f"{trained.file}  (use it as --attack file:{trained.file})", trained.measured
    described = load_train_recipe(recipe)
    names["score"] = "robust validation accuracy" if described.select else "validation accuracy"
    where, measured = f"each in {out}", []
    for each in described.each():
        if described.sweep and resume and (Path(out) / f"{each.name}.yaml").exists():
            continue  # a member of the sweep that an earlier start has finished
        made = room.train(
            each, out, on_epoch=epoch, on_step=step, resume=resume, seed=seed, tensorboard=tensorboard, source=recipe
        )
        where = where if described.sweep else f"{made.weights}  (card: {made.card_file})"
        name = f"{each.name}, " if described.sweep else ""
        measured += [number.model_copy(update={"metric": name + number.metric}) for number in made.card.measured]
    return where, measured
