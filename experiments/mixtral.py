"""Mixtral 8x7B (arXiv 2401.04088), and the same size in finer experts."""

from dataclasses import replace

from moejax.config import DATA_EXPERT_MODEL, AdamW, Data, Evaluation, Experiment, Losses, Mesh, Model, MoE, Training


def mixtral_8x7b() -> Experiment:
  """8 experts, two per token, in every layer: 46.7B in total, 12.9B active; 256 v5p, 4096 tokens per chip."""
  return Experiment(
    name="mixtral_8x7b",
    model=Model(
      num_layers=32,
      d_model=4096,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      d_ff=14_336,
      vocab_size=32_000,
      tie_embeddings=False,
      rope_theta=1e6,
      moe=MoE(num_experts=8, experts_per_token=2, d_ff=14_336, group_size=1024),
      remat="products",
    ),
    data=Data(sequence_length=4096),
    training=Training(batch_size=256, losses=Losses(load_balance=0.02)),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=256),
    mesh=Mesh(data=32, expert=8),
    rules=(*DATA_EXPERT_MODEL, ("embed", ("data",))),
  )


def mixtral_64e() -> Experiment:
  """64 experts, eight per token, one shared, an eighth of the width, in every layer: 47.4B in total, 8.0B active."""
  base = mixtral_8x7b()
  moe = MoE(num_experts=64, experts_per_token=8, num_shared_experts=1, d_ff=14_336 // 8, group_size=256)
  return replace(base, name="mixtral_64e", model=replace(base.model, moe=moe))
