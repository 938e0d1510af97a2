"""Converts a Hugging Face config.json to a Model, and back. Reads no weights and imports no JAX."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from moejax.config import checks
from moejax.config.checks import LARGEST_INTEGER
from moejax.config.fields import get_field
from moejax.config.model import Model
from moejax.config.plain import from_plain
from moejax.config.router import TopKRouter
from moejax.errors import UserError
from moejax.interop.families import COMMON, FAMILIES, LATENT_FIELDS, LAYER, Family
from moejax.interop.field_types import check_types, short
from moejax.interop.layer_types import OF_SCORES, attention_of, config_of_attention, rope_of
from moejax.interop.llama4_layers import LLAMA_4_FIELDS, sparse_step
from moejax.interop.same_function import differences

Config = Mapping[str, Any]
"""The content of a config.json."""

SAME: dict[str, Any] = {
  "hidden_act": "silu",
  "attention_bias": False,
  "qkv_bias": False,
  "mlp_bias": False,
  "attention_dropout": 0.0,
  "clip_qkv": None,
  "partial_rotary_factor": 1.0,
  "moe_layer_freq": 1,
  "mlp_only_layers": [],
  "scoring_func": "softmax",
  "router_jitter_noise": 0.0,
  "quantization_config": None,
}
"""Fields of config.json for which moejax supports only one value, which is also their value if null or missing."""

WITHOUT_EFFECT = frozenset(
  """
  _attn_implementation _commit_hash _name_or_path _sliding_window_pattern architectures cache_implementation ep_size
  experts_per_token for_llm_compressor head_dim initial_context_length num_mtp_layers num_nextn_predict_layers
  qk_head_dim rope_local_base_freq sliding_window_pattern attn_implementation auto_map aux_loss_alpha
  bos_token_id dtype eos_token_id gradient_checkpointing id2label initializer_range is_encoder_decoder label2id
  layer_types max_position_embeddings max_window_layers model_type output_attentions output_hidden_states
  output_router_logits pad_token_id pretraining_tp return_dict rope_parameters rope_scaling rope_theta
  router_aux_loss_coef seq_aux sliding_window torch_dtype transformers_version use_cache use_sliding_window
  """.split()  # noqa: SIM905
)
"""Fields of config.json that do not affect logits, or that are handled by separate functions."""

ALSO = {
  "num_experts": "num_local_experts",
  "num_local_experts": "num_experts",
  "rope_parameters": "rope_scaling",
}
"""Alternative names of fields in other versions of transformers."""


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Reads a config.json, given its path or its folder.

  Raises:
    UserError: If it does not exist, or is not a JSON object.
  """
  path = path / "config.json" if path.is_dir() else path
  try:
    config = json.loads(path.read_text())
  except OSError as error:
    raise UserError(
      f"{path} cannot be read ({error.strerror}); give the folder of a model, which `hf download MODEL` prints, or its "
      "config.json"
    ) from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not JSON ({error}); download it again") from None
  if not isinstance(config, dict):
    raise UserError(f"{path} is not a JSON object; give the config.json of a model")
  return config


def read_text_config(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Reads the config.json of a model of text, or of the text model within a model with images. Returns it, and how the
  names of its tensors begin.

  Raises:
    UserError: As `read_config`, or if the text model is missing.
  """
  config = read_config(folder)
  for family in FAMILIES.values():
    if family.part_of is None or config.get("model_type") != family.part_of[0]:
      continue
    text = config.get("text_config")
    if not isinstance(text, dict):
      raise UserError(f"{folder}: config.json has no object text_config; download it again")
    quantized = {name: config[name] for name in ("quantization_config",) if name in config}
    return {"model_type": family.model_type, **text, **quantized}, family.part_of[1]
  return config, ""


def family_of(config: Config) -> Family:
  """The family of a config.json.

  Raises:
    UserError: If its model_type is not supported, or another field has a value of the wrong type.
  """
  check_types(config)
  name = config.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise UserError(f"config.json: model_type={name!r} is not supported; moejax supports {', '.join(FAMILIES)}")
  return FAMILIES[name]


def max_length(config: Config) -> int:
  """Maximum length of a text in tokens: max_position_embeddings.

  Raises:
    UserError: If config.json does not have a valid value.
  """
  length = config.get("max_position_embeddings")
  if type(length) is not int or length < 1:
    raise UserError(f"config.json: max_position_embeddings={length!r} must be an integer above 0")
  return length


def multi_token_modules(config: Config) -> tuple[str, ...]:
  """How the names of the tensors of modules for multi-token prediction begin. They stand after those of the layers
  (DeepSeek-V3: `model.layers.61.`), and transformers does not use them either.

  Raises:
    UserError: If config.json does not have a valid number of them.
  """
  count = config.get("num_nextn_predict_layers") or 0
  if type(count) is not int or count < 0:
    raise UserError(f"config.json: num_nextn_predict_layers={count!r} must be an integer of 0 or above")
  first = _value(config, family_of(config), "num_hidden_layers")
  return tuple(LAYER.format(layer=layer) for layer in range(first, first + count))


def model_of(config: Config, sequence_length: int | None = None) -> Model:
  """Returns the Model that computes the same function as the Hugging Face class with this config.json.

  Args:
    config: the content of config.json.
    sequence_length: maximum length of a text in tokens. None uses max_position_embeddings. For texts up to the size of
      the window, sliding-window attention equals full attention.

  Raises:
    UserError: If the model is not supported. The message gives the field of config.json and its value.
  """
  family = family_of(config)
  fields = {**COMMON, **family.fields, **family.moe}
  absent = {name for name in family.absent if name not in config and ALSO.get(name) not in config}
  config = {**config, **{name: family.absent[name] for name in absent}}
  _check_same(config, family)
  plain: dict[str, Any] = {"layers": "scanned"}
  for ours, theirs in fields.items():
    _put(plain, ours, _value(config, family, theirs))
  if family.scales_embedding and type(plain["d_model"]) is int:
    plain["embedding_scale"] = plain["d_model"] ** 0.5
  for ours, value in family.only.items():
    _put(plain, ours, value)
  length = max_length(config) if sequence_length is None else sequence_length
  plain["attention"] = attention_of(config, family, length)
  if "moe" in plain:
    # transformers does not drop tokens.
    plain["moe"] |= {"dispatch": "grouped"}
  return from_plain(Model, plain, "config.json: model")


def check_model(config: Config, model: Model, length: int) -> None:
  """Checks that a model computes the same function as that of a config.json, for texts of this length.

  Raises:
    UserError: If it does not. The message gives the field.
  """
  for path, ours, theirs in differences(model, model_of(config, length)):
    raise UserError(f"model.{path}={ours!r} differs from config.json, which has {theirs!r}; use that value")


def config_of(model: Model, length: int, dtype: str = "float32") -> dict[str, Any]:
  """Returns the config.json of the first family that supports a model.

  Args:
    model: the model.
    length: training sequence length.
    dtype: PyTorch name of the dtype of the weights.

  Raises:
    UserError: If no family supports the model. The message gives the field of the model and its value.
  """
  of_its_kind = [family for family in FAMILIES.values() if bool(family.moe) == (model.moe is not None)]
  found = [(family, there) for family in of_its_kind if (there := _inexpressible(family, model)) is not None]
  if not found:
    raise UserError(f"no family of {', '.join(FAMILIES)} has a model like model.moe={model.moe!r}")
  family, unlike = min(found, key=lambda pair: len(pair[1]))
  if unlike:
    path, ours, theirs = unlike[0]
    raise UserError(
      f"model.{path}={short(ours)} is not supported by {family.model_type}, which requires {short(theirs)}, nor by "
      "any other family; only a model that was trained with that value can be exported"
    )
  if family.model_type == "llama":
    checks.divides(model.num_heads, "model.num_heads", model.d_model, "model.d_model")  # LlamaConfig refuses it
  return _config_in(family, model) | {"max_position_embeddings": length, "dtype": dtype, "torch_dtype": dtype}


def _config_in(family: Family, model: Model) -> dict[str, Any]:
  """The fields of config.json that determine the function of a model of this family."""
  fields = {theirs: get_field(model, ours) for ours, theirs in {**COMMON, **family.fields, **family.moe}.items()}
  if "shared_expert_intermediate_size" in fields:
    fields["shared_expert_intermediate_size"] *= fields["moe_intermediate_size"]
  return {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    **fields,
    "hidden_act": "silu",
    "attention_bias": False,
    **family.same,
    **config_of_attention(model, family),
  }


def _inexpressible(family: Family, model: Model) -> list[tuple[str, Any, Any]] | None:
  """Fields of a model that this family does not support, with both values. None if it does not support any similar
  model."""
  near = model
  if model.moe and not isinstance(model.moe.router, TopKRouter):  # lacks fields of config.json
    near = dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=TopKRouter(renormalize=False)))
  try:
    back = model_of(_config_in(family, near), LARGEST_INTEGER)
  except UserError:
    return None
  return list(differences(model, back))


def _check_same(config: Config, family: Family) -> None:
  """Raises UserError for a field that would change the function of the model, or that is unknown."""
  used = {*COMMON.values(), *family.fields.values(), *family.moe.values(), OF_SCORES}
  used |= {*LATENT_FIELDS.values()} if family.latent else set()
  used |= LLAMA_4_FIELDS if family.chunked else set()
  used |= {ALSO[name] for name in used if name in ALSO}
  same = {**SAME, **family.same}
  for name, value in config.items():
    if name in used or name in WITHOUT_EFFECT or value is None:
      continue
    if name in same:
      if value != same[name]:
        raise UserError(f"config.json: {name}={value!r} is not supported; moejax supports only {same[name]!r}")
    elif value not in (False, "", [], {}):
      raise UserError(
        f"config.json: {name}={value!r} of model_type={family.model_type!r} is unknown and may affect the model; "
        "remove the field if it does not affect logits"
      )


def _value(config: Config, family: Family, theirs: str) -> Any:
  """A field of config.json, or its default if it is missing."""
  if theirs == "rope_theta":
    return rope_of(config, family)[0]
  if theirs == "shared_expert_intermediate_size":
    width, each = config.get(theirs) or 0, _value(config, family, "moe_intermediate_size")
    checks.divides(each, "moe_intermediate_size", width, f"config.json: {theirs}")
    return width // each
  if theirs == "interleave_moe_layer_step":
    return sparse_step(config)
  for name in (theirs, ALSO.get(theirs, theirs)):
    if (value := config.get(name)) is not None:
      return value
  if theirs in family.defaults:
    return family.defaults[theirs]
  match theirs:
    case "tie_word_embeddings" | "norm_topk_prob":
      return False
    case "num_key_value_heads":
      return _value(config, family, "num_attention_heads")
    case "n_shared_experts" | "first_k_dense_replace":
      return 0
    case "decoder_sparse_step":
      return 1
    case "head_dim":
      return _head_dim(config, family)
    case _:
      raise UserError(f"config.json has no {theirs}, which model_type={family.model_type!r} needs")


def _head_dim(config: Config, family: Family) -> int:
  if family.model_type.startswith("qwen3"):
    return 128  # where config.json has none, transformers takes it from no other field
  width, heads = (_value(config, family, name) for name in ("hidden_size", "num_attention_heads"))
  return width // heads


def _put(plain: dict[str, Any], path: str, value: Any) -> None:
  """Sets a field of nested dictionaries by its dotted path."""
  *groups, name = path.split(".")
  for group in groups:
    plain = plain.setdefault(group, {})
  plain[name] = value
