"""What `maodun diagnose` does: every check and every remedy on a model's first samples, a verdict, and a page."""

from __future__ import annotations

import shlex
from typing import Any

from maodun.app.consoles import console
from maodun.app.endings import Interrupted
from maodun.app.flags import parse_batch_size, parse_named, parse_options, wrong


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
    from maodun.report.diagnosis import diagnosis_views
    from maodun.report.html import write_report
    from maodun.report.terminal import finding_line
    from maodun.report.words import by_urgency

    if norm not in ("linf", "l2", "l1"):
        raise wrong(f"norm '{norm}'", "has no trial attacks", "diagnose in linf, l2 or l1")
    name, options = parse_named(defense, thing="--defense")
    spears: list[dict[str, Any]] = [{"attack": "pgd", "options": {"steps": 20}, "name": "plain PGD"}]
    if twin is not None:
        spears.append({"attack": "pgd", "options": {"steps": 20}, "name": "from the twin", "surrogate": twin})
    content = {
        "name": f"{model} on {data}: is it real?",
        "seed": seed,
        "data": {"spec": data, "split": split, "limit": limit},
        "threats": [{"norm": norm, "eps": eps}],
        "shields": [
            {
                "model": model,
                "weights": weights,
                "model_options": parse_options(model_option or [], thing="--model-option"),
                "defense": name,
                "options": options,
            }
        ],
        "spears": spears,
        "diagnostics": "thorough",
        "adversarials": False,
        "compute": {"batch_size": parse_batch_size(batch_size)},
    }
    recipe = make_recipe(content, source="command line")
    folder = out or f"runs/diagnose-{recipe.digest()[:12]}"
    flags = [("--weights", weights), *(("--model-option", each) for each in model_option or [])]
    flags += [("--defense", defense if name != "none" else None), ("--twin", twin)]
    flags += [("--split", split), ("--limit", str(limit)), ("--seed", str(seed)), ("--out", folder)]
    words = ["maodun", "diagnose", model, "--data", data, "--norm", norm, "--eps", eps]
    words += [word for flag, value in flags if value for word in (flag, value)]
    met = prepare(recipe, folder, command=shlex.join(words), device=device)
    try:
        summary = drive(met, watcher("quiet" if quiet else progress))
    except KeyboardInterrupt:
        raise Interrupted(f"finished parts are kept in {folder}, the same command line resumes") from None
    page = write_report(summary, folder, f"{folder.rstrip('/')}/report.html", light=True)
    if quiet:
        return
    for view in diagnosis_views(summary):
        console().print(view)
    for finding in by_urgency(summary.findings):
        if finding.level != "ok" and finding.name != "verdict":
            console().print(finding_line(finding))
    console().print(f"kept in {folder}; the page: {page}", style="dim", soft_wrap=True)
