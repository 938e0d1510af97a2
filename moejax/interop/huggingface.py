"""A dense model as Hugging Face's Llama, and back: the same numbers under other names.

D embed  F hidden  V vocab  N query heads  K key/value heads  H head dim

Every field of Model is one of three: EXPRESSED by a field of LlamaConfig or by the weights, of the PROGRAM and without
an effect on what the model computes, or held by Llama at one value (ONLY; of a field that is in no table, its default).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.config import checks
from moejax.config.model import Model
from moejax.errors import UserError

Weights = dict[str, np.ndarray]
"""A state dict: float32 arrays by Llama's names."""

OF_LAYER = {
  ("attention_norm", "scale_D"): "input_layernorm",
  ("attention", "w_q_DNH"): "self_attn.q_proj",
  ("attention", "w_k_DKH"): "self_attn.k_proj",
  ("attention", "w_v_DKH"): "self_attn.v_proj",
  ("attention", "w_out_NHD"): "self_attn.o_proj",
  ("feed_forward_norm", "scale_D"): "post_attention_layernorm",
  ("feed_forward", "w_gate_DF"): "mlp.gate_proj",
  ("feed_forward", "w_up_DF"): "mlp.up_proj",
  ("feed_forward", "w_down_FD"): "mlp.down_proj",
}


EXPRESSED = {
  "vocab_size": "vocab_size",
  "d_model": "hidden_size",
  "d_ff": "intermediate_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "norm_epsilon": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
  "rope_theta": "rope_parameters",
}
"""Fields of Model and those of LlamaConfig that say the same."""
PROGRAM = ("compute_dtype", "gradient_dtype", "remat", "layers")
"""Fields of Model that say how it is computed, and not what."""
ONLY: dict[str, Any] = {
  "activation": "swiglu",
  "qk_norm": False,
  "attention_experts": None,
  "logit_cap": None,
  "moe": None,
}
"""Fields of Model that Llama has at one value only."""


def llama_config(model: Model, max_length: int) -> dict[str, Any]:
  """The fields of a LlamaConfig.

  Args:
    model: a dense one.
    max_length: tokens that it was trained to see.

  Raises:
    UserError: Llama cannot express a field of the model, which the message names.
  """
  _check(model)
  expressed = {theirs: getattr(model, ours) for ours, theirs in EXPRESSED.items()}
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **expressed,
    "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    "rope_theta": model.rope_theta,  # where transformers 4 and other readers of its files look for it
    "max_position_embeddings": max_length,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
  }


def to_llama(model: Model, parameters: Mapping[str, Any]) -> Weights:
  """Our parameters under Llama's names.

  Raises:
    UserError: as `llama_config`, or the parameters are of another model: one is missing or would be left out.
  """
  _check(model)
  left = _flat(parameters)

  def take(*path: str | int, layers: tuple[int, ...] = ()) -> np.ndarray:
    if path not in left:
      raise UserError(f"the parameters are of another model: they have no {_dotted(path)}")
    array, shape = left.pop(path), (*layers, *_shape(str(path[-1]), model))
    if array.shape != shape:
      raise UserError(f"the parameters are of another model: {_dotted(path)} is {array.shape} and not {shape}")
    return array

  weights = {
    "model.embed_tokens.weight": take("embedding_VD"),
    "model.norm.weight": take("final_norm", "scale_D"),
  }
  if not model.tie_embeddings:
    weights["lm_head.weight"] = take("w_logits_DV").T
  stacked = model.layers == "scanned"
  for (part, name), theirs in OF_LAYER.items():
    if stacked:
      of_layers = list(take("layers", "blocks", 0, part, name, layers=(model.num_layers,)))
    else:
      of_layers = [take("layers", number, "blocks", 0, part, name) for number in range(model.num_layers)]
    outputs = _outputs(name, model)
    for number, array in enumerate(of_layers):
      weights[f"model.layers.{number}.{theirs}.weight"] = array.reshape(-1, outputs).T if outputs else array
  if left:
    raise UserError(
      f"Llama has no place for the parameter {', '.join(map(_dotted, left))}; the parameters are of another model"
    )
  return weights


def _flat(tree: Mapping[Any, Any], path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], np.ndarray]:
  """Every array of nested mappings by its path."""
  flat: dict[tuple[str | int, ...], np.ndarray] = {}
  for key, value in tree.items():
    flat |= _flat(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): np.asarray(value)}
  return flat


def _dotted(path: tuple[str | int, ...]) -> str:
  return ".".join(map(str, path))


def from_llama(model: Model, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Llama's weights as parameters of `model`.

  Raises:
    UserError: as `llama_config`, or the weights are of another model.
  """
  expected = {f"model.layers.{i}.{theirs}.weight" for i in range(model.num_layers) for theirs in OF_LAYER.values()}
  expected |= {"model.embed_tokens.weight", "model.norm.weight"}
  expected |= set() if model.tie_embeddings else {"lm_head.weight"}
  _check(model)
  if set(weights) != expected:
    raise UserError(f"the weights are of another model: {', '.join(sorted(set(weights) ^ expected)[:3])} do not fit")

  def layer(number: int) -> dict[str, Any]:
    block: dict[str, dict[str, np.ndarray]] = {}
    for (part, name), theirs in OF_LAYER.items():
      key = f"model.layers.{number}.{theirs}.weight"
      block.setdefault(part, {})[name] = _ours(key, weights[key], name, model)
    return block

  layers = [layer(number) for number in range(model.num_layers)]
  apart: Any = {number: {"blocks": {0: of_layer}} for number, of_layer in enumerate(layers)}
  stacked = {
    part: {name: np.stack([of_layer[part][name] for of_layer in layers]) for name in layers[0][part]}
    for part in layers[0]
  }
  parameters = {
    "embedding_VD": _ours("model.embed_tokens.weight", weights["model.embed_tokens.weight"], "embedding_VD", model),
    "layers": {"blocks": {0: stacked}} if model.layers == "scanned" else apart,
    "final_norm": {"scale_D": _ours("model.norm.weight", weights["model.norm.weight"], "scale_D", model)},
  }
  if not model.tie_embeddings:
    parameters["w_logits_DV"] = _ours("lm_head.weight", weights["lm_head.weight"], "w_logits_DV", model)
  return parameters


def _ours(key: str, array: np.ndarray, name: str, model: Model) -> np.ndarray:
  """Llama's array, [outputs, inputs] where it multiplies, as our array of that name."""
  shape, outputs = _shape(name, model), _outputs(name, model)
  theirs = (outputs, math.prod(shape) // outputs) if outputs else shape
  if array.shape != theirs:
    raise UserError(f"{key} has the shape {array.shape} and the model needs {theirs}")
  array = np.asarray(array, np.float32)
  return array.T.reshape(shape) if outputs else array


def _outputs(name: str, model: Model) -> int:
  """What a product with this matrix leaves: the dimensions that it does not sum over; 0 for what multiplies nothing."""
  shape = _shape(name, model)
  if name in ("scale_D", "embedding_VD"):
    return 0
  return shape[-1] if name == "w_out_NHD" else math.prod(shape[1:])


def _shape(name: str, model: Model) -> tuple[int, ...]:
  """Sizes of the dimensions that the suffix of a name spells."""
  sizes = {
    "D": model.d_model, "F": model.d_ff, "V": model.vocab_size, "N": model.num_heads, "K": model.num_kv_heads,
    "H": model.head_dim,
  }  # fmt: skip
  return tuple(sizes[letter] for letter in name.rpartition("_")[2])


def _check(model: Model) -> None:
  """Raises UserError where a model is no Llama."""
  for field in dataclasses.fields(model):
    if field.name in EXPRESSED or field.name in PROGRAM:
      continue
    value, only = getattr(model, field.name), ONLY.get(field.name, field.default)
    if value != only:
      raise UserError(
        f"model.{field.name}={value!r} cannot be expressed as Llama, which has only model.{field.name}={only!r}; a "
        "model trained with that can be exported"
      )
  checks.divides(model.num_heads, "model.num_heads", model.d_model, "model.d_model")  # LlamaConfig refuses it
