"""What a config.json of Llama 4 says of each layer: chunks, rotary embeddings, and which layers are sparse.

`layer_types` says which layers attend to chunks, and `no_rope_layers` has a 1 for each layer with a rotary embedding.
These are the same layers by default.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.config.attention import GroupedQuery
from moejax.errors import UserError

Config = Mapping[str, Any]
CHUNKED, FULL = "chunked_attention", "full_attention"

LLAMA_4_FIELDS = frozenset({
  "attention_chunk_size", "attn_scale", "attn_temperature_tuning", "floor_scale", "layer_types", "moe_layers",
  "no_rope_layer_interval", "no_rope_layers", "use_qk_norm",
})  # fmt: skip
"""Fields of config.json that this file reads."""

LLAMA_4_DEFAULTS: Config = {
  "attention_chunk_size": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True, "floor_scale": 8192,
  "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16_384, "num_experts_per_tok": 1,
  "num_key_value_heads": 8, "num_local_experts": 16, "rms_norm_eps": 1e-5, "use_qk_norm": True,
}  # fmt: skip
"""Values of fields that config.json may lack, in transformers."""


def attention_layers(config: Config, length: int, scaling: dict[str, Any]) -> tuple[dict[str, Any], ...]:
  """The attention layer of each layer, as plain data.

  Args:
    config: the content of config.json, with a valid num_hidden_layers.
    length: maximum length of a text in tokens. Chunks that are at least as long have no effect.
    scaling: of the rotary embedding, as plain data.

  Raises:
    UserError: If a list does not have a valid entry for each layer.
  """
  count, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
  rotary = config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(count)]
  types = config.get("layer_types") or [CHUNKED if is_rotary else FULL for is_rotary in rotary]
  for name, entries in (("no_rope_layers", rotary), ("layer_types", types)):
    if len(entries) != count:
      raise UserError(f"config.json: {name} has {len(entries)} entries, but num_hidden_layers={count}")
  if unknown := sorted(set(types) - {CHUNKED, FULL}):
    raise UserError(f"config.json: layer_types has {', '.join(unknown)}; Llama 4 has only {CHUNKED} and {FULL}")
  chunk = config.get("attention_chunk_size")
  chunk = None if chunk is None or chunk >= length else chunk
  with_rotary = {"rope_scaling": scaling, "norm_after_rotary": bool(config.get("use_qk_norm"))}
  without: dict[str, Any] = {"rotary_embedding": False}
  if config.get("attn_temperature_tuning") and config.get("attn_scale"):
    without |= {"score_log_scale": config["attn_scale"], "score_log_length": config.get("floor_scale")}
  return tuple(
    {"chunk": chunk if of_type == CHUNKED else None, **(with_rotary if is_rotary else without)}
    for of_type, is_rotary in zip(types, rotary, strict=True)
  )


def fields_of_layers(layers: Sequence[GroupedQuery]) -> dict[str, Any]:
  """The fields of config.json for the attention layers of a model, without the rotary embedding. If layers differ where
  Llama 4 has one value, reading the fields gives another model."""
  chunks = [layer.chunk for layer in layers if layer.chunk is not None]
  scaled = [layer for layer in layers if layer.score_log_scale]
  found: dict[str, Any] = {
    "no_rope_layers": [int(layer.rotary_embedding) for layer in layers],
    "layer_types": [FULL if layer.chunk is None else CHUNKED for layer in layers],
    # transformers makes a mask of chunks also for a model without them.
    "attention_chunk_size": chunks[0] if chunks else LLAMA_4_DEFAULTS["attention_chunk_size"],
    "use_qk_norm": any(layer.norm_after_rotary for layer in layers),
    "attn_temperature_tuning": bool(scaled),
  }
  if scaled:
    found |= {"attn_scale": scaled[0].score_log_scale, "floor_scale": scaled[0].score_log_length}
  return found


def sparse_step(config: Config) -> int:
  """The number n of which every n-th layer is sparse.

  Raises:
    UserError: If other layers are sparse.
  """
  layers: list[int] | None = config.get("moe_layers")
  if layers is None:
    return config.get("interleave_moe_layer_step") or 1
  if not layers or layers != list(range(layers[0], config["num_hidden_layers"], layers[0] + 1)):
    raise UserError(
      f"config.json: moe_layers={str(layers)[:60]} is not supported; moejax supports every n-th layer, as in "
      "interleave_moe_layer_step"
    )
  return layers[0] + 1
