"""A config.json of Hugging Face as a Model of the same shape, for plans: what a plan leaves out is named.

`moejax.interop.configs.model_of` reads models that moejax computes exactly. A plan needs only the shape, so here a
model may also be read without a feature, if it is named.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config.model import Model
from moejax.errors import UserError
from moejax.interop.configs import model_of, read_config
from moejax.interop.families import FAMILIES, Family
from moejax.interop.layer_types import ROPE_TYPES

Config = dict[str, Any]

NEUTRAL: Mapping[str, tuple[Any, str]] = {
  "rope_scaling": (None, "scaling of the rotary embedding"),
  "rope_parameters": (None, "scaling of the rotary embedding"),
  "attention_bias": (False, "biases of the attention projections"),
  "qkv_bias": (False, "biases of queries, keys and values"),
  "mlp_bias": (False, "biases of the feed-forward layers"),
  "sliding_window": (None, "attention in a sliding window: planned with full attention"),
  "attention_dropout": (0.0, "dropout"),
  "clip_qkv": (None, "clipping of queries, keys and values"),
  "partial_rotary_factor": (1.0, "rotary embedding of a part of each head"),
  "scoring_func": ("softmax", "the score function of the router"),
  "router_jitter_noise": (0.0, "noise of the router"),
  "quantization_config": (None, "quantized weights"),
}
"""Fields of config.json that a model can be planned without: the value without it, and what it is."""


@dataclasses.dataclass(frozen=True)
class _Kin:
  """A model type that is planned as one of `moejax.interop.families`."""

  family: str
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """Fields of its config.json by the family's name for them."""
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Fields of the family that its config.json does not have."""
  without: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """What every model of this type has and moejax lacks: its name, and what it is."""
  dropped: tuple[str, ...] = ()
  """Fields of its config.json that say more of `without`, or nothing that changes a shape."""


SANDWICH = {"post_norms": "norms after attention and feed-forward layers"}
GEGLU = {"geglu": "GELU in gated layers: planned with SiLU, which takes the same products"}
SOFTCAP = {"attention_softcap": "a softcap of attention scores"}
GEMMA_FIELDS = (
  "hidden_activation", "hidden_act", "query_pre_attn_scalar", "attn_logit_softcapping", "cache_implementation",
  "final_logit_softcapping", "rope_local_base_freq", "sliding_window_pattern", "layer_types",
)  # fmt: skip

KIN: Mapping[str, _Kin] = {
  "gemma": _Kin("llama", only={"tie_word_embeddings": True}, without=GEGLU, dropped=GEMMA_FIELDS),
  "gemma2": _Kin("llama", only={"tie_word_embeddings": True}, without=GEGLU | SANDWICH | SOFTCAP, dropped=GEMMA_FIELDS),
}

IMPOSSIBLE = {
  "deepseek_v2": "kv_lora_rank: multi-head latent attention (MLA)",
}
"""Model types of which too much of a step would be left out, and what that is."""


def planned_model(path: pathlib.Path, sequence_length: int, without: tuple[str, ...]) -> tuple[Model, dict[str, str]]:
  """The model of a config.json, and what it is planned without: names and what they are.

  Args:
    path: the config.json or its folder.
    sequence_length: tokens of a sequence of the step.
    without: names of features that may be left out.

  Raises:
    UserError: the model has a feature that moejax lacks and `without` does not name, or one that cannot be left out.
  """
  config = read_config(path)
  missing: dict[str, str] = {}
  if "text_config" in config:
    config = dict(config["text_config"])
    missing["vision"] = "the image encoder: planned as a model of text"
  kind = config.get("model_type")
  if kind in IMPOSSIBLE:
    raise UserError(f"{path}: model_type={kind!r} cannot be planned; moejax does not support {IMPOSSIBLE[kind]}")
  kin = KIN.get(str(kind))
  cap = config.get("final_logit_softcapping")
  if kin is not None:
    missing |= kin.without
    config = _as_family(config, kin)
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
  return dataclasses.replace(model, logit_cap=cap) if cap else model, missing


def _as_family(config: Config, kin: _Kin) -> Config:
  renamed = {ours: config[theirs] for ours, theirs in kin.fields.items()}
  kept = {name: value for name, value in config.items() if name not in (*kin.dropped, *kin.fields.values())}
  if "moe_intermediate_size" in renamed:  # no layer is dense
    kept["intermediate_size"] = renamed["moe_intermediate_size"]
  return kept | renamed | dict(kin.only) | {"model_type": kin.family, "hidden_act": "silu"}


def _neutralize(config: Config, sequence_length: int, missing: dict[str, str]) -> None:
  """Takes fields that moejax lacks out of a config.json, and notes them."""
  has: dict[str, Callable[[Any], bool]] = {
    "sliding_window": lambda window: window < sequence_length and config.get("use_sliding_window", True),
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
  if family is None or family.sliding is None:
    config.pop("layer_types", None)


def _supports(family: Family, name: str, value: Any) -> bool:
  """Whether models of a family are imported with this field."""
  if name == "sliding_window":
    return family.sliding is not None
  kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else value
  return name in ("rope_scaling", "rope_parameters") and ("full_attention" in value or kind in ROPE_TYPES)
