"""Families of models on Hugging Face: the fields of their config.json that say what fields of our Model say.

A family holds every other field of Model at one value (`only`, or its default), and every other field of config.json
that changes what is computed at the values in `SAME`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One `model_type`."""

  model_type: str
  architecture: str
  """The class of its causal language model."""
  moe: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """Fields of sparse layers, by their dotted path in Model, and those of config.json that say the same."""
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Fields of Model that the family has at one value, where that is not the default."""
  balance_loss: str | None = None
  """The field of config.json with the coefficient of the load-balancing loss."""
  rope_theta: float = 10_000.0
  """Base of RoPE where config.json has none."""


FAMILIES = {
  family.model_type: family
  for family in (
    Family(model_type="llama", architecture="LlamaForCausalLM"),
    Family(model_type="mistral", architecture="MistralForCausalLM"),
    Family(model_type="qwen3", architecture="Qwen3ForCausalLM", only={"qk_norm": True}),
    Family(
      model_type="mixtral",
      architecture="MixtralForCausalLM",
      moe={
        "moe.num_experts": "num_local_experts",
        "moe.experts_per_token": "num_experts_per_tok",
        "moe.d_ff": "intermediate_size",
      },
      balance_loss="router_aux_loss_coef",
      rope_theta=1e6,
    ),
    Family(
      model_type="qwen3_moe",
      architecture="Qwen3MoeForCausalLM",
      moe=QWEN_EXPERTS,
      only={"qk_norm": True},
      balance_loss="router_aux_loss_coef",
    ),
    Family(
      model_type="deepseek",
      architecture="DeepseekForCausalLM",
      moe=EXPERTS | {"moe.num_experts": "n_routed_experts", "moe.num_shared_experts": "n_shared_experts"},
      balance_loss="aux_loss_alpha",
    ),
  )
}
"""By the model_type of config.json, the simplest first."""
