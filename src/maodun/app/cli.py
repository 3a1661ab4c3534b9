"""The command line: `maodun evaluate | attack | arena | report | compare | list | train | version`.

Every command parses its words, hands a recipe to the arena and prints what came back. Rooms are imported
inside the commands, so that help appears at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from maodun.app import options as o
from maodun.app.endings import INTERRUPTED, WRONG_INPUT, Interrupted
from maodun.app.flags import EvaluateFlags, Flags, RunFlags, flags_of
from maodun.app.process import keep_freed_memory, let_idle_threads_sleep

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
    scores = "scores"
    data = "data"
    recipes = "recipes"


@app.command()
@flags_of
def evaluate(flags: EvaluateFlags, run: RunFlags) -> None:
    """Attack one model and print what is left of its accuracy, per attack and in the worst case."""
    from maodun.app import runs

    runs.evaluate(flags, run)


@app.command()
@flags_of
def attack(flags: Flags, run: RunFlags) -> None:
    """Make adversarial inputs and save them, with what the model says about each."""
    from maodun.app import runs

    runs.attack(flags, run)


@app.command()
def arena(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML; see 'maodun list recipes'.", show_default=False)],
    out: o.Out = None,
    device: o.Device = "cpu",
    progress: o.Show = o.Progress.bar,
    quiet: o.Quiet = False,
) -> None:
    """Run every spear of a recipe against every shield; the same line again resumes."""
    from maodun.app import runs

    runs.arena(recipe, RunFlags(out=out, device=device, progress=progress, quiet=quiet))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A training recipe in YAML.", show_default=False)],
    out: Annotated[str, typer.Option(help="The folder of weights, card and checkpoint.")] = "runs/train",
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Continue after the last whole epoch.")] = True,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's seed.", show_default=False)] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log the epochs for TensorBoard.")] = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a model from a recipe, and measure it into a card; the same line again resumes."""
    from maodun.app import training

    training.train(recipe, out, resume=resume, quiet=quiet, seed=seed, tensorboard=tensorboard)


@app.command()
def harden(
    model: Annotated[str, typer.Argument(help="The classifier, as after --model elsewhere.", show_default=False)],
    data: o.Data,
    eps: Annotated[str, typer.Option(help="Radius of the ball in [0, 1] input units, as 8/255.", show_default=False)],
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    objective: Annotated[str, typer.Option(help="adversarial, trades, mart, score, dkl or ikl.")] = "trades",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    steps: Annotated[int, typer.Option(help="PGD steps of the inner attack.", min=1)] = 7,
    rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0.0)] = 0.02,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    shift: Annotated[int, typer.Option(help="Random shifts of the pictures by up to so many pixels.", min=0)] = 0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the pictures.")] = False,
    limit: Annotated[int | None, typer.Option(help="Train on the first N samples.", min=2)] = None,
    measure: Annotated[int | None, typer.Option(help="Measure on the first N test samples.", min=1)] = 1000,
    attack: Annotated[str, typer.Option(help="The attack that measures, before and after.")] = "sharp",
    seed: Annotated[int, typer.Option()] = 0,
    weights: o.Weights = None,
    model_option: o.ModelOption = None,
    out: Annotated[str, typer.Option(help="The folder of weights and checkpoint.")] = "runs/harden",
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Continue after the last whole epoch.")] = True,
    quiet: o.Quiet = False,
) -> None:
    """Train your own classifier on against an adversary, measured before and after; the same line again resumes."""
    from maodun.app import hardening

    hardening.harden(
        model, data, out, eps=eps, weights=weights, model_option=model_option, resume=resume, quiet=quiet, norm=norm,
        objective=objective, epochs=epochs, steps=steps, rate=rate, batch_size=batch_size, shift=shift, flip=flip,
        limit=limit, measure=measure, attack=attack, seed=seed,
    )  # fmt: skip


@app.command()
def certify(
    model: Annotated[str, typer.Argument(help="The classifier, as after --model elsewhere.", show_default=False)],
    data: o.Data,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise, in [0, 1] input units.")] = 0.25,
    draws: Annotated[int, typer.Option(help="Draws that bound the class's probability.", min=1)] = 10_000,
    guesses: Annotated[int, typer.Option(help="Draws that choose the class.", min=1)] = 100,
    alpha: Annotated[float, typer.Option(help="Probability that a sample's certificate is wrong, at most.")] = 0.001,
    defense: Annotated[str, typer.Option(help="Between noise and model, as denoise:score=FILE.")] = "none",
    beside: Annotated[list[str] | None, typer.Option(help="A run's folder with l2 attacks; may be repeated.")] = None,
    weights: o.Weights = None,
    model_option: o.ModelOption = None,
    split: o.Split = "test",
    limit: o.Limit = None,
    seed: Annotated[int, typer.Option(help="The seed of every draw.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Samples per resumable part.", min=1)] = 16,
    batch_size: o.BatchSize = "auto",
    device: o.Device = "cpu",
    out: o.Out = None,
    progress: o.Show = o.Progress.bar,
    quiet: o.Quiet = False,
) -> None:
    """Certify a model by randomised smoothing: l2 radii that no attack can beat; the same line again resumes."""
    from maodun.app import certifying

    certifying.certify(
        model, data, weights=weights, model_option=model_option, defense=defense, split=split, limit=limit,
        batch_size=batch_size, device=device, out=out, beside=beside or [], progress=progress.value, quiet=quiet,
        sigma=sigma, draws=draws, guesses=guesses, alpha=alpha, seed=seed, shard_size=shard_size,
    )  # fmt: skip


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="The classifier, as after --model elsewhere.", show_default=False)],
    data: o.Data,
    eps: Annotated[str, typer.Option(help="Radius of the ball in [0, 1] input units, as 8/255.", show_default=False)],
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    defense: o.Defense = "none",
    twin: Annotated[str | None, typer.Option(help="An undefended model of the same data, to transfer from.")] = None,
    weights: o.Weights = None,
    model_option: o.ModelOption = None,
    split: o.Split = "test",
    limit: Annotated[int, typer.Option(help="Only the first N samples; at most 128 are tried.", min=8)] = 128,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = "auto",
    device: o.Device = "cpu",
    out: o.Out = None,
    progress: o.Show = o.Progress.bar,
    quiet: o.Quiet = False,
) -> None:
    """Ask whether a model's robustness is real: every check, every remedy, a verdict in a sentence, and a page."""
    from maodun.app import diagnosing

    diagnosing.diagnose(
        model, data, norm=norm, eps=eps, weights=weights, model_option=model_option, defense=defense, twin=twin,
        split=split, limit=limit, seed=seed, batch_size=batch_size, device=device, out=out, progress=progress.value,
        quiet=quiet,
    )  # fmt: skip


@app.command("fit-detector")
def fit_detector(
    model: Annotated[str, typer.Argument(help="The classifier, as after --model elsewhere.", show_default=False)],
    data: o.Data,
    out: Annotated[str, typer.Option(help="The .safetensors file to write.", show_default=False)],
    detector: Annotated[str, typer.Option(help="A detector, as knn:k=20:fpr=0.01.")] = "mahalanobis",
    norm: Annotated[str, typer.Option(help="The norm of the attacks that trained_detector learns from.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Their radius in [0, 1] input units, as 8/255.")] = None,
    weights: o.Weights = None,
    model_option: o.ModelOption = None,
    limit: Annotated[int, typer.Option(help="So many test samples are left alone, to be judged later.", min=1)] = 1000,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    quiet: o.Quiet = False,
) -> None:
    """Fit a detector to a model on clean data and keep it as a file, for --defense NAME:file=FILE."""
    from maodun.app import fitting

    fitting.fit_detector(
        model, data, out, detector=detector, norm=norm, eps=eps, weights=weights, model_option=model_option,
        limit=limit, seed=seed, device=device, quiet=quiet,
    )  # fmt: skip


@app.command()
def multitask(
    recipe: Annotated[str, typer.Argument(help="A multi-task recipe in YAML.", show_default=False)],
    out: Annotated[str, typer.Option(help="The run's folder.")] = "runs/multi-task",
    row: Annotated[list[str] | None, typer.Option(help="Make only this row now; may be repeated.")] = None,
    quiet: o.Quiet = False,
) -> None:
    """Attack one set of images and ask every task about it; the same line again makes what is missing."""
    from maodun.app import multitask as room

    room.multitask(recipe, out, row or [], quiet=quiet)


@app.command()
def purify(
    picture: Annotated[str, typer.Argument(help="The picture to purify.", metavar="IN", show_default=False)],
    out: Annotated[str, typer.Argument(help="Where the purified one goes, a .png.", metavar="OUT", show_default=False)],
    score: Annotated[
        str, typer.Option(help="A score network: zoo:NAME, a .safetensors, a diffusers folder.", show_default=False)
    ],
    t_star: Annotated[float, typer.Option(help="How much noise, as a share of the levels in (0, 1).")] = 0.1,
    steps: Annotated[int, typer.Option(help="Steps of the way back.")] = 5,
    sampler: Annotated[
        str, typer.Option(help="The way back: ddim_eta1, dpm_solver, euler_maruyama, ...")
    ] = "ddim_eta1",
    rounds: Annotated[int, typer.Option(help="How often there and back.")] = 1,
    seed: Annotated[int, typer.Option(help="The seed of the noise.")] = 0,
    device: o.Device = "cpu",
    quiet: o.Quiet = False,
) -> None:
    """Purify one picture with the diffusion filter: noise over the perturbation, and the learned way back."""
    from maodun.app import purifying

    purifying.purify(
        picture, out, score=score, seed=seed, device=device, quiet=quiet,
        t_star=t_star, steps=steps, sampler=sampler, rounds=rounds,
    )  # fmt: skip


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="A run's folder.", metavar="RUN", show_default=False)],
    out: Annotated[
        list[str] | None,
        typer.Option(help="A .html, .csv, .json, .md or .tex file; may be repeated. [default: RUN/report.html]"),
    ] = None,
    light: Annotated[bool, typer.Option("--light", help="Static charts, no scripts: a small file.")] = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a run's page, or its numbers as CSV, JSON, Markdown or LaTeX."""
    from maodun.app import reporting

    reporting.report(folder, out or [], light=light, quiet=quiet)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run's folder.", metavar="RUN", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another's.", metavar="RUN", show_default=False)],
    out: Annotated[list[str] | None, typer.Option(help="A .html or .md file; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of the bootstrap.")] = 0,
    quiet: o.Quiet = False,
) -> None:
    """Print the paired differences of two runs with their intervals and tests."""
    from maodun.app import reporting

    reporting.compare(first, second, out or [], seed=seed, quiet=quiet)


@app.command("list")
def list_(
    thing: Annotated[Things, typer.Argument(help="What to list.", show_default=False)],
    folder: Annotated[
        str | None, typer.Option("--from", help="With attacks: those trained and kept below this folder.")
    ] = None,
) -> None:
    """List attacks, defences, models, data or recipes."""
    from maodun.app import listing

    listing.show(thing.value, folder)


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


def _known_error(error: Exception) -> str | None:
    """Return the line of an error that this package raises on purpose, None for any other."""
    from maodun.core.errors import MaodunError

    return str(error) if isinstance(error, MaodunError) else None


def run(words: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return its exit code.

    0 is success, 2 something given that cannot be used (one line on standard error says what, why and what to
    do), 130 an interrupt. Anything else that is raised is a fault of this program and keeps its traceback.
    """
    try:
        result = app(args=None if words is None else list(words), prog_name="maodun", standalone_mode=False)
        sys.stdout.flush()
        # Typer's versions end an interrupt in three ways: as it came, as Abort, as an exit code.
        if result == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted: no work had begun", INTERRUPTED)
    except BrokenPipeError:
        # The reader went away, as in `maodun list attacks | head`: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Interrupted as stop:
        return _say(f"interrupted: {stop}", INTERRUPTED)
    except Exception as error:
        complaint = _usage_error(error) or _known_error(error)
        if complaint is None:
            raise
        return _say(f"error: {' '.join(complaint.split())}", WRONG_INPUT)
    return result if isinstance(result, int) else 0


def _say(line: str, code: int) -> int:
    sys.stderr.write(line + "\n")
    return code


def main() -> None:
    """Run the process's command line and leave with its exit code."""
    let_idle_threads_sleep()
    keep_freed_memory()
    if not sys.warnoptions:
        # Libraries warn their callers, who here are not the person reading; python -W shows the warnings again.
        warnings.simplefilter("ignore")
    sys.exit(run())
