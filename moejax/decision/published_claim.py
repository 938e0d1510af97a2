"""A published claim about dense and MoE models, restated at equal step time on a topology."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.config.parameters import tokens_per_step
from moejax.decision.candidates import placed
from moejax.decision.decide import LEVELS, clock_error
from moejax.decision.forecast import BreakEven, ClockError, Draws, Ensemble, Forecast, Timed
from moejax.errors import UserError, reason
from moejax.files import read_json
from moejax.lookup import find_experiment
from moejax.notebook import html_table
from moejax.planning.estimate import estimate
from moejax.planning.topology import Topology
from moejax.scaling.ensemble import published_weights
from moejax.scaling.laws import LAWS
from moejax.scaling.rows import check_row, shape_of_row
from moejax.scaling.shapes import Shape, shape_of

TEXTS = ("claim", "source")

COUNTS = ("active_parameters", "total_parameters", "expansion", "granularity", "flops_per_token")
CLOCKS = ("seconds", "mfu", "peak_flops")
KEYS = ("name", "experiment", "fields", "tokens", "loss", *COUNTS, *CLOCKS)
"""Keys of a run in a claim."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClaimedRun:
  """One model of a claim."""

  name: str
  timed: Timed
  tokens: float
  loss: float | None
  """Nats per token. None if only other scores are published."""
  clock: str
  """measured, MFU, or formula."""

  @property
  def seconds(self) -> float:
    return self.tokens * self.timed.seconds_per_token

  @property
  def flops(self) -> float:
    return self.tokens * self.timed.shape.training_flops


@dataclasses.dataclass(frozen=True)
class Meeting:
  """A dense model and an MoE with the same loss."""

  moe: str
  loss: float
  flops_ratio: float
  """Training FLOPs of the dense model divided by those of the MoE, interpolated between the dense runs."""
  time_ratio: float
  """The same for the training time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedClaim:
  """A claim as published, and at equal step time."""

  claim: str
  source: str
  where: str
  """The topology, or the hardware of the source."""
  dense: tuple[ClaimedRun, ...]
  """The smallest training time first."""
  sparse: tuple[ClaimedRun, ...]
  meetings: tuple[Meeting, ...]
  """The points at which MoE runs meet the curve of the dense runs, if there are several with losses."""
  gap: tuple[float, float, float]
  """Of the largest dense model and the largest MoE, trained for the time of the dense model: loss of the dense model
  minus that of the MoE, in nats: 10 %, median and 90 %."""
  published_gap: float | None
  """The same as published."""
  probability: float
  """Probability that the MoE has the lower loss after the time of the dense model."""
  break_even: BreakEven
  """When this MoE is more likely to be better than this dense model."""

  @property
  def sentences(self) -> list[str]:
    """The restatement in words."""
    dense, sparse = self.dense[-1], self.sparse[-1]
    per_token = sparse.timed.seconds_per_token / dense.timed.seconds_per_token
    per_flop = per_token / (sparse.timed.shape.training_flops / dense.timed.shape.training_flops)
    found = [
      f"per token, {sparse.name} takes {per_token:.3g} times as long as {dense.name} on {self.where} ({sparse.clock}), "
      f"and per FLOP {per_flop:.3g} times"
    ]
    for one in self.meetings:
      found.append(
        f"dense models reach the loss {one.loss:.3f} of {one.moe} with {one.flops_ratio:.3g} times its FLOPs, but in "
        f"{one.time_ratio:.3g} times its training time"
      )
    if self.published_gap is not None:
      found.append(f"as published, the loss of {sparse.name} is {_below(self.published_gap)} that of {dense.name}")
    low, middle, high = self.gap
    found.append(
      f"trained for the {_duration(dense.seconds)} of {dense.name}, the loss of {sparse.name} is {_below(middle)} that "
      f"of {dense.name} (80 % interval of the gap {low:+.3f} to {high:+.3f}), and it is better with probability "
      f"{self.probability:.2f}"
    )
    found.append(f"by the laws, {self.break_even.words(_duration)}")
    return found

  def _repr_html_(self) -> str:
    return html_table(self.claim, [("source", self.source), *((f"{i}", text) for i, text in enumerate(self.sentences))])

  def to_json(self) -> dict[str, Any]:
    """The content of `moejax check-claim --json FILE`."""
    return {
      "claim": self.claim,
      "source": self.source,
      "where": self.where,
      "sentences": self.sentences,
      "runs": [
        {"name": run.name, "kind": kind, "tokens": run.tokens, "flops": run.flops, "seconds": run.seconds,
         "loss": run.loss, "clock": run.clock}
        for kind, runs in (("dense", self.dense), ("moe", self.sparse)) for run in runs
      ],
      "meetings": [dataclasses.asdict(one) for one in self.meetings],
      "published_gap_nats": self.published_gap,
      "gap_nats": list(self.gap),
      "probability_moe_better": self.probability,
      "break_even_s": self.break_even.after,
      "better_until_s": self.break_even.until,
    }  # fmt: skip


def check_claim(path: pathlib.Path, topology: Topology | None, seed: int = 0) -> CheckedClaim:
  """Restates a claim. Without a topology, each run needs its training time or its MFU.

  The difference of losses at equal time is the published one, if there is one, plus the change that the laws predict
  from the published tokens to those of equal time; otherwise it is that of the laws.

  Raises:
    UserError: If the file is not a valid claim.
  """
  if seed < 0:
    raise UserError(f"--seed={seed} must be 0 or above")
  content = _read(path)
  sides = {
    kind: tuple(sorted((_run(path, kind, row, topology) for row in content[kind]), key=lambda run: run.seconds))
    for kind in ("dense", "moe")
  }
  dense, sparse = sides["dense"][-1], sides["moe"][-1]
  if not dense.timed.shape.is_dense or any(run.timed.shape.is_dense for run in sides["moe"]):
    raise UserError(f"{path}: the expansion must be 1 for dense runs, and above 1 for MoE runs")
  measured = {run.clock for runs in sides.values() for run in runs} <= {"measured", "MFU"}
  clock = ClockError(common=0.0, ratio=0.0) if measured or topology is None else clock_error(topology, formula=True)
  pair = dense.timed, sparse.timed
  ensemble = Ensemble(laws=tuple(LAWS.values()), weights=published_weights())
  forecast = Forecast(dense=pair[:1], sparse=pair[1:], ensemble=ensemble, clock=clock, draws=Draws.of(seed))
  gaps = forecast.advantages(*pair, dense.seconds)
  published = None if dense.loss is None or sparse.loss is None else dense.loss - sparse.loss
  # What the published losses add to the gap of each law at the published tokens.
  offsets = {} if published is None else {law: published - float(_gap(law, dense, sparse)) for law in gaps}
  gaps = {
    law: gap + offsets[law] - _constant_error(forecast, law, pair, dense.seconds) if offsets else gap
    for law, gap in gaps.items()
  }
  low, middle, high = forecast.quantiles(pair, gaps, LEVELS)
  return CheckedClaim(
    claim=content["claim"],
    source=content["source"],
    where=topology.name if topology else "its own hardware",
    dense=sides["dense"],
    sparse=sides["moe"],
    meetings=tuple(_meetings(sides["dense"], sides["moe"])),
    gap=(low, middle, high),
    published_gap=published,
    probability=forecast.mean(pair, {law: float(np.mean(gap > 0)) for law, gap in gaps.items()}),
    break_even=forecast.break_even(*pair, dense.seconds, offsets),
  )


def _gap(law: Any, dense: ClaimedRun, sparse: ClaimedRun) -> Any:
  """The gap of the published runs by a law."""
  losses = (law.loss(run.timed.shape, np.array([run.tokens]))[0] for run in (dense, sparse))
  return next(losses) - next(losses)


def _constant_error(forecast: Forecast, law: Any, pair: tuple[Timed, Timed], seconds: float) -> Any:
  """Half of the error of the law, which the published losses remove: the law predicts only a change of the gap."""
  of_dense, of_sparse = (law.spread(one.shape, seconds / one.seconds_per_token) for one in pair)
  return 0.5 * (of_dense * forecast.draws.dense - of_sparse * forecast.draws.sparse)


def _meetings(dense: tuple[ClaimedRun, ...], sparse: tuple[ClaimedRun, ...]) -> list[Meeting]:
  """The MoE runs whose loss lies on the curves of the dense runs against FLOPs and against time."""
  by_flops, by_time = (_envelope([(cost(run), run.loss) for run in dense if run.loss is not None]) for cost in
                       (lambda run: run.flops, lambda run: run.seconds))  # fmt: skip
  found = []
  for run in sparse:
    flops, seconds = (None if run.loss is None else _first(curve, run.loss) for curve in (by_flops, by_time))
    if run.loss is not None and flops is not None and seconds is not None:
      found.append(Meeting(run.name, run.loss, flops / run.flops, seconds / run.seconds))
  return found


def _envelope(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Of costs and losses, those with a lower loss than everything that costs as much or less. The lowest cost first."""
  best: list[tuple[float, float]] = []
  for cost, loss in sorted(points):
    if not best or loss < best[-1][1]:
      best.append((cost, loss))
  return best


def _first(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
  """The lowest cost that reaches a loss, with logarithms of costs interpolated. None outside the curve."""
  if len(curve) < 2 or not curve[-1][1] <= loss <= curve[0][1]:
    return None
  costs, losses = zip(*reversed(curve), strict=True)
  return float(np.exp(np.interp(loss, losses, np.log(costs))))


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = read_json(path)
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {reason(error)[:100]}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} does not contain an object with the keys claim, source, dense and moe")
  wrong = sorted(content.keys() ^ {*TEXTS, "dense", "moe"})
  if wrong:
    raise UserError(f"{path}: key {wrong[0]!r} is missing or unknown; the keys are claim, source, dense and moe")
  for key in TEXTS:
    if not isinstance(content[key], str):
      raise UserError(f"{path}: {key}={content[key]!r} is not text")
  rows = {kind: [content[kind]] if isinstance(content[kind], dict) else content[kind] for kind in ("dense", "moe")}
  for kind, found in rows.items():
    if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
      raise UserError(f"{path}: {kind} is not an object or a list of objects, one per run")
  return content | rows


def _run(path: pathlib.Path, kind: str, row: Mapping[str, Any], topology: Topology | None) -> ClaimedRun:
  where = f"{path}: {row.get('name', kind)}"
  check_row(where, row, ("tokens",), KEYS)
  experiment = _experiment(where, row)
  shape = shape_of(experiment) if experiment else _shape(where, row)
  seconds_per_token, clock = _clock(where, row, shape, experiment, topology)
  name = row.get("name", kind)
  timed = Timed(name=name, shape=shape, seconds_per_token=seconds_per_token)
  return ClaimedRun(name=name, timed=timed, tokens=row["tokens"], loss=row.get("loss"), clock=clock)


def _experiment(where: str, row: Mapping[str, Any]) -> Experiment | None:
  counts = [key for key in COUNTS if key in row]
  if "experiment" not in row:
    if "fields" in row:
      raise UserError(f"{where} has fields, but no experiment whose fields they replace; add the experiment")
    return None
  if counts:
    raise UserError(f"{where} has both an experiment and {counts[0]}, which the experiment determines; leave out one")
  fields = row.get("fields", {})
  if not isinstance(row["experiment"], str) or not isinstance(fields, dict):
    raise UserError(f"{where}: experiment must be a name, and fields an object by dotted paths")
  try:
    return with_fields(find_experiment(row["experiment"]), fields)
  except UserError as error:
    raise UserError(f"{where}: {error}") from error


def _shape(where: str, row: Mapping[str, Any]) -> Shape:
  for key in ("active_parameters", "total_parameters"):
    if key not in row:
      raise UserError(f"{where} has no {key!r}; give the numbers of parameters, or an experiment")
  return shape_of_row(where, row)


def _clock(
  where: str, row: Mapping[str, Any], shape: Shape, experiment: Experiment | None, topology: Topology | None
) -> tuple[float, str]:
  """Seconds per token, and what they rest on."""
  if topology is not None:
    if experiment is None:
      raise UserError(
        f"{where} has no experiment, so that its step time on {topology.name} is not known; add one, or leave out "
        "--topology to use its seconds or MFU"
      )
    found = placed(experiment, topology)
    if isinstance(found, UserError):
      raise UserError(f"{where}: {found}")
    return estimate(found, topology).step_time_s / tokens_per_step(found), "formula"
  if "seconds" in row and "mfu" in row:
    raise UserError(f"{where} has both 'seconds' and 'mfu', which gives another time; leave out one")
  if "seconds" in row:
    fraction = shape.training_flops * row["tokens"] / row["seconds"] / row.get("peak_flops", math.inf)
    if fraction > 1:
      raise UserError(
        f"{where}: its FLOPs in seconds={row['seconds']!r} are {fraction:.3g} times peak_flops; correct one"
      )
    return row["seconds"] / row["tokens"], "measured"
  if "mfu" in row and "peak_flops" in row:
    return shape.training_flops / (row["peak_flops"] * row["mfu"]), "MFU"
  raise UserError(f"{where} has neither 'seconds' nor 'mfu' and 'peak_flops'; add one of them, or give --topology NAME")


def _below(gap: float) -> str:
  return f"{abs(gap):.3f} nats {'below' if gap > 0 else 'above'}"


def _duration(seconds: float) -> str:
  hours = seconds / 3600
  return f"{hours:.3g} hours" if hours < 100 else f"{hours / 24:.3g} days"
