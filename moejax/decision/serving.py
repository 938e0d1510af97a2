"""The cost of serving a model, by a roofline: every decoding step reads the weights and the KV cache once.

Exchanges between chips, prefill, batching and idle time are not counted.
"""

import dataclasses
from typing import Any

from moejax.config.chips import Chip
from moejax.config.experiment import Experiment
from moejax.config.parameters import flops_per_token, parameter_counts

SEQUENCES = 64
"""Number of sequences that are decoded at a time."""

BYTES = 2
"""Of a weight and of a number in the KV cache (bfloat16)."""

USABLE = 0.9
"""Fraction of device memory for weights and KV cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """Decoding of one model on the fewest chips that hold it."""

  devices: int
  memory_bytes: float
  """Weights and KV cache on all devices."""
  weight_bytes: float
  step_time_s: float
  """Seconds in which each sequence gets one token."""
  sequences: int

  @property
  def device_seconds_per_token(self) -> float:
    return self.devices * self.step_time_s / self.sequences

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"device_seconds_per_token": self.device_seconds_per_token}


def serving(experiment: Experiment, chip: Chip, sequences: int = SEQUENCES, context: int | None = None) -> Serving:
  """The cost of decoding with this number of tokens in the context of each sequence, or with the length of training."""
  model, length = experiment.model.main, context or experiment.data.sequence_length
  total = parameter_counts(model).total
  weights = BYTES * total
  per_token = BYTES * 2 * model.num_layers * model.num_kv_heads * model.head_dim
  cache = sequences * length * per_token
  devices = 1
  while weights + cache > USABLE * devices * chip.hbm_bytes:
    devices *= 2
  read = BYTES * (total - _unread(experiment, sequences)) + cache
  flops = sequences * flops_per_token(model, experiment.data.sequence_length) / 3
  seconds = max(read / chip.hbm_bandwidth, flops / (chip.bfloat16_flops or chip.vector_flops)) / devices
  return Serving(
    devices=devices, memory_bytes=weights + cache, weight_bytes=weights, step_time_s=seconds, sequences=sequences
  )


def _unread(experiment: Experiment, sequences: int) -> float:
  """Expected number of parameters of experts that no sequence of a step uses, if each chooses independently."""
  model, moe = experiment.model, experiment.model.moe
  if moe is None:
    return 0.0
  idle = (1 - moe.experts_per_token / moe.num_experts) ** sequences
  return idle * model.num_sparse_layers * moe.num_experts * model.feed_forward_matrices * model.d_model * moe.d_ff


def break_even_tokens(saved_device_seconds: float, dense: Serving, sparse: Serving) -> float | None:
  """Number of served tokens after which higher serving costs of the MoE use up its savings in training, or after which
  lower ones have paid for its higher training cost. None if the same model is cheaper in both."""
  extra = sparse.device_seconds_per_token - dense.device_seconds_per_token
  tokens = saved_device_seconds / extra if extra else -1.0
  return tokens if tokens > 0 else None
