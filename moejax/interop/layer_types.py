"""Converts the attention layers of a Hugging Face config.json to `Model.attention`, and back.

A config.json has windows and rotary embeddings for the whole model, or for each type of layer.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from moejax.config.attention import GroupedQuery
from moejax.config.model import Model
from moejax.config.rope import LinearScaling, Llama3Scaling, NoScaling, RopeScaling, YarnScaling
from moejax.errors import UserError
from moejax.interop.families import Family

Layer = TypeVar("Layer")
Config = Mapping[str, Any]
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
  types = layer_types(config, family, length)
  layers = {name: _layer(config, family, name) for name in dict.fromkeys(types)}
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
  window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
  if window is None or window >= length:
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


def _layer(config: Config, family: Family, layer_type: str) -> dict[str, Any]:
  theta, scaling = rope_of(config, family, layer_type)
  layer = {"rope_scaling": scaling, **family.attention}
  if layer_type == SLIDING:
    layer["window"] = config["sliding_window"]
    if family.local_theta is not None:
      layer["rope_theta"] = theta
  return layer


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
  known = {*fields.values(), "rope_type", "type", "rope_theta", "partial_rotary_factor"}
  unknown = [field for field, value in rope.items() if field not in known and value is not None]
  if rope.get("partial_rotary_factor", 1.0) != 1.0 or unknown:
    raise UserError(f"config.json: {name}={rope!r} is not supported; moejax supports only {', '.join(sorted(known))}")
  absent = [field for field in fields.values() if rope.get(field) is None and field not in OPTIONAL]
  if absent:
    raise UserError(f"config.json: {name}={rope!r} lacks {', '.join(absent)}; add it")
  found = {ours: rope[theirs] for ours, theirs in fields.items() if rope.get(theirs) is not None}
  return {"kind": ROPE_TYPES[kind].kind, **found}


def config_of_attention(model: Model, family: Family) -> dict[str, Any]:
  """The fields of config.json for the attention layers of a model. If the family does not support them, reading the
  fields gives another model."""
  layers = [*model.leading_attention, *model.attention_layers * model.num_periods]
  grouped = [layer for layer in layers if isinstance(layer, GroupedQuery)]
  windows = [layer.window for layer in grouped if layer.window is not None]
  full = next((layer for layer in grouped if layer.window is None), grouped[0] if grouped else GroupedQuery())
  local = next((layer for layer in grouped if layer.window is not None), full)
  rope = _rope_parameters(model.rope_theta, full.rope_scaling)
  if family.local_theta is not None:
    rope = {FULL: rope, SLIDING: _rope_parameters(local.rope_theta or model.rope_theta, local.rope_scaling)}
  found: dict[str, Any] = {"rope_parameters": rope, "sliding_window": windows[0] if windows else None}
  if family.local_theta is None and not isinstance(full.rope_scaling, NoScaling):
    found["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}  # transformers 4
  if windows and family.by_layer:
    types = [SLIDING if isinstance(layer, GroupedQuery) and layer.window else FULL for layer in layers]
    found |= {"layer_types": types, "use_sliding_window": True}
  return found


def _rope_parameters(theta: float, scaling: RopeScaling) -> dict[str, Any]:
  fields = {theirs: getattr(scaling, ours) for ours, theirs in SCALINGS.get(type(scaling), {}).items()}
  names = {kind: name for name, kind in ROPE_TYPES.items()}
  kept = {name: value for name, value in fields.items() if value is not None}
  return {"rope_type": names.get(type(scaling), "default"), "rope_theta": theta, **kept}
