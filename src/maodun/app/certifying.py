"""What `maodun certify` prints and writes: certified accuracy by radius, its page and its tables."""

from __future__ import annotations

from typing import Any

from maodun.app.consoles import console
from maodun.app.endings import Interrupted
from maodun.app.flags import parse_batch_size, parse_named, parse_options, wrong


def certify(
    model: str,
    data: str,
    *,
    weights: str | None,
    model_option: list[str] | None,
    defense: str,
    split: str,
    limit: int | None,
    batch_size: str,
    device: str,
    out: str | None,
    beside: list[str],
    progress: str,
    quiet: bool,
    **plan: Any,
) -> None:
    """Certify `model` on `data` into a folder; print the table and write curve.csv, samples.csv and report.html."""
    from maodun.arena.certified import attacks_beside, summarise_certificates
    from maodun.arena.certify import CertifyPlan, certify_model
    from maodun.report.certified import certified_view, write_certified

    size = parse_batch_size(batch_size)
    parts = [parse_named(part, thing="--defense") for part in defense.split(",") if part.strip()]
    for name, options in parts:
        if name == "denoise":
            # The denoiser must expect the very noise that is added.
            options.setdefault("sigma", plan["sigma"])
    shield = {
        "model": model, "weights": weights, "defense": [{"name": name, "options": options} for name, options in parts],
        "model_options": parse_options(model_option or [], thing="--model-option"),
    }  # fmt: skip
    content = {"data": {"spec": data, "split": split, "limit": limit}, "shield": shield, **plan}
    try:
        made = CertifyPlan.model_validate(content)
    except ValueError as error:
        raise wrong("certify", str(error).splitlines()[-2].strip(), "correct the value") from None
    folder = out or f"runs/certify-{made.digest()[:12]}"
    command = _spelled(model, data, made, folder, beside)
    try:
        found = certify_model(
            made, folder, command=command, device=device, batch_size=size, progress="quiet" if quiet else progress
        )
    except KeyboardInterrupt:
        raise Interrupted(f"finished shards are kept in {folder}, the same command line resumes") from None
    if beside:
        found = summarise_certificates(folder, [one for run in beside for one in attacks_beside(folder, run)])
    for file in ("curve.csv", "samples.csv", "report.html"):
        write_certified(found, folder, f"{folder.rstrip('/')}/{file}", light=True)
    if not quiet:
        console().print(certified_view(found))
        console().print(f"kept in {folder}: curve.csv, samples.csv, report.html", style="dim", soft_wrap=True)


def _spelled(model: str, data: str, plan: Any, folder: str, beside: list[str]) -> str:
    """Return the command line that repeats the run."""
    import shlex

    shield = plan.shield
    words = ["maodun", "certify", model, "--data", data]
    words += ["--weights", shield.weights] if shield.weights else []
    for key, value in shield.model_options.items():
        words += ["--model-option", f"{key}={value}"]
    parts = [":".join([part.name, *(f"{key}={value}" for key, value in part.options.items())]) for part in shield.parts]
    words += ["--defense", ",".join(parts)] if parts else []
    words += ["--split", plan.data.split] if plan.data.split != "test" else []
    words += ["--limit", str(plan.data.limit)] if plan.data.limit else []
    for key in ("sigma", "draws", "guesses", "alpha", "seed"):
        words += [f"--{key}", f"{getattr(plan, key):g}" if key in ("sigma", "alpha") else str(getattr(plan, key))]
    for run in beside:
        words += ["--beside", run]
    return shlex.join([*words, "--out", folder])
