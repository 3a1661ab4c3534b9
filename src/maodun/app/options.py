"""The flags of the command line, each written once and shared by the commands that take it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


def _flag(panel: str, text: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **extra)


_WHAT, _HOW = "What is attacked", "How it is attacked"
_VERDICT, _RUN = "How success is decided", "How it runs"

_MODEL = "zoo:NAME, package.module:factory, torchscript:FILE, onnx:FILE, sklearn:..., http://HOST/PATH, timm:NAME, ..."
_DATA = "digits, mnist, cifar10, folder:DIR, parquet:FILES, npz:FILE or hf:ID."
_WEIGHTS = "A .safetensors file, or a checkpoint that loads without running code."
_EPS = "Radius in [0, 1] input units, as 8/255 (flow: pixels); several separated by commas. Left out: any radius."
_DEFENSE = "A defence, as bit_depth:bits=3; several separated by commas, the first nearest to the input."
_ATTACK = "Attacks separated by commas, with options as in pgd:steps=10:restarts=2."
_GRADIENT = "exact, bpda, surrogate, adjoint, nes, spsa, or auto: what its parts leave. Left out: auto behind defences."


class Progress(StrEnum):
    """How progress is shown: a bar, a line per finished shard, or nothing."""

    bar = "bar"
    log = "log"
    quiet = "quiet"


class Pictures(StrEnum):
    """The lossless formats that adversarial inputs are saved in."""

    png = "png"
    npz = "npz"


Model = Annotated[str, _flag(_WHAT, _MODEL, show_default=False)]
Weights = Annotated[str | None, _flag(_WHAT, _WEIGHTS)]
ModelOption = Annotated[list[str] | None, _flag(_WHAT, "key=value for the model's factory; may be repeated.")]
AllowRemote = Annotated[bool, _flag(_WHAT, "Permit a service that is not on this machine.", "--allow-remote")]
Defense = Annotated[str, _flag(_WHAT, _DEFENSE)]
Data = Annotated[str, _flag(_WHAT, _DATA, show_default=False)]
Split = Annotated[str, _flag(_WHAT, "The split of the data.")]
Limit = Annotated[int | None, _flag(_WHAT, "Only the first N samples.", min=1)]

Norm = Annotated[str, _flag(_HOW, "linf, l2, l1, l0 (a count of changed entries) or flow (displacement in pixels).")]
Eps = Annotated[str | None, _flag(_HOW, _EPS)]
Attack = Annotated[str, _flag(_HOW, _ATTACK)]
Targeted = Annotated[bool, _flag(_HOW, "The wrong class is chosen beforehand.", "--targeted")]
Gradient = Annotated[str | None, _flag(_HOW, _GRADIENT)]
Eot = Annotated[int, _flag(_HOW, "Draws averaged per gradient of a stochastic defence.", min=1)]

Surrogate = Annotated[str | None, _flag(_HOW, "Models to search on instead, separated by commas: transfer.")]
Fusion = Annotated[str, _flag(_HOW, "What several surrogates' answers are averaged as: logits or probabilities.")]
Access = Annotated[str | None, _flag(_HOW, "gradient, scores or decision; left out: what the attack needs.")]
Budget = Annotated[int | None, _flag(_HOW, "The most queries one sample may cost.", "--query-budget", min=1)]

Rule = Annotated[str, _flag(_VERDICT, "auto, single, mean, majority or worst.")]
Draws = Annotated[int, _flag(_VERDICT, "Fresh draws per verdict of a stochastic defence.", min=1)]
Seed = Annotated[int, _flag(_VERDICT, "The seed of every random number of the run.")]

BatchSize = Annotated[str, _flag(_RUN, "auto, or samples per batch; results do not depend on it.")]
Precision = Annotated[
    str, _flag(_RUN, "float32, or bf16 for the search only: not a reference, and slow without bf16 hardware.")
]
ChannelsLast = Annotated[
    bool, _flag(_RUN, "Lay convolutions out channels-last on a CPU.", "--channels-last/--no-channels-last")
]
Compile = Annotated[bool, _flag(_RUN, "Compile the model first.", "--compile")]
Device = Annotated[str, _flag(_RUN, "cpu, cuda, cuda:1, mps, ...")]
Out = Annotated[str | None, _flag(_RUN, "The run's folder (any fsspec path); the same line again resumes.")]
Show = Annotated[Progress, _flag(_RUN, "How progress is shown, on standard error.", "--progress")]
Quiet = Annotated[bool, _flag(_RUN, "No progress and no table: only errors.", "--quiet", "-q")]
Save = Annotated[Pictures | None, _flag(_RUN, "Save adversarial inputs: png (8 bit) or npz (float32).")]
Calibration = Annotated[bool, _flag(_RUN, "Also print what confidence is worth, clean and attacked.", "--calibration")]
Diagnostics = Annotated[bool, _flag(_RUN, "Run the cheap suspicion checks.", "--diagnostics/--no-diagnostics")]
