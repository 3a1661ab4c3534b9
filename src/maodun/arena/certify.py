"""Certification of a model on data, shard by shard into a folder: safe to kill, and the same call resumes."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from maodun.arena.certified import Certified, summarise_certificates
from maodun.arena.ladder import evaluations
from maodun.arena.progress import Watcher, watcher
from maodun.arena.recipe import DataSpec
from maodun.arena.setup import usable_device, versions
from maodun.arena.shield_recipe import ShieldSpec
from maodun.arena.shields import shield_model
from maodun.arena.store import Store, part_name
from maodun.core import admission, context
from maodun.core.errors import InputError
from maodun.core.memory import PeakMemory
from maodun.core.modes import evaluation_mode
from maodun.core.oracle import granted
from maodun.core.rejection import may_reject
from maodun.core.streams import Stream
from maodun.defenses.smoothing import certify
from maodun.defenses.smoothing.bounds import check_confidence, check_sigma

if TYPE_CHECKING:
    from maodun.zoo import Dataset

IDENTITY = ("certificate", "data", "weights")
SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("label", pa.int64()),
        ("prediction", pa.int64()),
        ("radius", pa.float64()),
        ("share", pa.float64()),
        ("votes", pa.int64()),
        ("seconds", pa.float32()),
        ("memory", pa.float32()),
    ]
)


class CertifyPlan(BaseModel):
    """What is certified: `shield` under Gaussian noise of `sigma` (outside of its defence) on `data`, in l2.

    `guesses` draws choose the class, `draws` others bound its probability, wrongly with probability `alpha` at most
    per sample. `shard_size` samples are one unit of resumable work. InputError for a sigma or alpha that cannot be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSpec
    shield: ShieldSpec
    sigma: float
    draws: int = Field(default=10_000, ge=1)
    guesses: int = Field(default=100, ge=1)
    alpha: float = 0.001
    seed: int = 0
    shard_size: int = Field(default=16, ge=1)

    def digest(self) -> str:
        """Return the SHA-256 of the plan as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Room:
    plan: CertifyPlan
    data: Dataset
    model: nn.Module
    store: Store
    device: torch.device
    batch_size: int | None


def certify_model(
    plan: CertifyPlan,
    out: str | Path,
    *,
    command: str = "",
    device: str = "cpu",
    batch_size: int | None = None,
    progress: str | Watcher = "quiet",
    model: nn.Module | None = None,
    data: Dataset | None = None,
) -> Certified:
    """Certify what is missing of `plan` in the folder `out` and return what all of it amounts to.

    `model` and `data` replace what the plan names. `batch_size` counts evaluations under noise and changes no result.
    Raises InputError or StoreError before the first draw; an interrupt leaves every finished shard in the folder.
    """
    check_sigma(plan.sigma)
    check_confidence(plan.alpha)
    if plan.alpha ** (1.0 / plan.draws) <= 0.5:
        reason = f"cannot prove one half at alpha {plan.alpha:g}, so every sample would be abstained on"
        raise InputError(f"draws {plan.draws}", reason, "give at least 1000")
    watch, place = watcher(progress), usable_device(device)
    if data is None:
        from maodun.zoo import load_data

        data = load_data(plan.data.spec, split=plan.data.split, limit=plan.data.limit)
    if len(data) == 0:
        raise InputError(f"data '{data.spec}'", "holds no samples", "give at least one")
    defended, digest = shield_model(plan.shield, place, model)
    _admit(defended, data, place)
    store = Store(out)
    store.open_for(_manifest(plan, data, digest, defended, command), IDENTITY, 64 * 1024 + 200 * len(data))
    room = _Room(plan, data, defended, store, place, batch_size)
    shards = range(-(-len(data) // plan.shard_size))
    with watch:
        finished = sum(len(_rows(room, number)) for number in shards if store.exists(_part(number)))
        watch.begin(len(data), finished)
        for number in shards:
            if not store.exists(_part(number)):
                _shard(room, number, watch)
    return summarise_certificates(store)


def _part(number: int) -> str:
    return f"certificates/{part_name(number)}.parquet"


def _rows(room: _Room, number: int) -> range:
    start = number * room.plan.shard_size
    return range(start, min(start + room.plan.shard_size, len(room.data)))


def _shard(room: _Room, number: int, watch: Watcher) -> None:
    plan, rows = room.plan, _rows(room, number)
    part = slice(rows.start, rows.stop)
    title = f"sigma {plan.sigma:g}, samples {rows.start} to {rows.stop - 1}"
    watch.unit(title, len(rows))
    x, y, ids = (each[part].to(room.device) for each in (room.data.x, room.data.y, room.data.ids))
    started = time.perf_counter()
    with PeakMemory(room.device) as peak:
        found = certify(
            room.model, x, sigma=plan.sigma, draws=plan.draws, guesses=plan.guesses, alpha=plan.alpha, seed=plan.seed,
            ids=ids, batch_size=room.batch_size,
            on_batch=lambda done, total: watch.step("certify", done, total, len(rows)),
        )  # fmt: skip
    seconds = time.perf_counter() - started
    columns: dict[str, Any] = {
        "sample_id": ids, "label": y, "prediction": found.prediction, "radius": found.radius, "share": found.share,
        "votes": found.votes, "seconds": torch.full_like(y, seconds / len(rows), dtype=torch.float32),
        "memory": torch.full_like(y, peak.mebibytes, dtype=torch.float32),
    }  # fmt: skip
    room.store.write_table(_part(number), {name: each.cpu().numpy() for name, each in columns.items()}, SCHEMA)
    watch.finished(title, len(rows), f"in {seconds:.1f} s")


def _admit(model: nn.Module, data: Dataset, device: torch.device) -> None:
    """Refuse, before any long work, a model that decides elsewhere, may refuse to answer, or cannot take the data."""
    if granted(model) != "gradient":
        reason = "answers elsewhere, and certification asks thousands of times per sample"
        raise InputError("model", reason, "certify a model that runs here")
    if may_reject(model):
        raise InputError("model", "may refuse to answer, and a refusal has no radius", "leave the detector out")
    few = admission.check_inputs(data.x[:2]).to(device)
    try:
        ids = data.ids[:2].to(device)
        where = context.draw(Stream(0, "admission"), ids, torch.zeros_like(ids))
        with evaluation_mode(model), torch.no_grad(), where:
            classes = model(few).shape[1]
    except (RuntimeError, IndexError) as error:
        reason = f"cannot take inputs of shape {tuple(few.shape[1:])} ({str(error).splitlines()[0]})"
        raise InputError("model", reason, "check its input size and channels") from error
    if int(data.y.max()) >= classes:
        raise InputError("model", f"answers {classes} classes, the labels go up to {int(data.y.max())}", "check both")


def _manifest(plan: CertifyPlan, data: Dataset, digest: str, model: nn.Module, command: str) -> dict[str, Any]:
    return {
        "format": 1,
        "name": plan.shield.label,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "certificate": plan.model_dump(mode="json"),
        "versions": versions(),
        "data": {"spec": data.spec, "name": data.name, "sha256": data.sha256, "samples": len(data)},
        "weights": digest,
        "nfe": evaluations(model),
    }
