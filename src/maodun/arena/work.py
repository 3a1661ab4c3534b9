"""One unit of work: a shard of samples through the clean pass or through one cell, written whole to the store.

A unit depends on nothing but the arena and its own samples, so any process may do it, in any order, again and again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from maodun.arena.fallback import or_static
from maodun.arena.plan import Cell, Unit, clean_folder
from maodun.arena.recipe import ThreatSpec
from maodun.arena.setup import Arena, Shield
from maodun.arena.store import part_name
from maodun.arena.surrogates import for_shield, search
from maodun.core import geometry
from maodun.core.engine import Candidates, Progress
from maodun.core.memory import PeakMemory
from maodun.core.rejection import doubt, fold, may_reject
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.verdict import fresh_logits, judge

CLEAN = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("label", pa.int64()),
        ("pred", pa.int64()),
        ("correct", pa.bool_()),
        ("probs", pa.list_(pa.float32())),
        ("logits", pa.list_(pa.float32())),
        ("draw_preds", pa.list_(pa.int64())),
        ("doubt", pa.float32()),
    ]
)
RECORDS = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("label", pa.int64()),
        ("clean_pred", pa.int64()),
        ("clean_correct", pa.bool_()),
        ("clean_probs", pa.list_(pa.float32())),
        ("adv_pred", pa.int64()),
        ("adv_correct", pa.bool_()),
        ("adv_probs", pa.list_(pa.float32())),
        ("success", pa.bool_()),
        ("success_draws", pa.int64()),
        ("draw_flags", pa.list_(pa.bool_())),
        ("draws", pa.int64()),
        ("fell", pa.bool_()),
        ("target", pa.int64()),
        ("distance", pa.float32()),
        ("distance_linf", pa.float32()),
        ("distance_l2", pa.float32()),
        ("rho", pa.float32()),
        ("status", pa.string()),
        ("audited", pa.bool_()),
        ("overturned", pa.bool_()),
        ("forwards", pa.int64()),
        ("backwards", pa.int64()),
        ("queries", pa.int64()),
        ("seconds", pa.float32()),
        ("memory", pa.float32()),
        ("clean_doubt", pa.float32()),
        ("adv_doubt", pa.float32()),
    ]
)


def execute(arena: Arena, unit: Unit, progress: Progress | None = None) -> None:
    """Do one unit and write its part; an attack unit needs the clean part of its shard to be there."""
    if unit.cell is None:
        _clean_pass(arena, unit)
    else:
        _attack_pass(arena, unit, unit.cell, progress)


def _clean_pass(arena: Arena, unit: Unit) -> None:
    shield = arena.shields[unit.shield]
    x, y, ids = arena.rows(unit.shard)
    rule = arena.rule(shield)
    answer = fresh_logits(arena.oracle(shield), x, seed=arena.recipe.seed, ids=ids, draws=rule.draws)
    rejects = may_reject(shield.model)
    # What is kept is as an adversary counts it; what is right is as a user does, to whom a refusal is no answer.
    logits = fold(answer, y) if rejects else answer
    probs, predictions = logits.softmax(2).mean(1), logits.argmax(2)
    raw = answer.softmax(2).mean(1)
    wrong = rule.wrong(answer.argmax(2) != y[:, None], raw, y, None)
    columns = {
        "sample_id": _array(ids),
        "label": _array(y),
        "pred": _array(raw.argmax(1)),
        "correct": _array(~wrong),
        "probs": _lists(probs),
        "logits": _lists(logits[:, 0]),
        "draw_preds": _lists(predictions),
        "doubt": _array(doubt(answer).mean(1) if rejects else torch.full((len(ids),), torch.nan)),
    }
    arena.store.write_table(unit.part, columns, CLEAN)


class Clean:
    """The clean pass of a shard as tensors: `probs` N x C, `logits` N x C of one draw, `draws` N x K classes.

    `correct` and `pred` are the shield's answer, in which the class after the last is a refusal; of a shield that may
    reject, all else is as `core.rejection.fold` counts it, and `doubt` (N,) is positive where it rejects (else NaN).
    """

    def __init__(self, arena: Arena, shield: Shield, shard: int) -> None:
        table = arena.store.read_table([f"{clean_folder(shield.label)}/{part_name(shard)}.parquet"])
        self.correct = _tensor(table, "correct", arena)
        self.pred = _tensor(table, "pred", arena)
        self.probs = _tensor(table, "probs", arena)
        self.logits = _tensor(table, "logits", arena)
        self.draws = _tensor(table, "draw_preds", arena)
        self.doubt = _tensor(table, "doubt", arena)


def choose_targets(threat: ThreatSpec, probs: Tensor, y: Tensor, ids: Tensor, seed: int) -> Tensor | None:
    """Return the class each sample is to be turned into (N,), None for an untargeted threat.

    A function of seed, id and clean prediction alone, so every spear is given the same goal.
    """
    if not threat.targeted:
        return None
    classes = probs.shape[1]
    if threat.goal == "random":
        offset = Stream(seed, "arena/target").integers(ids, (), max(1, classes - 1)).to(y.device)
        return (y + 1 + offset) % classes
    own = torch.nn.functional.one_hot(y, classes).bool()
    if threat.goal == "least_likely":
        return probs.masked_fill(own, torch.inf).argmin(1)
    return probs.masked_fill(own, -torch.inf).argmax(1)


def _attack_pass(arena: Arena, unit: Unit, cell: Cell, progress: Progress | None) -> None:
    shield, seed = arena.shields[unit.shield], arena.recipe.seed
    x, y, ids = arena.rows(unit.shard)
    clean = Clean(arena, shield, unit.shard.number)
    targets = choose_targets(cell.threat, clean.probs, y, ids, seed)
    with PeakMemory(arena.device) as peak:
        if cell.spec.surrogate:
            found, targets = _transferred(arena, unit, cell, clean, progress)
        else:
            found = cell.attack.run(
                arena.oracle(shield, cell),
                x,
                y,
                cell.core_threat,
                targets=targets,
                seed=seed,
                ids=ids,
                # The draws of a stochastic model's clean pass are the verdict's, which no search may see.
                clean_logits=None if shield.stochastic else clean.logits,
                check_model=False,
                progress=progress,
            )
            if cell.fallback:
                found = or_static(
                    cell.attack, arena.oracle(shield, cell), x, y, cell.core_threat, found,
                    targets=targets, seed=seed, ids=ids, progress=progress,
                )  # fmt: skip
    columns = {
        "sample_id": _array(ids),
        "label": _array(y),
        "clean_pred": _array(clean.pred),
        "clean_correct": _array(clean.correct),
        "clean_probs": _lists(clean.probs),
        "target": _array(torch.full_like(y, -1) if targets is None else targets),
        **_verdict(arena, shield, cell, clean, (x, y, ids, targets), found),
        **_distances(cell, x, found.x_adv),
        **_cost(found),
        "memory": np.full(len(y), peak.mebibytes, dtype=np.float32),
    }
    if arena.recipe.adversarials:
        # The arrays go first: the records' part is what says that the shard is finished.
        name = f"adversarials/{cell.name}/{part_name(unit.shard.number)}.npz"
        arena.store.write_arrays(name, x=_array(x), x_adv=_array(found.x_adv), ids=_array(ids))
    arena.store.write_table(unit.part, columns, RECORDS)


def _transferred(
    arena: Arena, unit: Unit, cell: Cell, clean: Clean, progress: Progress | None
) -> tuple[Candidates, Tensor | None]:
    """Return what a search on surrogates sends to the shield, and its targets."""
    x, y, ids = arena.rows(unit.shard)

    def aim(probs: Tensor) -> Tensor | None:
        return choose_targets(cell.threat, probs, y, ids, arena.recipe.seed)

    found, targets = search(arena, cell, unit.shard, aim, progress)
    flags = clean.draws != y[:, None] if targets is None else clean.draws == targets[:, None]
    wrong = arena.rule(arena.shields[unit.shield]).wrong(flags, clean.probs, y, targets)
    return for_shield(found, x, wrong), targets


def _verdict(
    arena: Arena,
    shield: Shield,
    cell: Cell,
    clean: Clean,
    samples: tuple[Tensor, Tensor, Tensor, Tensor | None],
    found: Candidates,
) -> dict[str, Any]:
    """Judge the candidates that moved; an unmoved one meets the very draws of the clean pass again.

    Least-distance candidates are judged at any distance, because curves and medians need them; inside the ball counts
    what was found there, outside of it the clean input, which the adversary may always send instead.
    """
    x, y, ids, targets = samples
    rule, threat = arena.rule(shield), cell.core_threat
    flags = clean.draws != y[:, None] if targets is None else clean.draws == targets[:, None]
    probs, fell = clean.probs.clone(), torch.zeros_like(clean.correct)
    refusal = clean.doubt.clone()
    flags, success = flags.clone(), rule.wrong(flags, clean.probs, y, targets)
    moved = (found.x_adv != x).flatten(1).any(1).nonzero().squeeze(1)
    if moved.numel():
        verdict = judge(
            arena.oracle(shield),
            found.x_adv[moved],
            x[moved],
            y[moved],
            threat.with_eps(float("inf")),
            targets=None if targets is None else targets[moved],
            rule=rule,
            seed=arena.recipe.seed,
            ids=ids[moved],
        )
        inside = threat.contains(found.x_adv[moved], x[moved])
        rows = moved[inside]
        flags[rows], probs[rows] = verdict.flags[inside], verdict.probs[inside]
        success[rows] = verdict.success[inside]
        if verdict.doubt is not None:
            refusal[rows] = verdict.doubt[inside]
        fell[moved] = verdict.success if cell.attack.kind == "minimum" else verdict.success & inside
    return {
        "adv_pred": _array(torch.where(refusal > 0, probs.shape[1], probs.argmax(1))),
        "adv_correct": _array(~success if targets is None else probs.argmax(1) == y),
        "adv_probs": _lists(probs),
        "success": _array(success),
        "success_draws": _array(flags.sum(1)),
        "draw_flags": _lists(flags),
        "draws": _array(torch.full_like(y, flags.shape[1])),
        "fell": _array(fell),
        "clean_doubt": _array(clean.doubt),
        "adv_doubt": _array(refusal),
    }


def _distances(cell: Cell, x: Tensor, x_adv: Tensor) -> dict[str, Any]:
    change = x_adv - x
    l2 = geometry.norms(change, "l2")
    return {
        "distance": _array(cell.core_threat.distance(x_adv, x)),
        "distance_linf": _array(geometry.norms(change, "linf")),
        "distance_l2": _array(l2),
        "rho": _array(l2 / geometry.norms(x, "l2").clamp(min=1e-12)),
    }


def _cost(found: Candidates) -> dict[str, Any]:
    samples = found.status.shape[0]
    return {
        "status": [Status(int(code)).name for code in found.status.tolist()],
        **{name: _array(_flags(found, name)) for name in ("audited", "overturned")},
        "forwards": _array(found.forwards),
        "backwards": _array(found.backwards),
        "queries": _array(found.queries),
        "seconds": np.full(samples, found.seconds / max(1, samples), dtype=np.float32),
    }


def _flags(found: Candidates, name: str) -> Tensor:
    """Return a search's own (N,) account of its shortcuts, all False where it took none."""
    flags: Tensor | None = getattr(found, name, None)
    return torch.zeros_like(found.found) if flags is None else flags


def _array(values: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(values.detach().cpu().numpy())


def _lists(values: Tensor) -> pa.Array:
    """Return an N x C tensor as an arrow list column."""
    flat = _array(values).reshape(-1)
    offsets = np.arange(0, flat.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(flat))


def _tensor(table: pa.Table, name: str, arena: Arena) -> Tensor:
    return torch.from_numpy(column(table, name)).to(arena.device)


def column(table: pa.Table, name: str) -> NDArray[Any]:
    """Return a column as a numpy array of its own: N, or N x C for lists of equal length."""
    data = table[name].combine_chunks()
    if pa.types.is_list(data.type):
        flat = data.flatten().to_numpy(zero_copy_only=False)
        return np.array(flat).reshape(len(data), -1)
    return np.array(data.to_numpy(zero_copy_only=False))
