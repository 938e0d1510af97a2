"""A YAML file of MaxText, with its overrides, as a Model, a mesh and a batch, for plans."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.remat import OF_EXPERTS, Remat, Saved
from moejax.config.router import TopKRouter
from moejax.config.sharding import Mesh
from moejax.errors import UserError
from moejax.interop.maxtext_files import check_settings, read_settings

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

_QKV: tuple[Saved, ...] = ("queries", "keys_values")
_ATTENTION: tuple[Saved, ...] = (*_QKV, "attention_out")
_ALL: tuple[Saved, ...] = (*_ATTENTION, "feed_forward_in", "feed_forward_out")

REMAT: Mapping[str, tuple[Saved, ...]] = {
  "full": (), "minimal": _ALL, "minimal_flash": (*_ALL, "context"), "minimal_with_context": (*_ALL, "context"),
  "minimal_offloaded": _ALL, "save_qkv_proj": _QKV, "save_out_proj": ("attention_out",),
  "save_dot_except_mlp": _ATTENTION, "save_dot_except_mlpwi": (*_ATTENTION, "feed_forward_out"),
  "save_dot_with_context_except_mlp": (*_ATTENTION, "context"), "qkv_proj_offloaded": _QKV,
}  # fmt: skip
"""The values that MaxText's remat_policy saves or, if it ends in `offloaded`, offloads."""

TENSORS: Mapping[str, Saved] = {
  "query_proj": "queries", "mla_q": "queries", "key_proj": "keys_values", "value_proj": "keys_values",
  "mla_kv": "keys_values", "context": "context", "out_proj": "attention_out", "mlpwi": "feed_forward_in",
  "mlpwi_0": "feed_forward_in", "mlpwi_1": "feed_forward_in", "mlpwo": "feed_forward_out",
  "moe_mlpwi_0": "experts_in", "moe_mlpwi_1": "experts_in", "moe_mlpwo": "experts_out",
}  # fmt: skip
"""The values of `Model.save_activations` by the tensors to which remat_policy=custom gives a place: remat, device or
offload."""

USED = {*DEFAULTS, *TENSORS, "decoder_layer_input", "base_moe_mlp_dim", "interleave_moe_layer_step",
        "first_num_dense_layers", "norm_topk_prob", "num_vocab_tiling", "scan_layers"}  # fmt: skip
"""Settings that a plan uses."""

TOGETHER = (("key_proj", "value_proj"), ("mlpwi_0", "mlpwi_1"), ("moe_mlpwi_0", "moe_mlpwi_1"))
"""Tensors that are one value here."""

LACKS: Mapping[str, tuple[tuple[Any, ...], str]] = {
  **{name: (("remat",), f"{name}={{}} of a remat_policy") for name in ("qkv_proj", "query_wa_proj", "kv_wa_proj")},
  "quantization": (("",), "products in {}"),
  "weight_dtype": (("float32",), "weights in {}: planned with float32"),
  "attention": (
    ("autoselected", "flash", "cudnn_flash_te", "cudnn_flash_jax"),
    "attention {}: planned with fused attention",
  ),
  "attention_type": (("global",), "attention of the type {}: planned with full attention"),
  "attention_bias": ((False,), "biases of the attention projections"),
  "attention_sink": ((False,), "attention sinks"),
  "attn_logits_soft_cap": ((0, 0.0), "a softcap of attention scores"),
  "sliding_window_size": ((0,), "attention in a sliding window of {}: planned with full attention"),
  "chunk_attn_window_size": ((0,), "attention in chunks of {}: planned with full attention"),
  "nope_layer_interval": ((-1, 0), "layers without a rotary embedding"),
  "decoder_block": (
    ("default", "llama2", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    "layers of the kind {}: planned as those of Llama",
  ),
  "mlp_bias": ((False,), "biases of the feed-forward layers"),
  "use_post_attn_norm": ((False,), "norms after attention"),
  "use_post_ffw_norm": ((False,), "norms after feed-forward layers"),
  "q_lora_rank": ((0,), "multi-head latent attention"),
  "kv_lora_rank": ((0,), "multi-head latent attention"),
  "rope_type": (("default", ""), "scaling of the rotary embedding ({})"),
  "rope_min_timescale": ((1,), "another frequency of the rotary embedding"),
  "local_rope_max_timescale": ((-1, 0), "another rotary embedding in layers with a window"),
  "partial_rotary_factor": ((1, 1.0), "rotary embedding of a part of each head"),
  "trainable_position_size": ((-1,), "learned positions"),
  "use_untrainable_positional_embedding": ((False,), "sinusoidal positions"),
  "dropout_rate": ((0, 0.0), "dropout"),
  "mtp_num_layers": ((0,), "modules for multi-token prediction"),
  "use_multimodal": ((False,), "the image encoder: planned as a model of text"),
  "routed_scaling_factor": ((1, 1.0), "a scale of the router's weights"),
  "routed_score_func": (("", "softmax"), "the score function {} of the router"),
  "routed_bias": ((False,), "a bias of the router"),
  "n_routing_groups": ((-1, 1), "a router with groups of experts"),
  "topk_routing_group": ((-1, 1), "a router with groups of experts"),
  "use_random_routing": ((False,), "random routing"),
  "opt_type": (("adamw", "adam_pax"), "the optimizer {}: planned with AdamW"),
  "mu_dtype": (("", "float32"), "first moments in {}: planned with float32"),
  "optimizer_memory_host_offload": ((False,), "optimizer state on the host"),
  "parameter_memory_host_offload": ((False,), "parameters on the host"),
}
"""Settings that change a step and that moejax lacks: the values without the feature, and what it is."""

WITHOUT_EFFECT = re.compile(
  r"run_name|model_name|hardware|steps|prompt|tokenizer.*|dataset.*|hf_.*|grain_.*|.*eval.*|data_.*|.*shuff.*|"
  r"enable_(check|single|goodput|emergency|data|dropout|continuous|gcp|model_warmup|padding|jax|nnx|tunix|diloco|batch).*|"
  r".*checkpoint.*|load_.*|async_.*|save_.*|.*_period|restore_.*|local_checkpoint.*|.*(metrics|log|profile|trace|tensorboard|goodput|vertex|"
  r"monitor|heartbeat|upload|debug).*|base_output_directory|jax_.*|compile_.*|compiled_.*|.*_seed|max_corpus_chars|"
  r"learning_rate.*|cosine_.*|warmup_.*|adam_.*|gradient_clipping_threshold|decode_.*|inference_.*|prefill_.*|"
  r"max_prefill.*|autoregressive_.*|ar_.*_axis_order|.*_axis_order|reuse_example_batch|mesh_axes|logical_axis_rules|data_sharding|"
  r"num_slices|expansion_factor.*|quantiz.*kv.*|kv_quant.*|quantization_local_shard_count|checkpoint.*|force_unroll|param_scan_axis|"
  r"z_loss.*|sharding_tolerance|use_iota_embed|fused_qkv|fused_mlp|sparse_matmul|megablox|use_chat_template|chat_.*|"
  r"normalize_embedding_logits|logits_dot_in_fp32|cast_logits_to_fp32|float32_.*|matmul_precision|activations_in_float32|"
  r"load_balance_loss_weight|sa_.*|wi_tile.*|wo_tile.*|tile_.*|scan_layers_per_stage|allow_split_physical_axes|"
  r"optimize_mesh_for_tpu_v6e|custom_mesh|packing|num_epoch|colocated.*|.*_path|.*_dir|.*_directory|context_parallel_load_balance|"
  r"rope_use_scale|original_max_position_embeddings|max_position_embeddings|mscale|rope_factor|beta_.*|qk_.*head_dim|v_head_dim|"
  r"mtp_loss_scaling_factor|attn_.*query_scale|shardy|subslice.*|internal_.*|record_.*|max_checkify|add_bos|add_eos|"
  r"use_(ragged|vertex|dpo|sft|grpo|qwix|tokamax|jax|replicator|custom_sort|max_logit|batch).*"
)
"""Names of settings that do not change the time of a step, or only tell more of a feature in LACKS."""


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
  given = {name: value for name, value in read_settings(path, overrides).items() if value is not None}
  config = {**DEFAULTS, **given}
  check_settings(config)
  missing = {
    name: what.format(str(config[name])[:40])
    for name, (neutral, what) in LACKS.items()
    if name in config and config[name] not in (*neutral, "")
  }
  axes = {f"{where}_{axis}_parallelism" for where in ("ici", "dcn") for axis in MESH}
  for name, value in given.items():
    if name.endswith("_parallelism") and name not in axes:
      if value not in (1, -1):
        missing[name] = "parallelism over other axes than data, fsdp, expert and tensor"
    elif name not in USED and name not in LACKS and name not in axes and not WITHOUT_EFFECT.fullmatch(name):
      missing[name] = f"a setting that moejax does not know ({str(value)[:40]})"
  policy = config["remat_policy"]
  if config["dtype"] not in ("bfloat16", "float32"):
    raise UserError(f"dtype={config['dtype']!r} of {path} is not supported; override it with bfloat16 or float32")
  if policy not in (*REMAT, "custom"):
    known = ", ".join((*REMAT, "custom"))
    raise UserError(f"remat_policy={policy!r} of {path} has no equal in moejax; override it with one of {known}")
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
  if activations not in (["silu", "linear"], ["gelu", "linear"], ["gelu"]):
    missing["mlp_activations"] = f"{' x '.join(activations)}: planned with {'silu' if gated else 'gelu'}"
  experts = config["num_experts"]
  width = config["base_mlp_dim"] * of_hidden
  dropless = config["capacity_factor"] < 0
  # Mixtral's router always renormalizes. With one expert per token it cannot.
  renormalizes = config.get("decoder_block") != "qwen3_moe" or config.get("norm_topk_prob", False)
  moe = MoE(
    num_experts=experts,
    experts_per_token=config["num_experts_per_tok"],
    d_ff=(config.get("base_moe_mlp_dim") or config["base_mlp_dim"]) * of_hidden,
    every=config.get("interleave_moe_layer_step", 1),
    leading_dense=config.get("first_num_dense_layers", 0),
    num_shared_experts=config["shared_experts"],
    router=TopKRouter(renormalize=renormalizes and config["num_experts_per_tok"] > 1),
    dispatch="grouped" if dropless else "einsum",  # type: ignore[arg-type]  # a name stands for its class
    capacity_factor=1.0 if dropless else config["capacity_factor"],
  ) if experts > 1 else None  # fmt: skip
  remat, saved, offloaded = _remat(config, missing)
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
    activation="gelu" if not gated else "geglu" if activations == ["gelu", "linear"] else "swiglu",
    logit_cap=config["final_logits_soft_cap"] or None,
    logit_chunks=config.get("num_vocab_tiling", 1),
    moe=moe,
    compute_dtype=config["dtype"],
    layers="scanned" if config.get("scan_layers", True) else "unrolled",
    remat=remat,
    save_activations=saved,
    offload_activations=offloaded,
  )


def _remat(config: Mapping[str, Any], missing: dict[str, str]) -> tuple[Remat, tuple[Saved, ...], tuple[Saved, ...]]:
  """`Model.remat`, `Model.save_activations` and `Model.offload_activations`."""
  if (policy := config["remat_policy"]) != "custom":
    saved = tuple(dict.fromkeys(value for name in REMAT[policy] for value in _values(name, config)))
    return "selected" if saved else "layer_inputs", saved, saved if policy.endswith("offloaded") else ()
  places = {
    name: config[name] for name in (*TENSORS, "decoder_layer_input") if config.get(name) in ("device", "offload")
  }
  for pair in TOGETHER:
    first, second = (places.get(name, "remat") for name in pair)
    if first != second:
      missing[pair[0]] = f"{pair[0]}={first} with {pair[1]}={second}"
  values = {name: _values(TENSORS[name], config) for name in places if name in TENSORS}
  saved = tuple(dict.fromkeys(value for found in values.values() for value in found))
  offloaded = tuple(
    dict.fromkeys(value for name, found in values.items() for value in found if places[name] == "offload")
  )
  if places.get("decoder_layer_input") == "offload":
    offloaded = (*offloaded, "layer_inputs")
  return "selected" if saved else "layer_inputs", saved, offloaded


def _values(value: Saved, config: Mapping[str, Any]) -> tuple[Saved, ...]:
  """The values of a tensor that the backward pass of a model reads. The names of dense feed-forward layers are those of
  experts, too."""
  if value not in ("feed_forward_in", "feed_forward_out"):
    return (value,) if config["num_experts"] > 1 or value not in OF_EXPERTS else ()
  if config["num_experts"] == 1:
    return (value,) if value == "feed_forward_in" else ()
  every, leading = config.get("interleave_moe_layer_step", 1), config.get("first_num_dense_layers", 0)
  has_dense = every > 1 or leading > 0 or config["shared_experts"] > 0
  return (*((value,) if has_dense else ()), "experts_in" if value == "feed_forward_in" else "experts_out")


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
