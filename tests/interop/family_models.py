"""A tiny model of each family, as its config.json has it, and random parameters."""

import jax
import numpy as np

from moejax.config import DATA_EXPERT_MODEL, Mesh, Model
from moejax.models.abstract import AbstractModel, abstract_model
from moejax.partitioning import make_partitioner

COMMON = {
  "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
  "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
  "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256,
}  # fmt: skip
LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}  # fmt: skip
DEEPSEEK_V3 = {
  "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
  "moe_intermediate_size": 8, "norm_topk_prob": True, "first_k_dense_replace": 2, "n_group": 4, "topk_group": 2,
  "routed_scaling_factor": 2.5, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6,
  "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 0, "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
  },
}  # fmt: skip
MODELS = {
  "llama": {},
  "llama 3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
  "mistral": {"sliding_window": None, "head_dim": 6},
  "mistral with windows": {"model_type": "mistral", "sliding_window": 3, "head_dim": 6},
  "qwen3": {"head_dim": 6, "tie_word_embeddings": True},
  "qwen2": {},
  "qwen2 with windows": {
    "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "layer_types": [
      "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    ],
  },
  "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
  "qwen3_moe": {
    "head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 2, "mlp_only_layers": [],
  },
  "qwen2_moe": {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16,
    "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
  },
  "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False, "clip_qkv": None},
  "gemma3_text": {
    "num_hidden_layers": 4, "head_dim": 6, "sliding_window": 3, "query_pre_attn_scalar": 5, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 20.0,
    "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
  },
  "gpt_oss": {
    "head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3, "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
      "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False,
      "original_max_position_embeddings": 16,
    },
  },
  "deepseek_v3": {**DEEPSEEK_V3, "q_lora_rank": 8},
  "deepseek_v3 without a query rank": {
    "model_type": "deepseek_v3", **DEEPSEEK_V3, "q_lora_rank": None, "v_head_dim": 4,
  },
  "llama4_text": {
    "intermediate_size": 8, "intermediate_size_mlp": 24, "head_dim": 6, "num_local_experts": 4,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 3, "use_qk_norm": False, "attn_temperature_tuning": True, "attn_scale": 0.7,
    "floor_scale": 3,
  },
  "llama4_text as Scout": {
    "model_type": "llama4_text", "intermediate_size": 8, "intermediate_size_mlp": 24, "head_dim": 6,
    "num_local_experts": 4, "num_experts_per_tok": 1, "no_rope_layers": [1, 0, 1, 0], "attention_chunk_size": 5,
    "attn_scale": 0.7, "floor_scale": 3, "rope_parameters": {**LLAMA3, "high_freq_factor": 1.0},
  },
  "deepseek": {
    "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "norm_topk_prob": False, "first_k_dense_replace": 1,
  },
}  # fmt: skip
CONFIGS = {name: {"model_type": name, **COMMON, **fields} for name, fields in MODELS.items()}
"""config.json by the name of a model, which is its model_type where nothing else is said."""

EIGHT = Mesh(data=2, expert=2, model=2)


def on(mesh: Mesh, model: Model) -> AbstractModel:
  return abstract_model(model, make_partitioner(mesh, DATA_EXPERT_MODEL, jax.devices()[: mesh.size]))


def draw(model: AbstractModel):
  """Random numbers for each parameter, where it belongs."""
  random = np.random.default_rng(0)
  drawn = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), model.parameters)
  return jax.device_put(drawn, model.shardings)
