"""All that is said about the confidence of one set of predictions, as plain data for the report and the exports."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from maodun.arena.calibration import calibrate
from maodun.arena.confidence import abstention, auroc, classwise_ece, entropies, held_out, spread


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rescaled(_Data):
    """The same predictions after the best temperature: logits divided by `temperature`, fitted on other samples.

    `fitted_on` says on which inputs: the clean ones, as a defender would, or the attacked ones, as nobody can.
    """

    fitted_on: Literal["clean", "attacked"]
    temperature: float
    ece: float
    over: float
    under: float
    brier: float
    nll: float


class Calibration(_Data):
    """Confidence quality of `n` predictions.

    `ece` is the expected calibration error over 15 equal-width bins, `ece_mass` over bins of equal mass, `classwise`
    that of every class's probability; `over` and `under` split `ece` into over- and under-confidence; `mce` is the
    largest gap of a bin. `brier` (0 to 2) and `nll` (nats) score the probabilities, `confidence` and `accuracy` are
    means; `entropy_right` and `entropy_wrong` mean entropies in nats. `auroc` is how often a right answer is surer than
    a wrong one, `aurc` the area under the risk-coverage curve (`aurc_best`: the least at this accuracy) and `coverage`
    (accuracy, largest share that can be answered at it). `intervals` are 95 % bootstrap intervals of ece, over, under
    and gap = confidence - accuracy; `rescaled` what the best temperature makes of it. None where nothing can be said.
    """

    ece: float
    brier: float
    nll: float
    n: int
    ece_mass: float | None = None
    over: float | None = None
    under: float | None = None
    mce: float | None = None
    classwise: float | None = None
    confidence: float | None = None
    accuracy: float | None = None
    entropy_right: float | None = None
    entropy_wrong: float | None = None
    auroc: float | None = None
    aurc: float | None = None
    aurc_best: float | None = None
    coverage: list[tuple[float, float]] = []
    intervals: dict[str, tuple[float, float]] = {}
    rescaled: list[Rescaled] = []

    def after(self, fitted_on: str) -> Rescaled | None:
        """Return what a temperature fitted on clean or attacked inputs makes of it, None where none was fitted."""
        return next((each for each in self.rescaled if each.fitted_on == fitted_on), None)


def profile(probs: NDArray[Any], labels: NDArray[Any], clean: NDArray[Any] | None = None) -> Calibration | None:
    """Return the calibration of N x C probabilities, None for no samples or for values that are not finite.

    `clean` (N x C) are the predictions on the clean inputs of the same samples, where `probs` are those under attack.
    """
    if len(labels) == 0 or not np.isfinite(probs).all():
        return None
    p, y = torch.from_numpy(np.array(probs)), torch.from_numpy(np.array(labels)).long()
    scores, kept = calibrate(p, y), abstention(p, y)
    right, wrong = entropies(p, y)
    confidence, predicted = p.double().max(1)
    return Calibration(
        ece=scores.ece,
        brier=scores.brier,
        nll=scores.nll,
        n=scores.n,
        ece_mass=scores.ece_mass,
        over=scores.over,
        under=scores.under,
        mce=scores.mce,
        classwise=classwise_ece(p, y),
        confidence=float(confidence.mean()),
        accuracy=float((predicted == y).double().mean()),
        entropy_right=right,
        entropy_wrong=wrong,
        auroc=auroc(p, y),
        aurc=kept.aurc,
        aurc_best=kept.aurc_best,
        coverage=sorted(kept.coverage.items()),
        intervals=spread(p, y),
        rescaled=list(_rescaled(p, y, clean)),
    )


def tempered_probs(
    probs: NDArray[Any], labels: NDArray[Any], fitted_on: NDArray[Any]
) -> tuple[float, NDArray[np.float64]] | None:
    """Return the best temperature for `fitted_on` and N x C `probs` after it; None for fewer than four samples."""
    if len(labels) < 4 or not (np.isfinite(probs).all() and np.isfinite(fitted_on).all()):
        return None
    arrays = (torch.from_numpy(np.array(each)) for each in (probs, labels, fitted_on))
    temperature, scaled = held_out(*arrays)
    return temperature, scaled.numpy()


def _rescaled(p: Tensor, y: Tensor, clean: NDArray[Any] | None) -> list[Rescaled]:
    found = []
    kinds: dict[Literal["clean", "attacked"], NDArray[Any]] = {"clean": p.numpy() if clean is None else clean}
    if clean is not None:
        kinds["attacked"] = p.numpy()
    for kind, fitted_on in kinds.items():
        made = tempered_probs(p.numpy(), y.numpy(), fitted_on)
        if made is not None:
            s = calibrate(torch.from_numpy(made[1]), y)
            found.append(
                Rescaled(
                    fitted_on=kind, temperature=made[0], ece=s.ece, over=s.over, under=s.under, brier=s.brier, nll=s.nll
                )
            )
    return found
