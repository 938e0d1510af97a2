"""Reads the settings of a MaxText run: a YAML file, the files that it is based on, and overrides."""

import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from moejax.config.checks import LARGEST_INTEGER
from moejax.errors import UserError
from moejax.interop.field_types import short

Settings = dict[str, Any]

BASE = "base.yml"
"""The file with the defaults of MaxText. If it is not there, `moejax.interop.maxtext.DEFAULTS` take its place."""

LONGEST_CHAIN, DEEPEST = 10, 10


def read_settings(path: pathlib.Path, overrides: tuple[str, ...]) -> Settings:
  """The settings of a file and its overrides, such as `per_device_batch_size=8`, as on MaxText's command line.

  As in MaxText, the settings of `base_config` come first, then those of the file, those of `models/MODEL_NAME.yml` and
  the overrides.

  Raises:
    UserError: If a file cannot be read, or an override is not valid.
  """
  given: Settings = {}
  for override in overrides:
    name, equals, value = override.partition("=")
    if not equals or not name:
      raise UserError(f"{override!r} is not an override of MaxText; write it as name=value")
    given[name] = _parse(value, f"the override {override!r}")
  settings = _chain(path, [])
  model = given.get("model_name", settings.get("model_name"))
  if model not in (None, "", "default", path.stem):
    settings |= _mapping(_model_file(path, model))
  return settings | given


def _chain(path: pathlib.Path, before: list[pathlib.Path]) -> Settings:
  """The settings of a file over those of its base_config."""
  if path.resolve() in before or len(before) == LONGEST_CHAIN:
    raise UserError(f"{before[0]}: the chain of base_config returns to {path} or is too long; remove a base_config")
  settings = _mapping(path)
  base = settings.pop("base_config", None)
  if base in (None, ""):
    return settings
  if not isinstance(base, str) or "\0" in base:
    raise UserError(f"{path}: base_config={short(base)} must be the path of a file")
  found = next((file for file in (path.parent / base, path.parent.parent / base) if file.is_file()), None)
  if found is None and pathlib.PurePath(base).name == BASE:
    return settings
  if found is None:
    raise UserError(f"{path}: base_config={base!r} does not exist in {path.parent}; copy it there")
  return _chain(found, [*before, path.resolve()]) | settings


def _model_file(path: pathlib.Path, model: Any) -> pathlib.Path:
  name = f"{model}.yml"
  folders = (path.parent / "models", path.parent, path.parent.parent / "models")
  found = next((folder / name for folder in folders if (folder / name).is_file()), None)
  if not isinstance(model, str) or pathlib.PurePath(model).name != model or found is None:
    raise UserError(
      f"model_name={short(model)}: {path.parent / 'models'} has no such file; copy it there, or give its path instead"
    )
  return found


def _mapping(path: pathlib.Path) -> Settings:
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
  settings = _parse(text, str(path))
  if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
    raise UserError(f"{path} is not a YAML mapping of names to values; give a configuration of MaxText")
  return settings


def _parse(text: str, where: str) -> Any:
  """The content of YAML without aliases, a few of which can stand for gigabytes."""
  depth = 0
  try:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
      if isinstance(event, yaml.AliasEvent):
        raise UserError(f"{where} has YAML aliases (*name), which are not supported; write the values out")
      depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
      if depth > DEEPEST:
        raise UserError(f"{where} is nested in more than {DEEPEST} levels; give a configuration of MaxText")
    return yaml.safe_load(text)
  except UserError:
    raise
  except (yaml.YAMLError, ValueError) as error:
    raise UserError(f"{where} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from None


def check_settings(settings: Mapping[str, Any]) -> None:
  """Checks that settings have values of the right kind.

  Raises:
    UserError: If one has not. The message gives its name and value.
  """
  for wanted, fits, names in KINDS:
    for name in names.split():
      value = settings.get(name)
      if value is not None and not fits(value):
        raise UserError(f"{name}={short(value)} must be {wanted}")
  for name, value in settings.items():
    if name.endswith("_parallelism") and not (type(value) is int and (value == -1 or 0 < value <= 2**20)):
      raise UserError(f"{name}={short(value)} must be a number of devices, or -1")


KINDS = (
  (
    "an integer above 0",
    lambda value: type(value) is int and 0 < value <= LARGEST_INTEGER,
    "base_emb_dim base_num_query_heads base_num_kv_heads base_mlp_dim base_moe_mlp_dim head_dim vocab_size "
    "global_parameter_scale num_experts num_experts_per_tok max_target_length gradient_accumulation_steps "
    "interleave_moe_layer_step num_vocab_tiling",
  ),
  ("an integer from 1 to 10,000", lambda value: type(value) is int and 0 < value <= 10_000, "base_num_decoder_layers"),
  (
    "an integer of at least 0",
    lambda value: type(value) is int and 0 <= value <= LARGEST_INTEGER,
    "shared_experts first_num_dense_layers",
  ),
  (
    "a number above 0",
    lambda value: type(value) in (int, float) and 0 < value < 1e12,
    "normalization_layer_epsilon rope_max_timescale per_device_batch_size",
  ),
  (
    "a number",
    lambda value: type(value) in (int, float) and abs(value) < 1e12,
    "capacity_factor final_logits_soft_cap attn_logits_soft_cap",
  ),
  (
    "true or false",
    lambda value: isinstance(value, bool),
    "logits_via_embedding use_qk_norm norm_topk_prob scan_layers",
  ),
  ("text", lambda value: isinstance(value, str), "remat_policy dtype decoder_block attention attention_type"),
  (
    "remat, device or offload",
    lambda value: value in ("remat", "device", "offload"),
    "decoder_layer_input query_proj key_proj value_proj mla_q mla_kv context out_proj mlpwi mlpwi_0 mlpwi_1 mlpwo "
    "moe_mlpwi_0 moe_mlpwi_1 moe_mlpwo",
  ),
  (
    "a list of one or two names",
    lambda value: isinstance(value, list) and len(value) in (1, 2) and all(isinstance(one, str) for one in value),
    "mlp_activations",
  ),
)
"""What a value must be, a test of it, and the settings. They may also be null or missing."""
