import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.api import compare as compare
from moejax.api import evaluate as evaluate
from moejax.api import export_model as export_model
from moejax.api import find as find
from moejax.api import generate as generate
from moejax.api import import_model as import_model
from moejax.api import prune as prune
from moejax.api import replace as replace
from moejax.api import sparsity as sparsity
from moejax.api import train as train
from moejax.comparison.pod_match import PodMatch
from moejax.config.experiment import Experiment
from moejax.decision.decide import Decision
from moejax.decision.published_claim import CheckedClaim
from moejax.planning.calibration import Calibrated
from moejax.planning.plan import Plan
from moejax.progress import Progress
from moejax.scaling.ensemble import Fitted

__version__: str
FUNCTIONS: tuple[str, ...]

def plan(
  experiment: Experiment,
  topology: str,
  *,
  slices: int = 1,
  calibration: str | pathlib.Path | None = None,
  progress: Progress = ...,
) -> Plan: ...
def decide(
  experiments: Sequence[Experiment],
  topology: str,
  *,
  days: float | None = None,
  money: float | None = None,
  price_per_chip_hour: float | None = None,
  space: Mapping[str, Any] | None = None,
  runs: Sequence[str] = (),
  measure: Sequence[str] = (),
  compile: bool = False,
  seed: int = 0,
  slices: int = 1,
  calibration: str | pathlib.Path | None = None,
  progress: Progress = ...,
) -> Decision: ...
def check_claim(
  file: str | pathlib.Path, topology: str | None = None, *, slices: int = 1, seed: int = 0
) -> CheckedClaim: ...
def fit(runs: Sequence[str], *, seed: int = 0, progress: Progress = ...) -> Fitted: ...
def calibrate(file: str | pathlib.Path, *, progress: Progress = ...) -> Calibrated: ...
def match(
  dense: Experiment,
  moe: Experiment,
  topology: str,
  *,
  slices: int = 1,
  tolerance: float = 0.05,
  calibration: str | pathlib.Path | None = None,
  progress: Progress = ...,
) -> PodMatch: ...
