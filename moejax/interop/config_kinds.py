"""Checks the kinds of values in a Hugging Face config.json, before any of them is used."""

from collections.abc import Callable, Mapping
from typing import Any

from moejax.config.checks import LARGEST_INTEGER
from moejax.errors import UserError

MOST_LAYERS = 10_000


def _is_integer(value: Any, least: int = 1, largest: int = LARGEST_INTEGER) -> bool:
  return type(value) is int and least <= value <= largest


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value < 1e12


KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
  (
    "an integer above 0",
    _is_integer,
    "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size moe_intermediate_size "
    "intermediate_size_mlp num_experts num_local_experts num_experts_per_tok n_routed_experts kv_lora_rank q_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim n_group topk_group decoder_sparse_step sliding_window "
    "sliding_window_pattern attention_chunk_size interleave_moe_layer_step no_rope_layer_interval",
  ),
  (
    f"an integer from 1 to {MOST_LAYERS:,}",
    lambda value: _is_integer(value, largest=MOST_LAYERS),
    "num_hidden_layers",
  ),
  (
    "an integer of at least 0",
    lambda value: _is_integer(value, least=0),
    "n_shared_experts first_k_dense_replace shared_expert_intermediate_size max_window_layers num_nextn_predict_layers",
  ),
  (
    "a number above 0",
    _is_number,
    "rms_norm_eps rope_theta routed_scaling_factor query_pre_attn_scalar final_logit_softcapping rope_local_base_freq "
    "attn_logit_softcapping partial_rotary_factor",
  ),
  (
    "true or false",
    lambda value: isinstance(value, bool),
    "tie_word_embeddings norm_topk_prob use_sliding_window attention_bias mlp_bias qkv_bias",
  ),
  (
    "text",
    lambda value: isinstance(value, str),
    "model_type hidden_act hidden_activation scoring_func topk_method",
  ),
  ("an object", lambda value: isinstance(value, dict), "rope_scaling rope_parameters"),
  (
    "a list of text",
    lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "layer_types",
  ),
  (
    "a list of 0 and 1",
    lambda value: isinstance(value, list) and all(one in (0, 1) for one in value),
    "no_rope_layers",
  ),
)
"""What a value must be, a test of it, and the fields. They may also be null or missing."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Fields of rope_parameters with the rotary embedding of a type of layers."""

OF_ROPE: Mapping[str, Callable[[Any], bool]] = {
  "rope_type": lambda value: isinstance(value, str),
  "type": lambda value: isinstance(value, str),
  "truncate": lambda value: isinstance(value, bool),
}
"""Fields of a rotary embedding that are not numbers."""


def check_kinds(config: Mapping[str, Any]) -> None:
  """Checks that the fields of a config.json that moejax reads have values of the right kind.

  Raises:
    UserError: If one has not. The message gives the field and its value.
  """
  for wanted, fits, names in KINDS:
    for name in names.split():
      value = config.get(name)
      if value is not None and not fits(value):
        raise UserError(f"config.json: {name}={short(value)} must be {wanted}")
  for name in ("rope_scaling", "rope_parameters"):
    _check_rope(config.get(name) or {}, name)


def _check_rope(rope: Mapping[str, Any], name: str) -> None:
  for field, value in rope.items():
    if isinstance(value, dict) and field in LAYER_TYPES:
      _check_rope(value, f"{name}.{field}")
    elif value is not None and not OF_ROPE.get(field, _is_number)(value):
      raise UserError(f"config.json: {name}.{field}={short(value)} has the wrong type or is out of range")


def short(value: Any) -> str:
  """A value in one line of at most 60 characters."""
  if isinstance(value, list | dict):
    value = repr(value) if len(value) < 10 else f"a {type(value).__name__} of {len(value)} values"
  elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
    value = f"an integer of {value.bit_length()} bits"
  else:
    value = repr(value)
  return value if len(value) <= 60 else f"{value[:57]}..."
