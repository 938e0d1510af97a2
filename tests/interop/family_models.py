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
