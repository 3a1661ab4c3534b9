"""From a recipe to a store, a table and saved pictures: what `evaluate`, `attack` and `arena` have in common."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from maodun.app.consoles import console
from maodun.app.endings import Interrupted
from maodun.app.flags import EvaluateFlags, Flags, RunFlags, is_service, spell
from maodun.app.options import Pictures, Progress
from maodun.arena.progress import watcher
from maodun.arena.recipe import Recipe, load_recipe
from maodun.arena.run import bills, drive
from maodun.arena.setup import Arena, prepare
from maodun.core.errors import TargetError

if TYPE_CHECKING:
    from maodun.arena.summary import RunSummary


def evaluate(flags: EvaluateFlags, run: RunFlags) -> None:
    """Run the flags' recipe and print its table; without a folder to keep it in, nothing is kept."""
    # What a service has answered is never thrown away.
    keep = run.out is not None or run.save is not None or is_service(flags.model)
    recipe = flags.recipe(diagnostics=flags.diagnostics, adversarials=keep)
    command = spell("evaluate", flags, RunFlags(out=run.out))
    place = nullcontext(_folder(recipe, run)) if keep else tempfile.TemporaryDirectory(prefix="maodun-")
    with place as out:
        met, summary = _run(recipe, out, run, command, kept=keep)
        if run.save is not None:
            _save(met, run.save, run)
        _show(summary, run)
        _bill(met, run, out)


def attack(flags: Flags, run: RunFlags) -> None:
    """Run the flags' recipe, save its adversarial inputs, and print what became of them."""
    recipe = flags.recipe()
    out = _folder(recipe, run)
    met, summary = _run(recipe, out, run, spell("attack", flags, RunFlags(out=out)))
    drawable = met.data.x.ndim == 4 and met.data.x.shape[1] in (1, 3)
    _save(met, run.save or (Pictures.png if drawable else Pictures.npz), run)
    _show(summary, run)
    _bill(met, run, out)


def arena(path: str, run: RunFlags) -> None:
    """Run a recipe file into its folder, by default runs/ and the file's name, and print its table."""
    recipe = load_recipe(path)
    out = run.out or f"runs/{Path(path).stem}"
    met, summary = _run(recipe, out, run, f"maodun arena {path} --out {out}")
    _show(summary, run, matrix=len(recipe.shields) > 1)
    _bill(met, run, out)
    if not run.quiet:
        console().print(f"kept in {out}; the page: maodun report {out}", style="dim", soft_wrap=True)


def _folder(recipe: Recipe, run: RunFlags) -> str:
    """Return the folder of a run that is kept: the given one, or one named after what is run."""
    return run.out or f"runs/{recipe.digest()[:12]}"


def _run(recipe: Recipe, out: str, run: RunFlags, command: str, *, kept: bool = True) -> tuple[Arena, RunSummary]:
    met = prepare(recipe, out, command=command, device=run.device)
    try:
        return met, drive(met, watcher(Progress.quiet.value if run.quiet else run.progress.value))
    except TargetError as error:
        # Answers so far are in the journal, finished shards in the store.
        raise TargetError(
            error.thing, error.reason, f"{error.remedy} (--out {out})" if kept else error.remedy
        ) from None
    except KeyboardInterrupt:
        state = f"finished shards are kept in {out}, the same command line resumes"
        raise Interrupted(state if kept else "nothing is kept without --out") from None


def _show(summary: RunSummary, run: RunFlags, *, matrix: bool = False) -> None:
    from maodun.report.terminal import summary_view

    if not run.quiet:
        console().print(summary_view(summary, matrix=matrix, calibrated=run.calibration))


def _bill(met: Arena, run: RunFlags, out: str) -> None:
    """Print what services have cost; nothing for models that run here."""
    for label, line in ({} if run.quiet else bills(met)).items():
        console().print(f"{label}: {line}, in {out}/answers", style="dim", soft_wrap=True)


def _save(met: Arena, kind: Pictures, run: RunFlags) -> None:
    from maodun.app.pictures import save

    for line in save(met, kind.value):
        if not run.quiet:
            console().print(line, soft_wrap=True)
