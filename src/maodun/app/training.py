"""What `maodun train` prints while a recipe is trained, and what it made."""

from __future__ import annotations

from maodun.app.consoles import console
from maodun.app.endings import Interrupted


def train(recipe: str, out: str, *, resume: bool, quiet: bool) -> None:
    """Train `recipe` into the folder `out`, a line per epoch on standard error, then the card's numbers."""
    from maodun.arena import train as room

    watch = console(error=True)

    def epoch(line: dict[str, float | str]) -> None:
        if not quiet:
            numbers = (f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in line.items())
            watch.print("  ".join(numbers))

    try:
        made = room.train(recipe, out, on_epoch=epoch, resume=resume)
    except KeyboardInterrupt:
        raise Interrupted(f"finished epochs are kept in {out}, the same command line resumes") from None
    if not quiet:
        say = console()
        say.print(f"{made.weights}  (card: {made.card_file})", soft_wrap=True)
        for number in made.card.measured:
            span = "" if number.low is None or number.high is None else f" [{number.low:.4f}, {number.high:.4f}]"
            say.print(f"{number.metric}: {number.value:.4f}{span}, n = {number.n}, seed {number.seed}", soft_wrap=True)
