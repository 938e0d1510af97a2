"""The functions of the package that predict, measure devices and decide, without training, as in `moejax.api`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.api import Directory, check_kinds
from moejax.config.experiment import Experiment, Pair
from moejax.progress import SILENT, Progress


def plan(
  experiment: Experiment,
  topology: str,
  *,
  slices: int = 1,
  calibration: Directory | None = None,
  progress: Progress = SILENT,
) -> Any:
  """Predicts step time and memory on a topology such as `v5p:4x8x8` or `gpu:h100:8`. Returns a Plan.

  Since it compiles for devices that are not present, call it before anything else uses JAX, or set JAX_PLATFORMS=cpu.
  `calibration` is a file of measured step times (see `calibrate`).

  Raises:
    UserError: If the topology is unknown, the mesh does not use all its devices, or the compiler is not installed.
  """
  check_kinds(experiment)
  described = described_topology(topology, slices, calibration)
  from moejax.planning.plan import plan as predict

  return predict(experiment, described, progress)


def match(
  dense: Experiment,
  moe: Experiment,
  topology: str,
  *,
  slices: int = 1,
  tolerance: float = 0.05,
  calibration: Directory | None = None,
  progress: Progress = SILENT,
) -> Any:
  """Varies the `matchable` fields of an MoE until its predicted step time equals that of the dense model. Returns a
  `moejax.comparison.pod_match.PodMatch`, whose `experiment` is the matched experiment.

  Raises:
    UserError: If a plan is not possible (see `plan`), or no value of a matchable field fits in memory.
  """
  check_kinds(moe)
  check_kinds(dense)
  pair, described = Pair(dense=dense, candidates=(moe,)), described_topology(topology, slices, calibration)
  from moejax.comparison.pod_match import match_on_pod

  return match_on_pod(pair, described, tolerance, progress)


def calibrate(file: Directory, *, progress: Progress = SILENT) -> Any:
  """Measures products, copies, attention and grouped products on the first device of this machine, in a few minutes,
  and writes them to a file that `plan` and `match` take as `calibration`: a `moejax.planning.calibration.Calibrated`.

  The file keeps what it has of other chips, and measured steps.

  Raises:
    UserError: plans do not know the device, or the file is damaged.
  """
  from moejax.planning.calibration import add_operations
  from moejax.planning.timed_operations import local_chip, time_operations

  chip = local_chip()
  return add_operations(pathlib.Path(file), chip, *time_operations(chip, progress))


def fit(runs: Sequence[str], *, seed: int = 0, progress: Progress = SILENT) -> Any:
  """Fits Chinchilla's law and the joint law of dense and MoE models to finished runs, and weighs published laws by the
  runs. Returns a `moejax.scaling.ensemble.Fitted`.

  Args:
    runs: directories of finished runs or comparisons, or JSON files with a list of runs.
    seed: seed of the bootstrap.
    progress: receives progress reports.

  Raises:
    UserError: If there are too few runs, or they were scored on different text.
  """
  from moejax.scaling.ensemble import fit_ensemble
  from moejax.scaling.finished_runs import read_runs

  return fit_ensemble(read_runs([pathlib.Path(run) for run in runs]), seed, progress=progress)


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
  calibration: Directory | None = None,
  progress: Progress = SILENT,
) -> Any:
  """Decides between dense and MoE models for a topology and a budget. Returns a `moejax.decision.decide.Decision`.

  Args:
    experiments: at least one dense and one MoE experiment, which are varied over the search space.
    topology: topology such as `v5p:4x8x8`.
    days: days of training. Give either this or `money`.
    money: the price of training.
    price_per_chip_hour: price in any currency.
    space: values by the names of the fields of `moejax.decision.search_space.Space`, such as `{"experts": [16, 64]}`.
    runs: finished runs to fit laws to, as for `fit`.
    measure: directories of trained dense and MoE runs, whose decoding is measured to correct the cost of serving.
    compile: whether to compile the best models. Otherwise, step times are by formula.
    seed: seed of the simulation.
    slices: number of slices.
    calibration: file of measured step times (see `calibrate`).
    progress: receives progress reports.

  Raises:
    UserError: If no dense or no MoE variant fits on the topology, or an argument is not valid.
  """
  for experiment in experiments:
    check_kinds(experiment)
  decoding: Any = ()
  if measure:  # before the environment is prepared for topologies, which hides accelerators
    from moejax.decision.measured_decoding import measure_decoding

    decoding = measure_decoding([pathlib.Path(run) for run in measure], progress)
  described = described_topology(topology, slices, calibration)
  from moejax.decision.decide import decide as find_best
  from moejax.decision.decide import make_budget
  from moejax.decision.search_space import make_space

  budget, searched = make_budget(described, days, money, price_per_chip_hour), make_space(space or {})
  fitted = fit(runs, seed=seed, progress=progress) if runs else None
  return find_best(
    experiments,
    described,
    budget,
    searched,
    fitted=fitted,
    measured=decoding,
    compile=compile,
    seed=seed,
    progress=progress,
  )


def check_claim(file: Directory, topology: str | None = None, *, slices: int = 1, seed: int = 0) -> Any:
  """Restates a published claim about dense and MoE models, in a JSON file, at equal step time. Returns a
  `moejax.decision.published_claim.CheckedClaim`.

  `topology` is the topology of the step times. If None, they are those of the claim.

  Raises:
    UserError: If the file is not a valid claim.
  """
  described = None if topology is None else described_topology(topology, slices)
  from moejax.decision.published_claim import check_claim as restate

  return restate(pathlib.Path(file), described, seed)


def described_topology(name: str, slices: int, calibration: Directory | None = None, to_record: bool = False) -> Any:
  """The topology with this name. Sets the environment variables that JAX and libtpu read when they are imported.

  If a calibration file is given, it must have measurements of this chip, unless they are still `to_record`.
  """
  from moejax.planning.calibration import calibrated
  from moejax.planning.topology import parse_topology, prepare_environment

  topology = parse_topology(name, slices)
  prepare_environment(topology)
  return calibrated(topology, None if calibration is None else pathlib.Path(calibration), to_record)
