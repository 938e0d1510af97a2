"""The weights of laws in an ensemble, which finished runs change."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.notebook import html_table
from moejax.progress import SILENT, Progress
from moejax.scaling.finished_runs import FinishedRun
from moejax.scaling.fitting import REPLICATES, Fit, fit_all
from moejax.scaling.laws import LAWS, Law

NOISE = 0.01
"""Standard deviation of the loss of a run over seeds and hyper-parameters, in nats."""


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Laws fitted to finished runs, and the weights of all laws after a comparison with these runs."""

  fits: tuple[Fit, ...]
  """The joint law, and Chinchilla's law if there are enough dense runs."""
  laws: tuple[Law, ...]
  """The ensemble: the published laws and the fitted joint law."""
  weights: dict[str, float]
  """Weight of each law by name. They add up to 1."""

  def _repr_html_(self) -> str:
    joint = self.fits[0]
    rows = [(f"constant {name}", value) for name, value in joint.constants.items()]
    rows += [("error, nats", joint.error), ("held-out error, nats", joint.held_out_error)]
    return html_table(f"{len(joint.runs)} runs", [*rows, *((f"weight of {n}", w) for n, w in self.weights.items())])

  def to_json(self) -> dict[str, Any]:
    """The content of `moejax fit --json FILE`, which `moejax fit` and `moejax decide` accept as finished runs."""
    return {
      "fits": [one.to_json() for one in self.fits],
      "weights": self.weights,
      "runs": [run.to_json() for run in self.fits[0].runs],
    }


def published_weights() -> dict[str, float]:
  """The weights of the published laws without finished runs."""
  return _normalized({name: math.log(law.weight) for name, law in LAWS.items()})


def fit_ensemble(
  runs: Sequence[FinishedRun], seed: int = 0, replicates: int = REPLICATES, progress: Progress = SILENT
) -> Fitted:
  """Fits laws to finished runs and weighs all laws by their likelihood.

  The likelihood of a published law is that of the differences between the runs, since its losses are of another text:
  one offset, in nats, is subtracted. The fitted law, which has no such offset, has the likelihood of an error as large
  as its held-out error. The errors of a law for similar runs are alike, so that n runs count as sqrt(n).

  Raises:
    UserError: If there are too few runs.
  """
  fits = fit_all(runs, seed, replicates, progress)
  own = fits[0].law
  independent = 1 / math.sqrt(len(runs))
  logarithms = {name: math.log(law.weight) + independent * _log_likelihood(law, runs) for name, law in LAWS.items()}
  logarithms[own.name] = -independent * 0.5 * len(runs) * (math.log(own.error**2 + NOISE**2) + 1)
  return Fitted(fits, (*LAWS.values(), own), _normalized(logarithms))


def _log_likelihood(law: Law, runs: Sequence[FinishedRun]) -> float:
  """The runs for which the law is not defined count as if they were predicted with an error of its spread."""
  spreads = np.array([math.hypot(law.spread(run.shape, run.tokens), NOISE) for run in runs])
  defined = np.array([law.applies(run.shape) for run in runs])
  errors = np.array(
    [
      float(law.loss(run.shape, np.array([run.tokens]))[0]) - run.loss if law.applies(run.shape) else 0.0
      for run in runs
    ]
  )
  offset = np.average(errors[defined], weights=spreads[defined] ** -2.0) if defined.any() else 0.0
  scaled = np.where(defined, (errors - offset) / spreads, 1.0)
  return float(-np.sum(np.log(spreads) + 0.5 * scaled**2))


def _normalized(logarithms: dict[str, float]) -> dict[str, float]:
  """Weights that add up to 1. None is 0, since the others may not be defined for a pair."""
  most = max(logarithms.values())
  exponentials = {name: math.exp(max(value - most, -300.0)) for name, value in logarithms.items()}
  total = sum(exponentials.values())
  return {name: value / total for name, value in exponentials.items()}
