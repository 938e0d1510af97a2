"""A YAML file of MaxText, with its overrides, as a Model, a mesh and a batch, for plans."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from moejax.config.model import Model, Remat
from moejax.config.moe import MoE
from moejax.config.sharding import Mesh
from moejax.errors import UserError

DEFAULTS: Mapping[str, Any] = {
  "base_emb_dim": 2048, "base_num_query_heads": 16, "base_num_kv_heads": 16, "base_mlp_dim": 7168,
  "base_num_decoder_layers": 16, "head_dim": 128, "vocab_size": 32_000, "mlp_activations": ["silu", "linear"],
  "logits_via_embedding": False, "normalization_layer_epsilon": 1e-5, "rope_max_timescale": 10_000,
  "global_parameter_scale": 1, "num_experts": 1, "num_experts_per_tok": 1, "shared_experts": 0, "capacity_factor": -1.0,
  "use_qk_norm": False, "remat_policy": "full", "per_device_batch_size": 12.0, "max_target_length": 2048,
  "gradient_accumulation_steps": 1, "dtype": "bfloat16", "final_logits_soft_cap": None,
}  # fmt: skip
"""Of MaxText's base.yml."""

MESH = {"data": "replica", "fsdp": "data", "expert": "expert", "tensor": "model"}
"""Our mesh axes by the names of MaxText's."""

REMAT: Mapping[str, Remat] = {
  "full": "layer_inputs",
  "minimal": "dots",
  "minimal_flash": "dots",
  "minimal_with_context": "dots",
  "save_qkv_proj": "attention",
  "save_dot_except_mlp": "attention",
  "save_dot_with_context_except_mlp": "attention",
  "qkv_proj_offloaded": "attention",
}

LACKS: Mapping[str, tuple[Any, str]] = {
  "quantization": ("", "products in {}"),
  "sliding_window_size": (0, "attention in a sliding window of {}: planned with full attention"),
  "use_iota_embed": (None, ""),
  "q_lora_rank": (0, "multi-head latent attention"),
  "kv_lora_rank": (0, "multi-head latent attention"),
  "first_num_dense_layers": (0, "{} dense layers before the sparse ones: planned with all layers sparse"),
  "attn_logits_soft_cap": (0.0, "a softcap of attention scores"),
  "optimizer_memory_host_offload": (False, "optimizer state on the host"),
  "parameter_memory_host_offload": (False, "parameters on the host"),
  "ici_context_parallelism": (1, "context parallelism"),
  "dcn_context_parallelism": (1, "context parallelism"),
  "ici_pipeline_parallelism": (1, "pipeline parallelism"),
  "dcn_pipeline_parallelism": (1, "pipeline parallelism"),
  "ici_sequence_parallelism": (1, "sequence parallelism"),
  "fused_qkv": (None, ""),
}
"""Fields that change a step and that moejax lacks: the value without the feature, and what it is. An empty text: the
step takes the same products."""


@dataclasses.dataclass(frozen=True)
class MaxText:
  """What a plan needs of a configuration of MaxText."""

  model: Model
  mesh: Mesh
  sequence_length: int
  sequences_per_device: float
  gradient_accumulation: int
  missing: dict[str, str]
  """Features that it has and moejax lacks, by field, and what they are."""

  def batch_size(self, devices: int) -> int:
    """Sequences of a step on so many devices."""
    return max(1, round(self.sequences_per_device * devices * self.gradient_accumulation))


def read_maxtext(path: pathlib.Path, overrides: tuple[str, ...]) -> MaxText:
  """The configuration of a YAML file, with overrides as MaxText's command line has them: `per_device_batch_size=8`.

  Raises:
    UserError: the file cannot be read, or an override is none.
  """
  try:
    given = yaml.safe_load(path.read_text())
  except (OSError, yaml.YAMLError) as error:
    raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
  if not isinstance(given, dict):
    raise UserError(f"{path} is not a YAML mapping; give a configuration of MaxText")
  for override in overrides:
    name, equals, value = override.partition("=")
    if not equals:
      raise UserError(f"{override!r} is no override of MaxText; write it as name=value")
    given[name] = yaml.safe_load(value)
  config = {**DEFAULTS, **given}
  missing = {
    name: what.format(config[name])
    for name, (neutral, what) in LACKS.items()
    if what and config.get(name) not in (None, neutral, "")
  }
  policy = config["remat_policy"]
  if policy not in REMAT:
    known = ", ".join(REMAT)
    raise UserError(f"remat_policy={policy!r} of {path} has no equal in moejax; override it with one of {known}")
  if "offload" in policy:
    missing["remat_policy"] = "values offloaded to the host: planned with them kept on the device"
  return MaxText(
    model=_model(config, missing),
    mesh=_mesh(config, missing),
    sequence_length=config["max_target_length"],
    sequences_per_device=config["per_device_batch_size"],
    gradient_accumulation=config["gradient_accumulation_steps"],
    missing=missing,
  )


def _model(config: Mapping[str, Any], missing: dict[str, str]) -> Model:
  of_width, of_heads, of_hidden, of_layers = _scales(config["global_parameter_scale"])
  activations = list(config["mlp_activations"])
  gated = len(activations) == 2
  if activations not in (["silu", "linear"], ["gelu"]):
    missing["mlp_activations"] = f"{' x '.join(activations)}: planned with {'silu' if gated else 'gelu'}"
  experts = config["num_experts"]
  width = config["base_mlp_dim"] * of_hidden
  dropless = config["capacity_factor"] < 0
  moe = MoE(
    num_experts=experts,
    experts_per_token=config["num_experts_per_tok"],
    d_ff=(config.get("base_moe_mlp_dim") or config["base_mlp_dim"]) * of_hidden,
    every=config.get("interleave_moe_layer_step", 1),
    num_shared_experts=config["shared_experts"],
    dispatch="grouped" if dropless else "einsum",  # type: ignore[arg-type]  # a name stands for its class
    capacity_factor=1.0 if dropless else config["capacity_factor"],
  ) if experts > 1 else None  # fmt: skip
  return Model(
    num_layers=config["base_num_decoder_layers"] * of_layers,
    d_model=config["base_emb_dim"] * of_width,
    num_heads=config["base_num_query_heads"] * of_heads,
    num_kv_heads=config["base_num_kv_heads"] * of_heads,
    head_dim=config["head_dim"],
    d_ff=width,
    vocab_size=config["vocab_size"],
    tie_embeddings=config["logits_via_embedding"],
    qk_norm=config["use_qk_norm"],
    rope_theta=float(config["rope_max_timescale"]),
    norm_epsilon=float(config["normalization_layer_epsilon"]),
    activation="swiglu" if gated else "gelu",
    logit_cap=config["final_logits_soft_cap"] or None,
    moe=moe,
    remat=REMAT[config["remat_policy"]],
  )


def _scales(scale: int) -> tuple[int, int, int, int]:
  """Factors of width, heads, hidden width and layers, as MaxText divides global_parameter_scale, a power of 2."""
  exponent = scale.bit_length() - 1
  if scale < 1 or 2**exponent != scale:
    raise UserError(f"global_parameter_scale={scale} must be a power of 2")
  base, rest = divmod(exponent, 3)
  of_width, of_heads = 2 ** (base + (rest > 1)), 2 ** (base + (rest > 0))
  return of_width, of_heads, of_heads, 2**base


def _mesh(config: Mapping[str, Any], missing: dict[str, str]) -> Mesh:
  """The parallelism inside a slice (ici) times that between slices (dcn). -1 is what the others leave."""
  sizes = dict.fromkeys(MESH.values(), 1)
  open_axis = None
  for theirs, ours in MESH.items():
    for where in ("ici", "dcn"):
      size = config.get(f"{where}_{theirs}_parallelism", -1 if (where, theirs) == ("ici", "fsdp") else 1)
      if size == -1 and ours != "data" and where == "ici":
        raise UserError(f"{where}_{theirs}_parallelism=-1: moejax fills in only the fsdp axis; give a number")
      if size == -1 and where == "ici":
        open_axis = ours
      elif size != -1:
        sizes[ours] *= size
  data = None if open_axis == "data" else sizes["data"]
  return Mesh(replica=sizes["replica"], data=data, expert=sizes["expert"], model=sizes["model"])
