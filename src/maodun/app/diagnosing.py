"""What `maodun diagnose` does: every check and every remedy on a model's first samples, a verdict, and a page."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from maodun.app.consoles import console
from maodun.app.endings import Interrupted
from maodun.app.flags import parse_batch_size, parse_defenses, parse_options, parse_radii, wrong

if TYPE_CHECKING:
    from maodun.arena.summary import RunSummary


def diagnose(
    model: str,
    data: str,
    *,
    norm: str,
    eps: str,
    weights: str | None,
    model_option: list[str] | None,
    defense: str,
    twin: str | None,
    split: str,
    limit: int,
    seed: int,
    batch_size: str,
    device: str,
    out: str | None,
    progress: str,
    quiet: bool,
) -> None:
    """Doubt `model` on the first `limit` samples of `data`; print the verdict and write the run with its page."""
    from maodun.arena.progress import watcher
    from maodun.arena.recipe import make_recipe
    from maodun.arena.run import drive
    from maodun.arena.setup import prepare
    from maodun.report.html import write_report

    if norm not in ("linf", "l2", "l1"):
        raise wrong(f"norm '{norm}'", "has no trial attacks", "diagnose in linf, l2 or l1")
    shield = {
        "model": model, "weights": weights, "model_options": parse_options(model_option or [], thing="--model-option"),
        **parse_defenses(defense),
    }  # fmt: skip
    recipe = make_recipe(
        {
            "name": f"{model} on {data}: is it real?",
            "seed": seed,
            "data": {"spec": data, "split": split, "limit": limit},
            "threats": [{"norm": norm, "eps": _radius(eps)}],
            "shields": [shield],
            "spears": _spears(twin),
            "diagnostics": "thorough",
            "adversarials": False,
            "compute": {"batch_size": parse_batch_size(batch_size)},
        },
        source="command line",
    )
    folder = out or f"runs/diagnose-{recipe.digest()[:12]}"
    flags = [("--weights", weights), *(("--model-option", each) for each in model_option or [])]
    flags += [("--defense", defense if recipe.shields[0].parts else None), ("--twin", twin)]
    flags += [("--split", split), ("--limit", str(limit)), ("--seed", str(seed)), ("--out", folder)]
    words = ["maodun", "diagnose", model, "--data", data, "--norm", norm, "--eps", eps]
    words += [word for flag, value in flags if value for word in (flag, value)]
    met = prepare(recipe, folder, command=shlex.join(words), device=device)
    try:
        summary = drive(met, watcher("quiet" if quiet else progress))
    except KeyboardInterrupt:
        raise Interrupted(f"finished parts are kept in {folder}, the same command line resumes") from None
    page = write_report(summary, folder, f"{folder.rstrip('/')}/report.html", light=True)
    if not quiet:
        _show(summary)
        console().print(f"kept in {folder}; the page: {page}", style="dim", soft_wrap=True)


def _radius(eps: str) -> float:
    """Return the one radius to doubt a model at; a radius of 0 would let every model hold."""
    radii = parse_radii(eps)
    if len(radii) != 1 or radii[0] == 0:
        reason = "leaves the adversary nothing to change" if len(radii) == 1 else "names several radii"
        raise wrong(f"eps '{eps}'", reason, "give one radius above 0, as 8/255")
    return radii[0]


def _spears(twin: str | None) -> list[dict[str, Any]]:
    """Return the plain attack that remedies are measured by, and the transfer from a `twin`."""
    plain = {"attack": "pgd", "options": {"steps": 20}}
    own = [{**plain, "name": "plain PGD"}]
    return own if twin is None else [*own, {**plain, "name": "from the twin", "surrogate": twin}]


def _show(summary: RunSummary) -> None:
    """Print the verdict with its trials, and what else is worth a look."""
    from maodun.report.diagnosis import diagnosis_views
    from maodun.report.terminal import finding_line
    from maodun.report.words import by_urgency

    for view in diagnosis_views(summary):
        console().print(view)
    for finding in by_urgency(summary.findings):
        if finding.level != "ok" and finding.name != "verdict":
            console().print(finding_line(finding))
