"""What `maodun fit-detector` prints: where the detector is kept, what it refuses, and how to use it."""

from __future__ import annotations

from typing import Any

from maodun.app.consoles import console
from maodun.app.flags import parse_named, parse_options


def fit_detector(
    model: str, data: str, out: str, *, detector: str, model_option: list[str] | None, quiet: bool, **more: Any
) -> None:
    """Fit `detector` to `model` on `data`, write it to `out`, and print what became of it."""
    from maodun.arena.fit_detector import fit_detector_file

    name, options = parse_named(detector, thing="--detector")
    chosen = parse_options(model_option or [], thing="--model-option")
    made = fit_detector_file(model, data, out, detector=name, options=options, model_options=chosen, **more)
    if quiet:
        return
    say, share = console(), made.refused
    span = f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
    say.print(f"{made.file}  sha256 {made.sha256}", soft_wrap=True)
    say.print(f"fitted to the weights {made.model}, threshold {made.threshold:.6g}", soft_wrap=True)
    say.print(f"refuses {span} of {share.n} clean test samples that it has not seen", soft_wrap=True)
    say.print(f"use it as --defense {detector}:file={made.file} --limit {share.n}", soft_wrap=True)
