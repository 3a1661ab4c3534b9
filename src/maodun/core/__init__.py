"""The rules of the game, which import nothing else of maodun.

threat: what may be changed · oracle, estimators: what may be asked, and how a gradient is had · problem, engine: one
loop for all searches · losses: what is climbed · verdict: whether it really succeeded · streams, context: randomness
keyed to samples · status, errors: how things end · geometry, sizing, admission: balls, batch sizes, refusals.
"""

from __future__ import annotations

from maodun.core.engine import Attack as Attack
from maodun.core.engine import Candidates as Candidates
from maodun.core.engine import State as State
from maodun.core.ensemble import Ensemble as Ensemble
from maodun.core.errors import InputError as InputError
from maodun.core.errors import MaodunError as MaodunError
from maodun.core.oracle import BPDA as BPDA
from maodun.core.oracle import EOT as EOT
from maodun.core.oracle import NES as NES
from maodun.core.oracle import SPSA as SPSA
from maodun.core.oracle import Budget as Budget
from maodun.core.oracle import Exact as Exact
from maodun.core.oracle import Oracle as Oracle
from maodun.core.problem import Problem as Problem
from maodun.core.status import Status as Status
from maodun.core.streams import Stream as Stream
from maodun.core.threat import Threat as Threat
from maodun.core.verdict import Rule as Rule
from maodun.core.verdict import Verdict as Verdict
from maodun.core.verdict import judge as judge
