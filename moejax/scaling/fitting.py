"""Fits scaling laws to finished runs: Huber loss of the logarithm of the loss, many starts, bootstrap, held-out error.

The constants have a Gaussian prior around published ones. With many runs it has no effect; with few runs, or runs that
do not vary the number of experts, it keeps the constants that they do not determine. Each replicate of the bootstrap
resamples the runs and draws the center of its prior, so that the constants of the replicates have both uncertainties
(randomized maximum a posteriori).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from moejax.errors import UserError
from moejax.progress import SILENT, Progress
from moejax.scaling.finished_runs import FinishedRun
from moejax.scaling.laws import JOINT, JOINT_MOST, JOINT_START, Array, Law, joint_loss, saturated
from moejax.scaling.shapes import Shape

HUBER = 1e-3
"""Errors of log loss beyond this count linearly, as in arXiv 2203.15556."""

TYPICAL = 0.005
"""Expected absolute error of log loss, by which errors of runs are weighed against the prior."""

STARTS, REPLICATES = 12, 100

FEWEST_RUNS = 4

LEAST_ERROR = 0.005
"""Of a fitted law, in nats."""

LEAST_EXPONENT = 0.01
"""Of model size and tokens, so that larger models and longer training always have a lower loss."""

HELD_OUT = 0.2
"""Fraction of the runs, those with the most training FLOPs, that are predicted from the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """A law with constants to fit. Its free numbers are the terms of model size and data at the center of the runs, the
  exponents, and how they change with experts; they are nearly independent of each other."""

  name: str
  source: str
  published: Mapping[str, float]
  center: Callable[[Array], Array]
  """The published constants as free numbers, for runs with this mean of the logarithms of parameters and tokens."""
  width: tuple[float, ...]
  """Standard deviation of the prior of each free number."""
  constants: Callable[[Array, Array], dict[str, Array]]
  """The constants for free numbers and a mean."""
  loss: Callable[[Mapping[str, Any], Any, Any, Any], Any]
  """Loss for constants, active parameters, tokens and expansion."""
  sign: float
  """Of the exponents, free numbers 3 (of model size) and 4 (of tokens), with which the loss falls."""

  @property
  def bounds(self) -> tuple[Array, Array]:
    """Lowest and highest free numbers. The loss falls with model size and tokens."""
    low, high = np.full(len(self.width), -np.inf), np.full(len(self.width), np.inf)
    if self.sign > 0:
      low[3:5] = LEAST_EXPONENT
    else:
      high[3:5] = -LEAST_EXPONENT
    return low, high


_FIRST = math.log(saturated(1, JOINT_START, JOINT_MOST))
"""ln Ê of a dense model."""


def _joint_center(mean: Array) -> Array:
  k, (n, d) = JOINT, mean
  alpha, beta = k["alpha"] + k["gamma"] * _FIRST, k["beta"] + k["zeta"] * _FIRST
  of_size = math.log(k["a"]) + k["delta"] * _FIRST + alpha * n
  of_data = math.log(k["b"]) + k["omega"] * _FIRST + beta * d
  change_of_size, change_of_data = k["delta"] + k["gamma"] * n, k["omega"] + k["zeta"] * d
  return np.array(
    [of_size, of_data, math.log(k["c"]), alpha, beta, change_of_size, change_of_data, k["gamma"], k["zeta"]]
  )


def _joint_constants(free: Array, mean: Array) -> dict[str, Array]:
  of_size, of_data, least, alpha, beta, change_of_size, change_of_data, gamma, zeta = free
  n, d = mean
  gamma, zeta = _falling(alpha, gamma), _falling(beta, zeta)
  delta, omega = change_of_size - gamma * n, change_of_data - zeta * d
  return {
    "a": np.exp(of_size - delta * _FIRST - alpha * n), "alpha": alpha - gamma * _FIRST, "delta": delta, "gamma": gamma,
    "b": np.exp(of_data - omega * _FIRST - beta * d), "beta": beta - zeta * _FIRST, "omega": omega, "zeta": zeta,
    "c": np.exp(least),
  }  # fmt: skip


def _falling(exponent: Array, change: Array) -> Array:
  """The change of an exponent with ln Ê, limited so that the loss falls for any number of experts."""
  most = (-0.5 * LEAST_EXPONENT - exponent) / (math.log(JOINT_MOST) - _FIRST)
  return np.where(np.real(change) < np.real(most), change, most)


CHINCHILLA = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
"""Of arXiv 2404.10102, which repeats the fit of arXiv 2203.15556."""


def chinchilla_loss(constants: Mapping[str, Any], active: Any, tokens: Any, expansion: Any = 1.0) -> Any:
  """E + A / N^alpha + B / D^beta. It ignores experts, so it is fitted to dense runs."""
  k = constants
  return (
    k["E"] + k["A"] * np.exp(-k["alpha"] * np.log(active)) + k["B"] * np.exp(-k["beta"] * np.log(tokens))
    + 0 * np.log(expansion)
  )  # fmt: skip


def _chinchilla_center(mean: Array) -> Array:
  k, (n, d) = CHINCHILLA, mean
  of_size, of_data = math.log(k["A"]) - k["alpha"] * n, math.log(k["B"]) - k["beta"] * d
  return np.array([of_size, of_data, math.log(k["E"]), k["alpha"], k["beta"]])


def _chinchilla_constants(free: Array, mean: Array) -> dict[str, Array]:
  of_size, of_data, least, alpha, beta = free
  n, d = mean
  return {
    "A": np.exp(of_size + alpha * n), "B": np.exp(of_data + beta * d), "E": np.exp(least), "alpha": alpha, "beta": beta,
  }  # fmt: skip


FORMS = {
  "chinchilla": Form(
    name="chinchilla", source="arXiv 2203.15556, equation 2", published=CHINCHILLA, center=_chinchilla_center,
    width=(1.0, 1.0, 0.7, 0.1, 0.1), constants=_chinchilla_constants, loss=chinchilla_loss, sign=1.0,
  ),
  "joint": Form(
    name="joint", source="arXiv 2502.05172", published=JOINT, center=_joint_center,
    width=(1.0, 1.0, 0.7, 0.06, 0.06, 0.05, 0.03, 0.005, 0.01), constants=_joint_constants, loss=joint_loss, sign=-1.0,
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """A law fitted to finished runs."""

  form: Form
  runs: tuple[FinishedRun, ...]
  constants: dict[str, float]
  replicates: dict[str, Array]
  """Constants of the replicates of the bootstrap."""
  held_out_error: float
  """Root mean square error, in nats, of the runs with the most training FLOPs, predicted from the others."""
  held_out: tuple[str, ...]
  """Names of those runs."""

  def predict(self, shape: Shape, tokens: Any) -> Any:
    return self.form.loss(self.constants, shape.active, tokens, shape.expansion)

  @property
  def error(self) -> float:
    """Root mean square error of the fitted runs in nats."""
    return _root_mean_square([self.predict(run.shape, run.tokens) - run.loss for run in self.runs])

  def interval(self, constant: str) -> tuple[float, float]:
    """The 80 % interval of a constant."""
    low, high = np.quantile(self.replicates[constant], [0.1, 0.9])
    return float(low), float(high)

  @property
  def law(self) -> Law:
    """The fit as a member of the ensemble: each draw has the constants of one replicate."""
    shapes = [run.shape for run in self.runs]

    def draws(shape: Shape, tokens: Array) -> Array:
      count = len(next(iter(self.replicates.values())))
      chosen = {name: values[np.arange(tokens.shape[-1]) % count] for name, values in self.replicates.items()}
      return self.form.loss(chosen, shape.active, tokens, shape.expansion)

    return Law(
      name=f"your runs ({self.form.name})",
      source=f"fit of the law of {self.form.source} to {len(self.runs)} runs",
      loss=self.predict,
      draws=draws,
      error=max(self.held_out_error, LEAST_ERROR),
      error_source=f"the held-out error, at least {LEAST_ERROR}",
      ranges={
        "active parameters": _range([shape.active for shape in shapes]),
        "tokens": _range([run.tokens for run in self.runs]),
        "expansion": _range([shape.expansion for shape in shapes]),
      },
      widens=False,
    )

  def to_json(self) -> dict[str, Any]:
    """Plain values, under `fits` of `moejax fit --json`."""
    return {
      "law": self.form.name,
      "source": self.form.source,
      "constants": self.constants,
      "interval": {name: list(self.interval(name)) for name in self.constants},
      "published": dict(self.form.published),
      "error_nats": self.error,
      "held_out_error_nats": self.held_out_error,
      "held_out": list(self.held_out),
      "points": [
        {"name": run.name, "active_parameters": run.shape.active, "expansion": run.shape.expansion,
         "tokens": run.tokens, "loss": run.loss, "predicted": float(self.predict(run.shape, run.tokens))}
        for run in self.runs
      ],
    }  # fmt: skip


def fit(
  form: Form,
  runs: Sequence[FinishedRun],
  seed: int = 0,
  replicates: int = REPLICATES,
  starts: int = STARTS,
  progress: Progress = SILENT,
) -> Fit:
  """Fits a law to finished runs.

  Raises:
    UserError: If there are too few runs.
  """
  if len(runs) < FEWEST_RUNS:
    raise UserError(f"the law {form.name} needs at least {FEWEST_RUNS} runs, but there are {len(runs)}; train more")
  if seed < 0:
    raise UserError(f"--seed={seed} must be 0 or above")
  generator = np.random.default_rng(seed)
  ordered = tuple(sorted(runs, key=lambda run: run.flops))
  table = _table(ordered)
  mean = np.log(table[:2]).mean(axis=1)
  center, width = form.center(mean), np.array(form.width)
  progress.stage(f"fitting the law {form.name}", total=replicates)

  def solve(columns: Any, prior: Array, start: Array) -> tuple[float, Array]:
    return _solve(form, table[:, columns], mean, prior, width, start)

  everything = np.arange(len(ordered))
  from_where = [center, *(center + width * generator.standard_normal((starts - 1, len(center))))]
  best = min((solve(everything, center, start) for start in from_where), key=lambda found: found[0])[1]
  for what, exponent in zip(("parameters", "tokens"), form.sign * best[3:5], strict=True):
    if exponent < 1.01 * LEAST_EXPONENT:
      raise UserError(
        f"the losses of these {len(runs)} runs do not fall with the number of {what}, so that the law {form.name} "
        "cannot be fitted; check that each loss belongs to its run, and that all are of the same text in nats per token"
      )
  last = max(1, round(HELD_OUT * len(ordered)))
  earlier = solve(everything[:-last], center, center)[1]
  predicted = form.loss(form.constants(earlier, mean), *table[:3, -last:])
  frees = np.empty((replicates, len(center)))
  for i in range(replicates):
    progress.advance(i)
    columns = generator.integers(len(ordered), size=len(ordered))
    frees[i] = solve(columns, center + width * generator.standard_normal(len(center)), best)[1]
  return Fit(
    form=form,
    runs=ordered,
    constants={name: float(value) for name, value in form.constants(best, mean).items()},
    replicates=form.constants(frees.T, mean),
    held_out_error=_root_mean_square(predicted - table[3, -last:]),
    held_out=tuple(run.name for run in ordered[-last:]),
  )


def fit_all(
  runs: Sequence[FinishedRun], seed: int = 0, replicates: int = REPLICATES, progress: Progress = SILENT
) -> tuple[Fit, ...]:
  """Fits Chinchilla's law to the dense runs, if there are enough, and the joint law to all runs.

  Raises:
    UserError: If there are too few runs.
  """
  joint = fit(FORMS["joint"], runs, seed, replicates, progress=progress)
  dense = [run for run in runs if run.shape.is_dense]
  if len(dense) < FEWEST_RUNS:
    return (joint,)
  return joint, fit(FORMS["chinchilla"], dense, seed, replicates, progress=progress)


def _solve(form: Form, table: Array, mean: Array, prior: Array, width: Array, start: Array) -> tuple[float, Array]:
  """The objective and the free numbers at its minimum."""
  active, tokens, expansion, losses = table
  logarithm, scale, count = np.log(losses), math.sqrt(HUBER * TYPICAL), len(losses)

  def residuals(free: Array) -> Array:
    with np.errstate(over="ignore"):
      predicted = form.loss(form.constants(free, mean), active, tokens, expansion)
    return np.concatenate([(np.log(np.minimum(predicted, 1e6)) - logarithm) / scale, (free - prior) / width])

  def rho(z: Array) -> Array:
    """Huber for runs, squares for the prior, with both derivatives."""
    bend = HUBER / TYPICAL
    linear = (np.arange(len(z)) < count) & (z > bend)
    root = np.sqrt(np.where(linear, z, 1.0))
    value = np.where(linear, 2 * math.sqrt(bend) * root - bend, z)
    first = np.where(linear, math.sqrt(bend) / root, 1.0)
    return np.stack([value, first, np.where(linear, -0.5 * math.sqrt(bend) / root**3, 0.0)])

  def jacobian(free: Array) -> Array:
    """Derivatives of the residuals by a complex step, for all free numbers at once."""
    size, step = len(free), 1e-20
    moved = form.constants((free[:, None] + 1j * step * np.eye(size))[..., None], mean)
    with np.errstate(over="ignore"):
      slopes = np.log(form.loss(moved, active, tokens, expansion)).imag.T / (step * scale)
    return np.concatenate([slopes, np.diag(1 / width)])

  low, high = form.bounds
  begin = np.clip(start, low + 1e-3, high - 1e-3)
  found = least_squares(
    residuals, begin, jac=jacobian, bounds=(low, high), loss=rho, max_nfev=200, ftol=1e-6, xtol=1e-6, gtol=1e-6
  )
  return float(found.cost), found.x


def _table(runs: Sequence[FinishedRun]) -> Array:
  """Active parameters, tokens, expansion and loss of each run, [4, runs]."""
  rows = [(run.shape.active, run.tokens, run.shape.expansion, run.loss) for run in runs]
  return np.array(rows, dtype=np.float64).T


def _range(values: Sequence[float]) -> tuple[float, float]:
  return min(values), max(values)


def _root_mean_square(values: Any) -> float:
  return float(np.sqrt(np.mean(np.square(values))))
