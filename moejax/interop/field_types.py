"""Checks the types of the fields of a config.json that moejax computes with."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moejax.config.checks import LARGEST_INTEGER
from moejax.errors import UserError

MOST_LAYERS = 10_000
"""Maximum number of layers, each of which has a type."""


def _positive(value: Any) -> bool:
  return type(value) is int and 0 < value <= LARGEST_INTEGER


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and 0 <= value < math.inf


def _layers(value: Any) -> bool:
  return _positive(value) and value <= MOST_LAYERS


def _texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(value: Any) -> bool:
  return isinstance(value, list) and all(type(item) is int and 0 <= item < MOST_LAYERS for item in value)


def _bits(value: Any) -> bool:
  return isinstance(value, list) and all(item in (0, 1) for item in value)


POSITIVE = (_positive, "an integer above 0")
WHOLE = (lambda value: type(value) is int and 0 <= value <= LARGEST_INTEGER, "an integer, at least 0")
NUMBER = (_is_number, "a finite number, at least 0")
ABOVE_0 = (lambda value: _is_number(value) and value > 0, "a finite number above 0")
TEXT = (lambda value: isinstance(value, str), "text")
BOOL = (lambda value: isinstance(value, bool), "true or false")
OBJECT = (lambda value: isinstance(value, Mapping), "an object")

Type = tuple[Callable[[Any], bool], str]
TYPES: Mapping[str, Type] = {
  "model_type": TEXT,
  "num_hidden_layers": (_layers, f"an integer from 1 to {MOST_LAYERS}"),
  "layer_types": (_texts, "a list of texts"),
  "rope_theta": ABOVE_0,
  "rope_local_base_freq": ABOVE_0,
  "query_pre_attn_scalar": ABOVE_0,
  "shared_expert_intermediate_size": WHOLE,
  "sliding_window": WHOLE,
  "max_window_layers": WHOLE,
  "rope_parameters": OBJECT,
  "rope_scaling": OBJECT,
  **dict.fromkeys(
    (
      "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "moe_intermediate_size",
      "sliding_window_pattern", "qk_nope_head_dim", "vocab_size", "intermediate_size", "intermediate_size_mlp",
      "num_experts", "num_local_experts", "num_experts_per_tok", "n_routed_experts", "kv_lora_rank", "q_lora_rank",
      "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group", "decoder_sparse_step", "attention_chunk_size",
      "interleave_moe_layer_step", "no_rope_layer_interval", "floor_scale",
    ),
    POSITIVE,
  ),
  **dict.fromkeys(("rms_norm_eps", "routed_scaling_factor", "attn_logit_softcapping"), ABOVE_0),
  **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"), WHOLE),
  **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "use_qk_norm"), BOOL),
  **dict.fromkeys(("hidden_act", "hidden_activation", "scoring_func", "topk_method"), TEXT),
  "no_rope_layers": (_bits, "a list of 0 and 1"),
  "moe_layers": (_numbers, "a list of the numbers of layers, from 0"),
  "attn_scale": NUMBER,
  "attn_temperature_tuning": (lambda value: type(value) in (bool, int), "true, false or an integer"),
}  # fmt: skip
"""The check and the description of each field. All of them may be null."""

OF_ROPE: Mapping[str, Type] = {
  "rope_type": TEXT, "type": TEXT, "factor": ABOVE_0, "rope_theta": ABOVE_0, "mscale": NUMBER, "mscale_all_dim": NUMBER,
}  # fmt: skip
"""The same for the fields of a rotary embedding. The others are numbers."""


def check_types(config: Mapping[str, Any]) -> None:
  """Checks the types of the fields of a config.json.

  Raises:
    UserError: If a field has a value of another type. The message gives the field.
  """
  for name, value, (fits, description) in _fields(config):
    if value is not None and not fits(value):
      raise UserError(f"config.json: {name}={short(value)} must be {description}")


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Type]]:
  """Name, value and type of each field that has a type."""
  for name, value in config.items():
    if name in TYPES:
      yield name, value, TYPES[name]
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
      yield from _of_rope(name, value)


def _of_rope(name: str, rope: Mapping[str, Any]) -> Iterator[tuple[str, Any, Type]]:
  for field, value in rope.items():
    if isinstance(value, Mapping) and field not in OF_ROPE:  # of a type of layers
      yield from _of_rope(f"{name}.{field}", value)
    elif field in OF_ROPE:
      yield f"{name}.{field}", value, OF_ROPE[field]
    elif type(value) is not bool:
      yield f"{name}.{field}", value, NUMBER


def short(value: Any) -> str:
  """A value in one line of at most 60 characters."""
  if isinstance(value, list | dict):
    value = repr(value) if len(value) < 10 else f"a {type(value).__name__} of {len(value)} values"
  elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
    value = f"an integer of {value.bit_length()} bits"
  else:
    value = repr(value)
  return value if len(value) <= 60 else f"{value[:57]}..."
