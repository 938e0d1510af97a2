"""Bits per byte and next-token accuracy on held-out documents, with their standard errors.

B batch  T query position  D embed
"""

import dataclasses
import io
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from moejax import processes
from moejax.data.ratio_estimate import ratio, ratio_stderr
from moejax.errors import UserError, reason
from moejax.files import write_whole
from moejax.models.abstract import Parameters, abstract_model
from moejax.partitioning import to_devices
from moejax.training.loss import Batch
from moejax.training.memory import check_fits, program_memory
from moejax.training.state import TrainSpec
from moejax.training.step import BATCH_TYPES

NATS_PER_BIT = float(np.log(2.0))


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Sums over the scored targets of each held-out document, as arrays [documents] in the order of the corpus."""

  nats: np.ndarray
  """Cross-entropy in nats."""
  correct: np.ndarray
  """Number of targets with the largest logit."""
  targets: np.ndarray
  """Number of scored targets."""
  text_bytes: np.ndarray
  """Number of UTF-8 bytes of the scored targets."""

  def summary(self) -> dict[str, float]:
    """`bits_per_byte`, `accuracy`, and their standard errors over documents."""
    return {
      "bits_per_byte": ratio(self.nats, self.text_bytes) / NATS_PER_BIT,
      "bits_per_byte_stderr": ratio_stderr(self.nats, self.text_bytes) / NATS_PER_BIT,
      "accuracy": ratio(self.correct, self.targets),
      "accuracy_stderr": ratio_stderr(self.correct, self.targets),
      "targets": int(self.targets.sum()),
      "documents": int((self.targets > 0).sum()),
    }

  def save(self, path: pathlib.Path) -> None:
    """Writes the sums as .npz."""
    content = io.BytesIO()
    np.savez_compressed(content, **{name: getattr(self, name) for name in _FIELDS})
    write_whole(path, content.getvalue())

  @classmethod
  def load(cls, path: pathlib.Path) -> "HeldOut":
    """Reads what `save` wrote.

    Raises:
      UserError: If the file is damaged.
    """
    try:
      with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in _FIELDS}
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
      raise UserError(f"{path} is damaged ({reason(error)[:100]}); run the command again to replace it") from error
    numbers = all(array.ndim == 1 and array.dtype.kind in "fiu" for array in found.values())
    if not numbers or len({len(array) for array in found.values()}) != 1:
      raise UserError(f"{path} is damaged: its arrays are not valid; run the command again to replace it")
    return cls(**found)


_FIELDS = tuple(field.name for field in dataclasses.fields(HeldOut))


def make_scorer(spec: TrainSpec) -> jax.stages.Wrapped:
  """Returns scorer(parameters, batch), which gives the cross-entropy in nats and whether the target has the largest
  logit, both [B, T]."""

  config, abstract = spec.model.config, spec.model
  if config.depths.causal() != config.depths:
    abstract = abstract_model(dataclasses.replace(config, depths=config.depths.causal()), spec.partitioner)

  def score(parameters: Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
    model = abstract.module(parameters)
    x_BTD, _ = model(batch["tokens"], batch["segments"], batch["positions"])
    scores = model.score(x_BTD, batch["targets"])
    return scores.loss_BT, scores.is_best_BT

  placement = spec.partitioner
  return jax.jit(
    score,
    in_shardings=(spec.model.shardings, dict.fromkeys(BATCH_TYPES, placement.batch)),
    out_shardings=(placement.replicated, placement.replicated),
  )


def compile_scorer(spec: TrainSpec) -> Callable[[Parameters, Batch], tuple[jax.Array, jax.Array]]:
  """`make_scorer`, compiled for the batches of the experiment's evaluation.

  Raises:
    UserError: If it does not fit in device memory.
  """
  experiment, placement = spec.experiment, spec.partitioner
  shape = (experiment.evaluation.batch_size, experiment.data.sequence_length)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement.batch) for name, dtype in BATCH_TYPES.items()}
  scorer: Any = make_scorer(spec)
  scorer = scorer.lower(spec.model.parameters, batch).compile()
  remedy = f"lower evaluation.batch_size={experiment.evaluation.batch_size}, or use more devices (mesh)"
  check_fits(f"the evaluation of {experiment.name}", program_memory(scorer), placement, remedy)
  processes.wait_for_all()
  return scorer


def score_documents(
  spec: TrainSpec,
  parameters: Parameters,
  batches: Iterable[dict[str, np.ndarray]],
  byte_lengths: np.ndarray,
  scorer: Callable[[Parameters, Batch], tuple[jax.Array, jax.Array]],
) -> HeldOut:
  """Scores every weighted target of the batches.

  Args:
    spec: the model.
    parameters: its parameters.
    batches: batches with the inputs of the model and `documents` [B, T], the document of each target (-1 for padding).
    byte_lengths: bytes of text by token id, 0 for special tokens.
    scorer: the function that `make_scorer` or `compile_scorer` returns.
  """
  columns: list[tuple[np.ndarray, ...]] = []
  placement = spec.partitioner.batch
  for batch in batches:
    loss_BT, correct_BT = scorer(parameters, to_devices({name: batch[name] for name in BATCH_TYPES}, placement))
    scored = batch["weights"] > 0
    columns.append(
      (
        batch["documents"][scored],
        np.asarray(loss_BT, np.float64)[scored],
        np.asarray(correct_BT, np.float64)[scored],
        byte_lengths[batch["targets"][scored]].astype(np.float64),
      )
    )
  documents, nats, correct, text_bytes = (np.concatenate(column) for column in zip(*columns, strict=True))
  size = int(documents.max()) + 1
  sums = [np.bincount(documents, values, size) for values in (nats, correct, np.ones_like(nats), text_bytes)]
  return HeldOut(*sums)
