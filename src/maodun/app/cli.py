"""The command line: `maodun evaluate | attack | arena | report | compare | list | train | version`.

Every command parses its words, hands a recipe to the arena and prints what came back. Rooms are imported
inside the commands, so that help appears at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from maodun.app import options as o
from maodun.app.flags import Flags, RunFlags, flags_of

WRONG_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="maodun",
    help="Every attack against every defence, and an honest account of what is left standing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Things(StrEnum):
    """What `maodun list` can list."""

    attacks = "attacks"
    defenses = "defenses"
    models = "models"
    data = "data"
    recipes = "recipes"


@app.command()
@flags_of
def evaluate(flags: Flags, run: RunFlags) -> None:
    """Attack one model and print what is left of its accuracy, per attack and in the worst case."""
    from maodun.app.runs import run_flags

    run_flags(flags, run)


@app.command()
@flags_of
def attack(flags: Flags, run: RunFlags) -> None:
    """Make adversarial inputs and save them, with what the model says about each."""
    from maodun.app.runs import attack_flags

    attack_flags(flags, run)


@app.command()
def arena(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML; see 'maodun list recipes'.", show_default=False)],
    out: o.Out = None,
    device: o.Device = "cpu",
    progress: o.Show = o.Progress.bar,
    quiet: o.Quiet = False,
) -> None:
    """Run every spear of a recipe against every shield; the same line again resumes."""
    from maodun.app.runs import run_file

    run_file(recipe, RunFlags(out=out, device=device, progress=progress, quiet=quiet))


@app.command("list")
def list_(thing: Annotated[Things, typer.Argument(help="What to list.", show_default=False)]) -> None:
    """List attacks, defences, models, data or recipes."""
    from maodun.app import listing

    listing.show(thing.value)


@app.command()
def version() -> None:
    """Print the version of maodun and of what decides its numbers."""
    from maodun.app import listing

    listing.show_versions()


def _usage_error(error: Exception) -> str | None:
    """Return the parser's complaint as one line, None for an error that is not the parser's.

    Typer carries its own copy of click from 0.16 or so on, so the class to ask for depends on the version.
    """
    describe = getattr(error, "format_message", None)
    if describe is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "maodun"
    reason = " ".join(str(describe()).split()).rstrip(".")
    return f"command line: {reason}; see {command} --help"


def run(words: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return its exit code.

    0 is success, 2 something given that cannot be used (one line on standard error says what, why and what to
    do), 130 an interrupt. Anything else that is raised is a fault of this program and keeps its traceback.
    """
    try:
        result = app(args=None if words is None else list(words), prog_name="maodun", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted: finished shards are kept; the same command line resumes", INTERRUPTED)
    except BrokenPipeError:
        # The reader went away, as in `maodun list attacks | head`: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from maodun.core.errors import MaodunError

        complaint = str(error) if isinstance(error, MaodunError) else _usage_error(error)
        if complaint is None:
            raise
        return _say(f"error: {' '.join(complaint.split())}", WRONG_INPUT)
    return result if isinstance(result, int) else 0


def _say(line: str, code: int) -> int:
    sys.stderr.write(line + "\n")
    return code


def main() -> None:
    """Run the process's command line and leave with its exit code."""
    sys.exit(run())
