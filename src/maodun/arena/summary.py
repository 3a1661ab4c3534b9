"""What a run amounts to, as plain data: the only thing the report and the exports read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from maodun.arena.calibrated import Calibration

if TYPE_CHECKING:
    from maodun.arena.store import Store


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rate(_Data):
    """A share of `n` samples with its two-sided confidence interval (`low`, `high`; all in [0, 1])."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n = {self.n})"


class Rejection(_Data):
    """What a shield that may refuse to answer did in a cell.

    `coverage` is the share of clean inputs it answers, `accuracy` how many of those it answers rightly, `accepted` the
    share of changed inputs it answers, `usable` the share of samples answered rightly without the attack and not fooled
    by it, `auroc` how well its doubt tells changed inputs from clean ones (None when none was changed). `risk` is the
    risk-coverage curve of clean inputs as (coverage, share of mistakes among that share of them that is doubted least),
    up to the coverage at which it works.
    """

    coverage: Rate
    accuracy: Rate
    accepted: Rate
    usable: Rate
    auroc: float | None
    risk: list[tuple[float, float]] = []


class CellSummary(_Data):
    """One spear against one shield under one threat.

    `asr_all` divides verdict successes by all samples (clean errors count as successes), `asr_correct`
    divides the successes among initially correct samples by the number of initially correct samples.
    Distances are medians over the samples that fell; `rho` is DeepFool's mean of ||r||_2 / ||x||_2 over them.
    Counts are means per sample; `seconds` is the total for the cell. Of a search on `surrogates` (specifications) they
    are what it cost there; `hooks` is the spear without them, `white_box` says that the shield was among them.
    `rejection` is there for shields that may refuse to answer: of these, a success is an input accepted and wrong.
    """

    cell: str
    shield: str
    spear: str
    norm: str
    eps: float | None
    targeted: bool
    rule: str
    draws: int
    clean: Rate
    robust: Rate
    asr_all: Rate
    asr_correct: Rate
    median_distance: float | None
    rho: float | None
    forwards: float
    backwards: float
    queries: float
    seconds: float
    statuses: dict[str, int]
    calibration_clean: Calibration | None
    calibration_adversarial: Calibration | None
    reference: bool
    command: str
    surrogates: list[str] = []
    hooks: str = ""
    white_box: bool = False
    rejection: Rejection | None = None


class WorstCase(_Data):
    """A shield under a threat against all its spears at once: a sample is robust when no spear felled it."""

    shield: str
    norm: str
    eps: float | None
    clean: Rate
    robust: Rate
    strongest: str
    targeted: bool = False


class Curve(_Data):
    """Robust accuracy against radius for one spear and shield (from least distances or several radii)."""

    shield: str
    spear: str
    norm: str
    eps: list[float]
    robust: list[float]


class Reliability(_Data):
    """A reliability diagram: per bin mean confidence, accuracy and count; `kind` is clean or adversarial.

    `temperature` None is the shield as it is; otherwise its logits were divided by it, which was fitted on clean inputs
    of other samples. The threat (`norm`, `eps`, `targeted`) is that of the attack; clean inputs have none (`norm` is
    empty).
    """

    shield: str
    spear: str
    kind: str
    confidence: list[float]
    accuracy: list[float]
    count: list[int]
    temperature: float | None = None
    norm: str = ""
    eps: float | None = None
    targeted: bool = False


class Finding(_Data):
    """A diagnostic's sentence with the next action; `level` is ok, note, warning or alarm."""

    name: str
    level: str
    shield: str
    spear: str | None
    sentence: str
    action: str


class Trial(_Data):
    """A remedy tried on the first samples: what is left standing, and the sign test that it beats the plain attack.

    `only` fell to the remedy and not to the plain attack, `missed` the other way round.
    """

    name: str
    mends: str
    standing: Rate
    only: int
    missed: int
    p: float


class Surface(_Data):
    """Margins in a plane through a sample: rows along the gradient's steepest direction, columns along a random one.

    `places` are the coordinates of both, in radii; a positive margin is a mistake.
    """

    sample_id: int
    places: list[float]
    margins: list[list[float]]


class Diagnosis(_Data):
    """Whether a shield's number can be believed under one norm: `verdict` is holds, not shown or masked.

    `plain` is what stands against PGD on the cross-entropy, `bound` against all trials together. `agreement` are
    (step, share) pairs: how often gradient and finite differences of that step agree.
    """

    shield: str
    norm: str
    eps: float
    verdict: str
    sentence: str
    action: str
    plain: Rate
    bound: Rate
    trials: list[Trial]
    agreement: list[tuple[float, float]]
    surface: Surface


class TransferRow(_Data):
    """What one search sent to every target: `cells` in the order of the matrix's targets, None where not run.

    `mean` is the mean ASR over the targets that are not among the surrogates, None when there is none.
    """

    spear: str
    hooks: str
    surrogates: list[str]
    cells: list[CellSummary | None]
    mean: float | None


class TransferMatrix(_Data):
    """Searches on surrogates against `targets` under one threat; `clean` are the targets' clean accuracies.

    A cell's `asr_correct` counts the samples that the target answers correctly, with their interval.
    """

    norm: str
    eps: float | None
    targeted: bool
    targets: list[str]
    clean: list[Rate]
    rows: list[TransferRow]


class LadderRow(_Data):
    """One spear on its rung against a stochastic shield: robust accuracy under every rule, over `draws` fresh draws.

    `single` estimates one fresh draw by all of them; `resubmission` are (R, accuracy) when the adversary may try R
    times. `known` is the accuracy in the very draw that an adversary on the last rung knew. Calls are means per
    sample; `nfe` are network evaluations of the defence, `seconds` per sample, `memory` the peak in MiB.
    Rung -1 is no attack.
    """

    rung: int
    title: str
    spear: str
    cell: str
    draws: int
    eot: int
    single: Rate
    mean: Rate
    majority: Rate
    worst: Rate
    resubmission: list[tuple[int, float]]
    known: Rate | None
    forwards: float
    backwards: float
    nfe: float
    seconds: float
    memory: float | None


class Ladder(_Data):
    """What every rung left of a stochastic shield under one threat, from no attack upwards."""

    shield: str
    norm: str
    eps: float | None
    targeted: bool
    rows: list[LadderRow]


class Picture(_Data):
    """Where to find an adversarial example: cell folder, row in its npz part, labels and predictions."""

    cell: str
    shield: str
    spear: str
    part: str
    row: int
    sample_id: int
    label: int
    clean_pred: int
    adv_pred: int
    distance: float


class RunSummary(_Data):
    """A whole run: where it came from, cells, worst cases, curves, calibration, findings, pictures."""

    name: str
    created: str
    command: str
    seed: int
    versions: dict[str, str]
    data: dict[str, str]
    shields: dict[str, dict[str, str]]
    classes: list[str]
    complete: bool
    cells: list[CellSummary]
    worst: list[WorstCase]
    curves: list[Curve]
    reliability: list[Reliability]
    findings: list[Finding]
    pictures: list[Picture]
    ladders: list[Ladder] = []
    diagnoses: list[Diagnosis] = []

    @property
    def transfer(self) -> list[TransferMatrix]:
        """A matrix per threat of what searches on surrogates did to each shield; empty when no spear had any."""
        cells = [cell for cell in self.cells if cell.surrogates]
        threats = dict.fromkeys((cell.norm, cell.eps, cell.targeted) for cell in cells)
        return [
            _transfer([cell for cell in cells if (cell.norm, cell.eps, cell.targeted) == threat]) for threat in threats
        ]

    @property
    def clean(self) -> Rate:
        """The clean accuracy of the first shield; of a run with one shield, simply the clean accuracy."""
        return self.worst[0].clean

    @property
    def robust(self) -> Rate:
        """The worst-case robust accuracy of the first shield under the first threat."""
        return self.worst[0].robust


def _transfer(cells: list[CellSummary]) -> TransferMatrix:
    """Return the matrix of the cells of one threat."""
    by_target: dict[str, CellSummary] = {}
    for cell in cells:
        by_target.setdefault(cell.shield, cell)
    rows = []
    for spear in dict.fromkeys(cell.spear for cell in cells):
        own = {cell.shield: cell for cell in cells if cell.spear == spear}
        first = next(iter(own.values()))
        black = [cell.asr_correct.value for cell in own.values() if not cell.white_box and cell.asr_correct.n]
        rows.append(
            TransferRow(
                spear=spear,
                hooks=first.hooks,
                surrogates=first.surrogates,
                cells=[own.get(target) for target in by_target],
                mean=sum(black) / len(black) if black else None,
            )
        )
    return TransferMatrix(
        norm=cells[0].norm,
        eps=cells[0].eps,
        targeted=cells[0].targeted,
        targets=list(by_target),
        clean=[cell.clean for cell in by_target.values()],
        rows=rows,
    )


def summarise(store: Store | str) -> RunSummary:
    """Return what the parts of a store amount to so far; an interrupted run gives an incomplete summary.

    `store` may be the path of a run's folder. Raises StoreError when it holds no run.
    """
    from maodun.arena.account import account

    return account(store)
