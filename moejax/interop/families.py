"""Families of Hugging Face models: the correspondence between fields of config.json and fields of Model.

For all other fields of Model, a family supports only one value (`only`, or the default). For all other fields of
config.json that affect the function of a model, it supports only the value in `SAME`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax.interop.llama4_layers import LLAMA_4_DEFAULTS

Sliding = Callable[[int, Mapping[str, Any]], bool]
"""Whether a layer, by its number, has a window according to a config.json without layer_types."""

COMMON = {
  "vocab_size": "vocab_size",
  "d_model": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "d_ff": "intermediate_size",
  "norm_epsilon": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
  "rope_theta": "rope_theta",
}
"""Fields of Model and those of every config.json that say the same."""

EXPERTS = {
  "moe.num_experts": "num_experts",
  "moe.experts_per_token": "num_experts_per_tok",
  "moe.d_ff": "moe_intermediate_size",
  "moe.router.renormalize": "norm_topk_prob",
}
QWEN_EXPERTS = EXPERTS | {"moe.every": "decoder_sparse_step"}

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
OF_MODEL = {"embedding_VD": EMBEDDING, "final_norm.scale_D": "model.norm.weight", "w_logits_DV": OUTPUT}
"""Our parameters outside of the layers, and Hugging Face's tensors."""

LAYER = "model.layers.{layer}."
"""How the names of a layer's tensors begin."""

OF_ATTENTION = {
  "attention_norm.scale_D": "input_layernorm.weight",
  "attention.w_q_DNH": "self_attn.q_proj.weight",
  "attention.w_k_DKH": "self_attn.k_proj.weight",
  "attention.w_v_DKH": "self_attn.v_proj.weight",
  "attention.w_out_NHD": "self_attn.o_proj.weight",
  "attention.b_q_NH": "self_attn.q_proj.bias",
  "attention.b_k_KH": "self_attn.k_proj.bias",
  "attention.b_v_KH": "self_attn.v_proj.bias",
  "attention.q_norm.scale_D": "self_attn.q_norm.weight",
  "attention.k_norm.scale_D": "self_attn.k_norm.weight",
  "feed_forward_norm.scale_D": "post_attention_layernorm.weight",
}


def _of_feed_forward(ours: str, theirs: str) -> dict[str, str]:
  return {
    f"{ours}.w_gate_DF": f"{theirs}.gate_proj.weight",
    f"{ours}.w_up_DF": f"{theirs}.up_proj.weight",
    f"{ours}.w_down_FD": f"{theirs}.down_proj.weight",
  }


DENSE = OF_ATTENTION | _of_feed_forward("feed_forward", "mlp")
SPARSE = DENSE | {
  "feed_forward.w_router_DE": "mlp.gate.weight",
  "feed_forward.experts.w_gate_EDF": "mlp.experts.{expert}.gate_proj.weight",
  "feed_forward.experts.w_up_EDF": "mlp.experts.{expert}.up_proj.weight",
  "feed_forward.experts.w_down_EFD": "mlp.experts.{expert}.down_proj.weight",
}
OF_MIXTRAL = OF_ATTENTION | {
  "feed_forward.w_router_DE": "block_sparse_moe.gate.weight",
  "feed_forward.experts.w_gate_EDF": "block_sparse_moe.experts.{expert}.w1.weight",
  "feed_forward.experts.w_up_EDF": "block_sparse_moe.experts.{expert}.w3.weight",
  "feed_forward.experts.w_down_EFD": "block_sparse_moe.experts.{expert}.w2.weight",
}
"""Our parameters of a layer, and Hugging Face's tensors, of a stack of experts one for each. A family may lack some."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that is not stored as the transposed matrix of a parameter."""

  name: str
  as_ours: bool = False
  """Whether its dimensions are those of the parameter, in the same order."""
  every: tuple[int, int] | None = None
  """The parameter is each n-th entry of the last dimension from the k-th one, as (k, n)."""
  half: int | None = None
  """The parameter is the first (0) or the second half (1) of the last dimension."""
  pairs: bool = False
  """Whether the dimensions of outputs that have a rotary embedding, which are the last ones, are stored as pairs that
  are rotated together. In the parameter, they are two halves."""


OF_GPT_OSS: Mapping[str, str | Tensor] = OF_ATTENTION | {
  "attention.sinks_N": "self_attn.sinks",
  "attention.b_out_D": "self_attn.o_proj.bias",
  "feed_forward.w_router_DE": "mlp.router.weight",
  "feed_forward.b_router_E": "mlp.router.bias",
  "feed_forward.experts.w_gate_EDF": Tensor("mlp.experts.gate_up_proj", as_ours=True, every=(0, 2)),
  "feed_forward.experts.b_gate_EF": Tensor("mlp.experts.gate_up_proj_bias", as_ours=True, every=(0, 2)),
  "feed_forward.experts.w_up_EDF": Tensor("mlp.experts.gate_up_proj", as_ours=True, every=(1, 2)),
  "feed_forward.experts.b_up_EF": Tensor("mlp.experts.gate_up_proj_bias", as_ours=True, every=(1, 2)),
  "feed_forward.experts.w_down_EFD": Tensor("mlp.experts.down_proj", as_ours=True),
  "feed_forward.experts.b_down_ED": Tensor("mlp.experts.down_proj_bias", as_ours=True),
}
OF_GEMMA_3 = DENSE | {
  "attention_out_norm.scale_D": "post_attention_layernorm.weight",
  "feed_forward_norm.scale_D": "pre_feedforward_layernorm.weight",
  "feed_forward_out_norm.scale_D": "post_feedforward_layernorm.weight",
}
_WITHOUT_KEYS = {
  name: tensor
  for name, tensor in SPARSE.items()
  if not name.startswith(("attention.b_", "attention.k_norm", "attention.w_k", "attention.w_v"))
}
OF_DEEPSEEK_V3: Mapping[str, str | Tensor] = (
  _WITHOUT_KEYS
  | _of_feed_forward("feed_forward.shared", "mlp.shared_experts")
  | {
    "attention.w_q_DNH": Tensor("self_attn.q_proj.weight", pairs=True),
    "attention.w_q_down_DX": "self_attn.q_a_proj.weight",
    "attention.q_norm.scale_D": "self_attn.q_a_layernorm.weight",
    "attention.w_q_up_XNH": Tensor("self_attn.q_b_proj.weight", pairs=True),
    "attention.w_kv_down_DX": Tensor("self_attn.kv_a_proj_with_mqa.weight", pairs=True),
    "attention.kv_norm.scale_D": "self_attn.kv_a_layernorm.weight",
    "attention.w_kv_up_XNH": "self_attn.kv_b_proj.weight",
    "feed_forward.bias_E": "mlp.gate.e_score_correction_bias",
  }
)
OF_LLAMA_4: Mapping[str, str | Tensor] = (
  OF_ATTENTION
  | _of_feed_forward("feed_forward", "feed_forward")
  | _of_feed_forward("feed_forward.shared", "feed_forward.shared_expert")
  | {
    "attention.w_q_DNH": Tensor("self_attn.q_proj.weight", pairs=True),
    "attention.w_k_DKH": Tensor("self_attn.k_proj.weight", pairs=True),
    "feed_forward.w_router_DE": "feed_forward.router.weight",
    "feed_forward.experts.w_gate_EDF": Tensor("feed_forward.experts.gate_up_proj", as_ours=True, half=0),
    "feed_forward.experts.w_up_EDF": Tensor("feed_forward.experts.gate_up_proj", as_ours=True, half=1),
    "feed_forward.experts.w_down_EFD": Tensor("feed_forward.experts.down_proj", as_ours=True),
  }
)
"""In layers without a rotary embedding, queries and keys are permuted too, which does not change their products."""
LATENT_FIELDS = {
  "kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank", "rotary_dim": "qk_rope_head_dim", "value_dim": "v_head_dim",
}  # fmt: skip
"""Fields of latent attention, and those of config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One `model_type`."""

  model_type: str
  part_of: tuple[str, str] | None = None
  """The model_type of models with images whose text model this is, and how the names of its tensors begin in them."""
  architecture: str
  """The class of its causal language model."""
  tensors: Mapping[str, str | Tensor] = dataclasses.field(default_factory=lambda: DENSE)
  """Our parameters of a layer and the names of its tensors."""
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """Other fields of Model, and those of config.json that say the same."""
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Values of fields of config.json that are missing or null."""
  absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Values of fields of config.json that are missing, but may be null: the defaults of transformers, where they differ
  from null."""
  latent: bool = False
  """Whether attention is latent, with LATENT_FIELDS."""
  chunked: bool = False
  """Whether config.json has the layers of Llama 4, as in `moejax.interop.llama4_layers`."""
  scales_embedding: bool = False
  """Whether the embedding of a token is multiplied by the square root of its width."""
  moe: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """Fields of sparse layers, by their dotted path in Model, and those of config.json that say the same."""
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Fields of Model that the family has at one value, where that is not the default."""
  same: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Fields of config.json that moejax has at one value only, where that differs from other families."""
  balance_loss: str | None = None
  """The field of config.json with the coefficient of the load-balancing loss."""
  rope_theta: float = 10_000.0
  """Base of RoPE if config.json has none."""
  local_theta: float | None = None
  """The same for layers with a window, if it differs from that of other layers."""
  sliding: Sliding | None = None
  """Which layers have the window of config.json. None: the family has no windows."""
  by_layer: bool = True
  """Whether config.json has the type of each layer. Otherwise all layers have the window."""
  attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Fields of attention layers that the family has at one value, where that is not the default."""


def _all(i: int, config: Mapping[str, Any]) -> bool:
  return True


def _max_window_layers(config: Mapping[str, Any]) -> int:
  value = config.get("max_window_layers")
  return 28 if value is None else value


def _after_full(i: int, config: Mapping[str, Any]) -> bool:
  return i >= _max_window_layers(config)


FAMILIES = {
  family.model_type: family
  for family in (
    Family(model_type="llama", architecture="LlamaForCausalLM"),
    Family(
      model_type="mistral",
      architecture="MistralForCausalLM",
      sliding=_all,
      by_layer=False,
      absent={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
      model_type="qwen3",
      architecture="Qwen3ForCausalLM",
      only={"qk_norm": True},
      sliding=_after_full,
      absent={"num_key_value_heads": 32, "use_sliding_window": False},
    ),
    Family(
      model_type="qwen2",
      architecture="Qwen2ForCausalLM",
      only={"attention_bias": True},
      sliding=_after_full,
      absent={"num_key_value_heads": 32, "use_sliding_window": False},
    ),
    Family(
      model_type="mixtral",
      absent={"num_key_value_heads": 8},
      architecture="MixtralForCausalLM",
      tensors=OF_MIXTRAL,
      moe={
        "moe.num_experts": "num_local_experts",
        "moe.experts_per_token": "num_experts_per_tok",
        "moe.d_ff": "intermediate_size",
      },
      balance_loss="router_aux_loss_coef",
      rope_theta=1e6,
      sliding=_all,
      by_layer=False,
    ),
    Family(
      model_type="qwen3_moe",
      absent={"num_key_value_heads": 4, "use_sliding_window": False},
      architecture="Qwen3MoeForCausalLM",
      tensors=SPARSE,
      moe=QWEN_EXPERTS,
      only={"qk_norm": True},
      balance_loss="router_aux_loss_coef",
      sliding=_all,
      by_layer=False,
    ),
    Family(
      model_type="qwen2_moe",
      absent={"num_key_value_heads": 16, "use_sliding_window": False},
      architecture="Qwen2MoeForCausalLM",
      tensors=SPARSE
      | _of_feed_forward("feed_forward.shared", "mlp.shared_expert")
      | {"feed_forward.w_shared_gate_D1": "mlp.shared_expert_gate.weight"},
      moe=QWEN_EXPERTS | {"moe.num_shared_experts": "shared_expert_intermediate_size"},
      only={"attention_bias": True, "moe.shared_gate": True},
      same={"qkv_bias": True},
      sliding=lambda i, config: i % 2 == 0 and i < _max_window_layers(config),
      balance_loss="router_aux_loss_coef",
    ),
    Family(
      model_type="olmoe",
      architecture="OlmoeForCausalLM",
      tensors=SPARSE,
      moe=EXPERTS | {"moe.d_ff": "intermediate_size"},
      only={"qk_norm": True, "qk_norm_over": "all_heads"},
      balance_loss="router_aux_loss_coef",
    ),
    Family(
      model_type="deepseek",
      architecture="DeepseekForCausalLM",
      tensors=SPARSE | _of_feed_forward("feed_forward.shared", "mlp.shared_experts"),
      moe=EXPERTS
      | {
        "moe.num_experts": "n_routed_experts",
        "moe.num_shared_experts": "n_shared_experts",
        "moe.leading_dense": "first_k_dense_replace",
      },
      balance_loss="aux_loss_alpha",
    ),
    Family(
      model_type="gemma3_text",
      absent={"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
      architecture="Gemma3ForCausalLM",
      tensors=OF_GEMMA_3,
      fields={"logit_cap": "final_logit_softcapping"},
      defaults={"final_logit_softcapping": None, "tie_word_embeddings": True},
      scales_embedding=True,
      only={"qk_norm": True, "norm": "zero_centered_rms", "norm_places": "both", "activation": "geglu"},
      same={
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
      },
      rope_theta=1e6,
      local_theta=10_000.0,
      sliding=lambda i, config: (i + 1) % (config.get("sliding_window_pattern") or 6) != 0,
    ),
    Family(
      model_type="gpt_oss",
      absent={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "rope_parameters": {
          "rope_type": "yarn",
          "factor": 32.0,
          "beta_fast": 32.0,
          "beta_slow": 1.0,
          "truncate": False,
          "original_max_position_embeddings": 4096,
        },
      },
      architecture="GptOssForCausalLM",
      tensors=OF_GPT_OSS,
      moe={
        "moe.num_experts": "num_local_experts",
        "moe.experts_per_token": "num_experts_per_tok",
        "moe.d_ff": "intermediate_size",
      },
      only={"attention_bias": True, "activation": "swiglu_clipped", "moe.bias": True},
      same={"attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
      attention={"sinks": True, "output_bias": True},
      balance_loss="router_aux_loss_coef",
      rope_theta=150_000.0,
      sliding=lambda i, config: i % 2 == 0,
    ),
    Family(
      model_type="deepseek_v3",
      absent={
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "v_head_dim": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
      },
      architecture="DeepseekV3ForCausalLM",
      tensors=OF_DEEPSEEK_V3,
      fields={"head_dim": "qk_nope_head_dim"},
      latent=True,
      moe=EXPERTS
      | {
        "moe.num_experts": "n_routed_experts",
        "moe.num_shared_experts": "n_shared_experts",
        "moe.leading_dense": "first_k_dense_replace",
        "moe.router.scale": "routed_scaling_factor",
        "moe.router.expert_groups": "n_group",
        "moe.router.groups_per_token": "topk_group",
      },
      only={"moe.router.scores": "sigmoid", "moe.router.bias_rate": 0.001},
      same={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
      defaults={"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1},
    ),
    Family(
      model_type="llama4_text",
      part_of=("llama4", "language_model."),
      absent=LLAMA_4_DEFAULTS,
      architecture="Llama4ForCausalLM",
      tensors=OF_LLAMA_4,
      fields={"d_ff": "intermediate_size_mlp"},
      chunked=True,
      moe={
        "moe.num_experts": "num_local_experts",
        "moe.experts_per_token": "num_experts_per_tok",
        "moe.d_ff": "intermediate_size",
        "moe.every": "interleave_moe_layer_step",
      },
      only={
        "moe.num_shared_experts": 1,
        "moe.weights_on": "inputs",
        "moe.router.scores": "sigmoid",
        "moe.router.renormalize": False,
      },
      balance_loss="router_aux_loss_coef",
      rope_theta=500_000.0,
    ),
  )
}
"""Families by the model_type of config.json, the simplest first."""
