"""Reads a Hugging Face config.json as a Model of the same shape, for plans. Features that moejax lacks are named.

`moejax.interop.configs.model_of` reads models that moejax computes exactly. A plan needs only the shape, so here a
model may also be read without a feature, if it is named.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config.fields import with_fields
from moejax.config.model import Model
from moejax.errors import UserError
from moejax.interop.configs import model_of, read_config
from moejax.interop.families import FAMILIES, Family
from moejax.interop.field_types import check_types
from moejax.interop.layer_types import FULL, ROPE_TYPES, SLIDING

Config = dict[str, Any]

NEUTRAL: Mapping[str, tuple[Any, str]] = {
  "rope_scaling": (None, "scaling of the rotary embedding"),
  "rope_parameters": (None, "scaling of the rotary embedding"),
  "attention_bias": (False, "biases of the attention projections"),
  "qkv_bias": (False, "biases of queries, keys and values"),
  "mlp_bias": (False, "biases of the feed-forward layers"),
  "sliding_window": (None, "attention in a sliding window: planned with full attention"),
  "attention_dropout": (0.0, "dropout"),
  "attn_logit_softcapping": (None, "a softcap of attention scores"),
  "clip_qkv": (None, "clipping of queries, keys and values"),
  "hidden_act": ("silu", "another activation: planned with that of the family, which takes the same products"),
  "hidden_activation": (None, "another activation: planned with that of the family, which takes the same products"),
  "num_nextn_predict_layers": (
    0,
    "modules for multi-token prediction; add --model.multi-token-depth and --training.losses.multi-token to plan them",
  ),
  "partial_rotary_factor": (1.0, "rotary embedding of a part of each head"),
  "scoring_func": ("softmax", "the score function of the router"),
  "topk_method": (None, "another choice of experts in groups: planned with that of the family"),
  "router_jitter_noise": (0.0, "noise of the router"),
  "quantization_config": (None, "quantized weights"),
}
"""Fields of config.json that a model can be planned without: the value without it, and what it is."""

GEMMA_3 = {"vocab_size": 262_208, "num_attention_heads": 8, "rms_norm_eps": 1e-6}
"""Values of fields that text_config of Gemma 3 may lack, in transformers."""


@dataclasses.dataclass(frozen=True)
class _Kin:
  """A model type that is planned as one of `moejax.interop.families`."""

  family: str
  convert: Callable[[Config, dict[str, str]], Config]
  """Returns its config.json as one of the family, and adds what moejax lacks to the second argument."""
  model: Callable[[Config], Mapping[str, Any]]
  """Returns the fields of Model that differ from the family's, by path."""


def _gemma(config: Config, missing: dict[str, str]) -> Config:
  """Gemma and Gemma 2 as Gemma 3 without norms of queries and keys. transformers ignores a hidden_act of Gemma."""
  own = config.get("hidden_activation") or "gelu_pytorch_tanh"
  kept = {name: value for name, value in config.items() if name not in ("hidden_act", "sliding_window_size")}
  theta, layers = config.get("rope_theta") or 10_000.0, config.get("num_hidden_layers")
  if config["model_type"] == "gemma":
    kept["layer_types"] = [FULL] * layers if layers else None
  elif not config.get("layer_types") and layers:
    kept["layer_types"] = [FULL if layer % 2 else SLIDING for layer in range(layers)]
  thetas = {"rope_theta": theta, "rope_local_base_freq": theta}
  kept["head_dim"] = config.get("head_dim") or 256
  return {"query_pre_attn_scalar": kept["head_dim"]} | kept | thetas | {"hidden_activation": own}


def _deepseek_v2(config: Config, missing: dict[str, str]) -> Config:
  """DeepSeek-V2 as V3 with another score function of the router."""
  method = config.get("topk_method")
  own = {"first_k_dense_replace": 0, "n_shared_experts": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
  found = own | {"n_group": 1, "topk_group": 1} | config | {"topk_method": "noaux_tc"}
  if config.get("scoring_func") in (None, "softmax"):
    found["scoring_func"] = "sigmoid"  # the family's, replaced in the model
  if method == "greedy":
    found |= {"n_group": 1, "topk_group": 1}
  elif method is not None and (config.get("n_group") or 1) > 1:
    missing["topk_method"] = f"{method}: planned with groups of experts that are chosen as in DeepSeek-V3"
  return found


KIN: Mapping[str, _Kin] = {
  "gemma": _Kin("gemma3_text", _gemma, lambda config: {"qk_norm": False, "norm_places": "before"}),
  "gemma2": _Kin("gemma3_text", _gemma, lambda config: {"qk_norm": False}),
  "deepseek_v2": _Kin(
    "deepseek_v3",
    _deepseek_v2,
    lambda config: {"moe.router.bias_rate": 0.0, "moe.router.scores": config.get("scoring_func") or "softmax"},
  ),
}


def planned_model(path: pathlib.Path, sequence_length: int, without: tuple[str, ...]) -> tuple[Model, dict[str, str]]:
  """Returns the model of a config.json, and the features that it is planned without: names and descriptions.

  Args:
    path: the config.json or its folder.
    sequence_length: tokens of a sequence of the step.
    without: names of features that may be left out.

  Raises:
    UserError: If the model has a feature that moejax lacks and `without` does not name, or one that cannot be left out.
  """
  config = read_config(path)
  missing: dict[str, str] = {}
  text = config.get("text_config")
  if text is not None:
    if not isinstance(text, dict):
      raise UserError(f"{path}: text_config is not an object")
    missing["vision"] = "the image encoder: planned as a model of text"
    config = (GEMMA_3 if text.get("model_type") == "gemma3_text" else {}) | text
  check_types(config)
  original, kin = config, KIN.get(config.get("model_type") or "")
  if kin is not None:
    config = kin.convert(dict(config), missing) | {"model_type": kin.family}
  _neutralize(config, sequence_length, missing)
  unknown = [name for name in without if name not in missing]
  if unknown:
    raise UserError(f"--without {' '.join(unknown)}: {path} has no such feature; it has {', '.join(missing) or 'none'}")
  refused = {name: what for name, what in missing.items() if name not in without}
  if refused:
    raise UserError(
      f"{path} has features that moejax does not support: "
      f"{'; '.join(f'{name} ({what})' for name, what in refused.items())}. "
      f"To plan it without them, add --without {' '.join(missing)}"
    )
  model = model_of(config, sequence_length)
  return (with_fields(model, kin.model(original)) if kin else model), missing


def _neutralize(config: Config, sequence_length: int, missing: dict[str, str]) -> None:
  """Removes features that moejax lacks from a config.json, and adds them to `missing`."""
  has: dict[str, Callable[[Any], bool]] = {
    "sliding_window": lambda window: window < sequence_length and config.get("use_sliding_window", True) is not False,
  }
  family = FAMILIES.get(str(config.get("model_type")))
  for name, (neutral, what) in NEUTRAL.items():
    value = config.get(name)
    neutral = family.same.get(name, neutral) if family else neutral
    if value is None or value == neutral or (family and _supports(family, name, value)):
      continue
    if has.get(name, lambda _: True)(value):
      missing[name] = what
    config[name] = neutral
  types = config.get("layer_types")
  if family is not None and family.sliding is None and not family.chunked and types is not None:
    if set(types) - {FULL, SLIDING}:
      raise UserError(
        f"config.json: layer_types has {', '.join(sorted(set(types)))}; moejax supports only {FULL} and {SLIDING}"
      )
    if SLIDING in types and "sliding_window" not in missing:
      missing["layer_types"] = "attention in a sliding window: planned with full attention"
    config.pop("layer_types")


def _supports(family: Family, name: str, value: Any) -> bool:
  """Whether models of a family are imported with this field."""
  if name == "sliding_window":
    return family.sliding is not None
  kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else value
  return name in ("rope_scaling", "rope_parameters") and (FULL in value or kind in ROPE_TYPES)
