"""Converts the attention layers of a Hugging Face config.json to `Model.attention`, and back.

A config.json has windows and rotary embeddings for the whole model, or for each type of layer.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from moejax.config.attention import GroupedQuery, Latent
from moejax.config.checks import LARGEST_COUNT
from moejax.config.model import Model
from moejax.config.rope import LinearScaling, Llama3Scaling, NoScaling, RopeScaling, YarnScaling
from moejax.errors import UserError
from moejax.interop.families import LATENT_FIELDS, Family
from moejax.interop.llama4_layers import attention_layers, fields_of_layers

Layer = TypeVar("Layer")
Config = Mapping[str, Any]
OF_SCORES = "query_pre_attn_scalar"
"""Field of config.json for the number whose square root divides scores, in place of the dimension of a head."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers."""

SCALINGS: Mapping[type[RopeScaling], Mapping[str, str]] = {
  NoScaling: {},
  LinearScaling: {"factor": "factor"},
  Llama3Scaling: {
    "factor": "factor",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
  },
  YarnScaling: {
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "original_length": "original_max_position_embeddings",
    "whole_dimensions": "truncate",
    "attention_factor": "attention_factor",
  },
}
"""The fields of each scaling, and those of config.json."""
OPTIONAL = ("beta_fast", "beta_slow", "truncate", "attention_factor")
"""Fields of config.json that a scaling may lack. Their defaults are those of moejax."""
MSCALES = ("mscale", "mscale_all_dim")
"""Fields of config.json that scale the logarithm in the factors of YaRN (DeepSeek)."""
ROPE_TYPES = {"default": NoScaling, "linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


def attention_of(config: Config, family: Family, length: int) -> list[dict[str, Any]]:
  """The attention layers of a period, as plain data.

  Args:
    config: the content of config.json.
    family: its family.
    length: maximum length of a text in tokens. A window that is at least as long has no effect.

  Raises:
    UserError: If the layers are not supported.
  """
  if family.chunked:
    return list(shortest_pattern(attention_layers(config, length, rope_of(config, family)[1])))
  types = layer_types(config, family, length)
  make = _latent_layer if family.latent else _layer
  layers = {name: make(config, family, name, length) for name in dict.fromkeys(types)}
  return [layers[name] for name in shortest_pattern(tuple(types))]


def shortest_pattern(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
  """The shortest beginning of the layers that they repeat."""
  count = len(layers)
  repeats = (n for n in range(1, count + 1) if count % n == 0 and layers == layers[:n] * (count // n))
  return layers[: next(repeats)]


def layer_types(config: Config, family: Family, length: int) -> list[str]:
  """The type of each layer.

  Raises:
    UserError: If the model has windows, which its family does not support, or other types of layers.
  """
  count, given = config.get("num_hidden_layers"), config.get("layer_types")
  if type(count) is not int or count < 1:
    raise UserError(f"config.json: num_hidden_layers={count!r} must be an integer above 0")
  if given and (set(given) - {FULL, SLIDING} or len(given) != count):
    raise UserError(
      f"config.json: layer_types has {len(given)} layers of {', '.join(sorted(set(given)))}; moejax supports only "
      f"{FULL} and {SLIDING}, for each of num_hidden_layers={count}"
    )
  window = _window(config, length)
  if window is None and family.local_theta is None:
    return [FULL] * count
  sliding = family.sliding
  types = given or [SLIDING if sliding is None or sliding(i, config) else FULL for i in range(count)]
  if SLIDING in types and sliding is None:
    raise UserError(
      f"config.json: sliding_window={window} is less than the sequence length {length}, and models of "
      f"model_type={family.model_type!r} have no windows; use --sequence-length {window} or less, for which it has no "
      "effect"
    )
  return types


def _window(config: Config, length: int) -> int | None:
  """The window of layers that have one. None if it has no effect."""
  window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
  return None if window is None or window >= length else window


def _layer(config: Config, family: Family, layer_type: str, length: int) -> dict[str, Any]:
  theta, scaling = rope_of(config, family, layer_type)
  layer = {"rope_scaling": scaling, **family.attention}
  if layer_type == SLIDING:
    layer["window"] = _window(config, length)
    if family.local_theta is not None:
      layer["rope_theta"] = theta
  if config.get(OF_SCORES) is not None:
    if config.get("head_dim") is None:
      raise UserError(f"config.json has no head_dim, which {OF_SCORES}={config[OF_SCORES]} needs")
    layer["score_scale"] = math.sqrt(config["head_dim"] / config[OF_SCORES])
  return layer


def _latent_layer(config: Config, family: Family, layer_type: str, length: int) -> dict[str, Any]:
  _, scaling = rope_of(config, family, layer_type)
  layer = {ours: config.get(theirs) for ours, theirs in LATENT_FIELDS.items()}
  if layer["value_dim"] == config.get("qk_nope_head_dim"):
    layer["value_dim"] = None
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  scale = _mscale(rope["factor"], rope.get("mscale_all_dim") or 0.0) ** 2 if scaling["kind"] == "yarn" else 1.0
  return {"kind": "latent", **layer, "rope_scaling": scaling, "score_scale": scale}


def _mscale(factor: float, of_log: float) -> float:
  """The factor of queries and keys of YaRN, whose logarithm config.json may scale."""
  return 0.1 * of_log * math.log(factor) + 1.0


def rope_of(config: Config, family: Family, layer_type: str = FULL) -> tuple[float, dict[str, Any]]:
  """The base of the rotary embedding of a type of layer, and its scaling as plain data.

  transformers 5 writes both as rope_parameters, for each type of layer if it differs; earlier versions write a
  rope_theta and a rope_scaling, which is that of layers without a window.

  Raises:
    UserError: If the scaling is not supported.
  """
  local = layer_type == SLIDING and family.local_theta is not None
  name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
  rope = config.get(name) or {}
  if FULL in rope or SLIDING in rope:
    rope = rope.get(layer_type) or {}
  elif local and name == "rope_scaling":
    rope = {}
  theta = rope.get("rope_theta") if isinstance(rope, dict) else None
  if theta is None:
    theta = config.get("rope_local_base_freq" if local else "rope_theta")
  if theta is None:
    theta = (local and family.local_theta) or family.rope_theta
  return theta, _scaling(rope, name)


def _scaling(rope: Any, name: str) -> dict[str, Any]:
  """The scaling of the field `name`."""
  kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
  if kind not in ROPE_TYPES:
    raise UserError(f"config.json: {name}={rope!r} is not supported; moejax supports {', '.join(ROPE_TYPES)}")
  fields = SCALINGS[ROPE_TYPES[kind]]
  if kind == "default" and not isinstance(rope, dict):
    return {"kind": "none"}
  known = {
    *fields.values(),
    *(MSCALES if kind == "yarn" else ()),
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
  }
  unknown = [field for field, value in rope.items() if field not in known and value is not None]
  if rope.get("partial_rotary_factor", 1.0) != 1.0 or unknown:
    raise UserError(f"config.json: {name}={rope!r} is not supported; moejax supports only {', '.join(sorted(known))}")
  absent = [field for field in fields.values() if rope.get(field) is None and field not in OPTIONAL]
  if absent:
    raise UserError(f"config.json: {name}={rope!r} lacks {', '.join(absent)}; add it")
  found = {ours: rope[theirs] for ours, theirs in fields.items() if rope.get(theirs) is not None}
  if kind == "yarn" and "attention_factor" not in found and all(rope.get(name) for name in MSCALES):
    over, under = (_mscale(rope["factor"], rope[name]) for name in MSCALES)
    found["attention_factor"] = over / under
  return {"kind": ROPE_TYPES[kind].kind, **found}


def config_of_attention(model: Model, family: Family) -> dict[str, Any]:
  """The fields of config.json for the attention layers of a model. If the family does not support them, reading the
  fields gives another model."""
  layers = [*model.leading_attention, *model.attention_layers * model.num_periods]
  if family.latent:
    return _config_of_latent(model, layers[0]) if isinstance(layers[0], Latent) else {}
  grouped = [layer for layer in layers if isinstance(layer, GroupedQuery)]
  if family.chunked:
    return _config_of_chunked(model, grouped) if len(grouped) == len(layers) else {}
  windows = [layer.window for layer in grouped if layer.window is not None]
  local_layers = [layer for layer in grouped if _is_local(layer, family)]
  full_layers = [layer for layer in grouped if not _is_local(layer, family)]
  full, local = ((*first, *grouped, GroupedQuery())[0] for first in (full_layers, local_layers))
  rope = _rope_parameters(model.rope_theta, full.rope_scaling)
  if family.local_theta is not None:
    rope = {FULL: rope, SLIDING: _rope_parameters(local.rope_theta or model.rope_theta, local.rope_scaling)}
  window = windows[0] if windows else LARGEST_COUNT if local_layers else None
  found: dict[str, Any] = {"rope_parameters": rope, "sliding_window": window}
  if family.local_theta is not None:
    found[OF_SCORES] = round(model.head_dim / full.score_scale**2)
  if family.local_theta is None:
    found |= _rope_scaling(rope)
  if local_layers and family.by_layer:
    types = [SLIDING if isinstance(layer, GroupedQuery) and _is_local(layer, family) else FULL for layer in layers]
    found |= {"layer_types": types, "use_sliding_window": True}
  return found


def _is_local(layer: GroupedQuery, family: Family) -> bool:
  return layer.window is not None or (family.local_theta is not None and layer.rope_theta is not None)


def _config_of_chunked(model: Model, layers: list[GroupedQuery]) -> dict[str, Any]:
  rotary = next((layer for layer in layers if layer.rotary_embedding), GroupedQuery())
  rope = _rope_parameters(model.rope_theta, rotary.rope_scaling)
  return {**fields_of_layers(layers), "rope_parameters": rope, **_rope_scaling(rope)}


def _config_of_latent(model: Model, layer: Latent) -> dict[str, Any]:
  rope = _rope_parameters(model.rope_theta, layer.rope_scaling)
  if isinstance(layer.rope_scaling, YarnScaling) and layer.score_scale != 1.0:
    of_log = (math.sqrt(layer.score_scale) - 1) / (0.1 * math.log(layer.rope_scaling.factor))
    rope |= {"attention_factor": layer.rope_scaling.magnitude, "mscale_all_dim": round(of_log, 9)}
  fields = {theirs: getattr(layer, ours) for ours, theirs in LATENT_FIELDS.items()}
  return fields | {"v_head_dim": layer.values(model), "rope_parameters": rope}


def _rope_parameters(theta: float, scaling: RopeScaling) -> dict[str, Any]:
  fields = {theirs: getattr(scaling, ours) for ours, theirs in SCALINGS.get(type(scaling), {}).items()}
  names = {kind: name for name, kind in ROPE_TYPES.items()}
  kept = {name: value for name, value in fields.items() if value is not None}
  return {"rope_type": names.get(type(scaling), "default"), "rope_theta": theta, **kept}


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
  """The field of transformers 4 for the scaling in rope_parameters, if there is one."""
  if rope["rope_type"] == "default":
    return {}
  return {"rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"}}
