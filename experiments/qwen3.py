"""Qwen3 with sparse layers (arXiv 2505.09388), of which each has 128 experts, eight per token."""

from moejax.config import (
  DATA_EXPERT_MODEL,
  AdamW,
  Data,
  Evaluation,
  Experiment,
  GroupedDispatch,
  Losses,
  Mesh,
  Model,
  MoE,
  Training,
)


def qwen3_30b_a3b() -> Experiment:
  """Qwen3 30B-A3B: 30.5B in total, 3.3B active. The mesh is for 64 chips."""
  model = _model(num_layers=48, d_model=2048, num_heads=32, d_ff=768)
  return _experiment("qwen3_30b_a3b", model, mesh=Mesh(data=8, expert=8), batch_size=128)


def qwen3_235b_a22b() -> Experiment:
  """Qwen3 235B-A22B: 235.1B in total, 22.2B active. The mesh is for 512 chips."""
  model = _model(num_layers=94, d_model=4096, num_heads=64, d_ff=1536)
  return _experiment("qwen3_235b_a22b", model, mesh=Mesh(data=32, expert=16), batch_size=512)


def _model(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> Model:
  return Model(
    num_layers=num_layers,
    d_model=d_model,
    num_heads=num_heads,
    num_kv_heads=4,
    head_dim=128,
    d_ff=d_ff,
    vocab_size=151_936,
    tie_embeddings=False,
    qk_norm=True,
    rope_theta=1e6,
    norm_epsilon=1e-6,
    logit_chunks=4,
    moe=MoE(num_experts=128, experts_per_token=8, d_ff=d_ff, dispatch=GroupedDispatch()),
    remat="layer_inputs",
  )


def _experiment(name: str, model: Model, mesh: Mesh, batch_size: int) -> Experiment:
  return Experiment(
    name=name,
    model=model,
    data=Data(sequence_length=4096),
    training=Training(batch_size=batch_size, losses=Losses(load_balance=0.001)),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=batch_size),
    mesh=mesh,
    rules=(*DATA_EXPERT_MODEL, ("embed", ("data",))),
  )
