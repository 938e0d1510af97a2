"""Detects values that are NaN or infinite, and suggests remedies."""

import math

import jax
import jax.numpy as jnp

from moejax.config.experiment import Experiment
from moejax.host_memory import to_device
from moejax.training.metrics import Record
from moejax.training.state import State

ESSENTIAL = ("loss", "grad_norm", "param_norm")
"""Metrics that are checked in every step. If all are finite, so are the parameters and moments after the step."""


def explain(record: Record, experiment: Experiment, saved: int | None) -> str:
  """Explains why a run stops, which checkpoint can be used, and the remedy. `saved` is the step of the checkpoint."""
  broken = not_finite(record)
  if not broken:
    return (
      f"The loss, {record['loss']:.4g} at step {record['step']}, is a spike according to training.anomalies.spike="
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
  leaves = [leaf for leaf in jax.tree.leaves(to_device(state)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _what_is_left(saved: int | None) -> str:
  if saved is None:
    return "No checkpoint has been saved, so the same command would start from step 1 and stop at the same step."
  return (
    f"The latest checkpoint is that of step {saved}, and all its values are finite. The same command would resume from "
    "it and stop at the same step, unless the hardware caused the failure."
  )


def _remedy(broken: str, step: int, experiment: Experiment) -> str:
  if step == 1 and broken != "param_norm":
    return (
      "The parameters had not been updated yet, so the learning rate is not the cause: check the coefficients in "
      "training.losses and try --model.compute-dtype float32 with a new --workdir."
    )
  optimizer = experiment.optimizer
  return (
    "Train with a new --workdir, because these fields cannot change when a run resumes, and with a lower "
    f"--optimizer.learning-rate (now {optimizer.learning_rate:g}), a higher --optimizer.schedule.warmup-fraction (now "
    f"{optimizer.schedule.warmup_fraction:g}) or a lower --optimizer.gradient-clip (now {optimizer.gradient_clip:g})."
  )
