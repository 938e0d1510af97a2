"""Gemma 3 (arXiv 2503.19786): five layers with a window to one without, norms before and after each of them."""

import math

from moejax.config import (
  DATA_EXPERT_MODEL,
  AdamW,
  Data,
  Evaluation,
  Experiment,
  GroupedQuery,
  LinearScaling,
  Mesh,
  Model,
  Training,
)


def gemma3_12b() -> Experiment:
  """Gemma 3 12B, without its image encoder: 11.8B, of which 1.0B are the embedding. The mesh is for 64 chips."""
  local = GroupedQuery(window=1024, rope_theta=1e4)
  model = Model(
    num_layers=48,
    d_model=3840,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    attention=(local,) * 5 + (GroupedQuery(rope_scaling=LinearScaling(factor=8.0)),),
    d_ff=15_360,
    vocab_size=262_208,
    qk_norm=True,
    rope_theta=1e6,
    norm="zero_centered_rms",
    norm_places="both",
    norm_epsilon=1e-6,
    embedding_scale=math.sqrt(3840),
    activation="geglu",
    logit_chunks=8,
    remat="layer_inputs",
  )
  return Experiment(
    name="gemma3_12b",
    model=model,
    data=Data(sequence_length=8192),
    training=Training(batch_size=64),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=64),
    mesh=Mesh(data=64),
    rules=(*DATA_EXPERT_MODEL, ("embed", ("data",))),
  )
