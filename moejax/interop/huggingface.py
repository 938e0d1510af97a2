"""A dense model as Hugging Face's Llama, and back: the same numbers under other names.

D embed  F hidden  V vocab  N query heads  K key/value heads  H head dim
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

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


def llama_config(model: Model, max_length: int) -> dict[str, Any]:
  """The fields of a LlamaConfig.

  Args:
    model: a dense one.
    max_length: tokens that it was trained to see.

  Raises:
    UserError: the model has what Llama has not.
  """
  _check(model)
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": model.vocab_size,
    "hidden_size": model.d_model,
    "intermediate_size": model.d_ff,
    "num_hidden_layers": model.num_layers,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_kv_heads,
    "head_dim": model.head_dim,
    "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    "rms_norm_eps": model.norm_epsilon,
    "tie_word_embeddings": model.tie_embeddings,
    "max_position_embeddings": max_length,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
  }


def to_llama(model: Model, parameters: Mapping[str, Any]) -> Weights:
  """Our parameters under Llama's names; raises as `llama_config`."""
  _check(model)
  weights = {
    "model.embed_tokens.weight": np.asarray(parameters["embedding_VD"]),
    "model.norm.weight": np.asarray(parameters["final_norm"]["scale_D"]),
  }
  if not model.tie_embeddings:
    weights["lm_head.weight"] = np.asarray(parameters["w_logits_DV"]).T
  for number in range(model.num_layers):
    for (part, name), theirs in OF_LAYER.items():
      if model.layers == "scanned":
        array = np.asarray(parameters["layers"]["blocks"][0][part][name][number])
      else:
        array = np.asarray(parameters["layers"][number]["blocks"][0][part][name])
      outputs = _outputs(name, model)
      weights[f"model.layers.{number}.{theirs}.weight"] = array.reshape(-1, outputs).T if outputs else array
  return weights


def from_llama(model: Model, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Llama's weights as parameters of `model`.

  Raises:
    UserError: the model has what Llama has not, or the weights are of another model.
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
  for field, value in (("moe", model.moe), ("qk_norm", model.qk_norm or None), ("logit_cap", model.logit_cap)):
    if value is not None:
      raise UserError(f"model.{field}={value} and Llama has none; only a dense model without it can be exported")
