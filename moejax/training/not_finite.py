"""Detects values that are NaN or infinite, and says what a user can do about them."""

import math

import jax
import jax.numpy as jnp

from moejax.config.experiment import Experiment
from moejax.training.metrics import Record
from moejax.training.state import State

ESSENTIAL = ("loss", "grad_norm", "param_norm")
"""Metrics that every step is watched by. Where all three are finite, so are parameters and moments after the step."""


def explain(record: Record, experiment: Experiment, saved: int | None) -> str:
  """Why a run stops at one step's metrics, which checkpoint is left, and what helps; `saved` is its step, if any."""
  broken = not_finite(record)
  if not broken:
    return (
      f"The loss, {record['loss']:.4g} at step {record['step']}, is a spike by training.anomalies.spike="
      f"{experiment.training.anomalies.spike}. {_what_is_left(saved)} Raise training.anomalies.max_skipped, or set "
      "training.anomalies.then to rewind."
    )
  what = f"{broken[0]} is {record[broken[0]]} at step {record['step']}"
  return f"{what}. {_what_is_left(saved)} {_remedy(broken[0], record['step'], experiment)}"


def not_finite(record: Record) -> list[str]:
  """The essential metrics of a record that are NaN or infinite."""
  return [name for name in ESSENTIAL if not math.isfinite(record[name])]


def is_finite(state: State) -> bool:
  """Whether no number of the state is NaN or infinite."""
  return bool(_all_finite(state))


@jax.jit
def _all_finite(state: State) -> jax.Array:
  leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _what_is_left(saved: int | None) -> str:
  if saved is None:
    return "No checkpoint has been saved, so the same command starts again from step 1 and stops at the same step."
  return (
    f"The newest checkpoint is that of step {saved}, and all its values are finite; the same command resumes from it "
    "and stops at the same step, unless the hardware was at fault."
  )


def _remedy(broken: str, step: int, experiment: Experiment) -> str:
  if step == 1 and broken != "param_norm":
    return (
      "The parameters were still the initial ones, so the learning rate is not the cause: check the coefficients in "
      "training.losses and try --model.compute-dtype float32, with a new --workdir."
    )
  optimizer = experiment.optimizer
  return (
    "Train with a new --workdir (a work directory keeps the fields that decide its result) and a lower "
    f"--optimizer.learning-rate (now {optimizer.learning_rate:g}), a higher --optimizer.schedule.warmup-fraction (now "
    f"{optimizer.schedule.warmup_fraction:g}) or a lower --optimizer.gradient-clip (now {optimizer.gradient_clip:g})."
  )
