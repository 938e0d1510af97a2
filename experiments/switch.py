"""Switch-shaped models (arXiv 2101.03961) as axlearn's envy.py has them: SwiGLU, top-2, every second layer sparse."""

from dataclasses import replace

from moejax.config import AdamW, Cosine, Data, Evaluation, Experiment, Losses, Mesh, Model, MoE, Training


def switch_base() -> Experiment:
  """12 layers of width 1536 with 128 experts: 22.1B in total, 0.67B active; 512 v5p, 8M tokens per step."""
  model = _model(num_layers=12, d_model=1536, num_kv_heads=12, d_ff=6144, num_experts=128)
  return _switch("switch_base", model, Mesh(replica=2, data=16, expert=16))


def switch_large() -> Experiment:
  """24 layers of width 2048 with 128 experts: 78.4B in total, 2.3B active; 512 v5p, 8M tokens per step."""
  model = _model(num_layers=24, d_model=2048, num_kv_heads=16, d_ff=8192, num_experts=128)
  return _switch("switch_large", model, Mesh(replica=2, data=16, expert=16))


def switch_xxl() -> Experiment:
  """24 layers of width 8192 with 64 experts: 396B in total, 22B active; 1024 v5p, 8M tokens per step."""
  model = _model(num_layers=24, d_model=8192, num_kv_heads=8, d_ff=20_480, num_experts=64)
  return _switch("switch_xxl", replace(model, remat="layer_inputs"), Mesh(data=8, expert=16, model=8))


def _model(num_layers: int, d_model: int, num_kv_heads: int, d_ff: int, num_experts: int) -> Model:
  return Model(
    num_layers=num_layers,
    d_model=d_model,
    num_heads=d_model // 128,
    num_kv_heads=num_kv_heads,
    head_dim=128,
    d_ff=d_ff,
    vocab_size=32_768,
    qk_norm=True,
    rope_theta=5e5,
    # Their groups hold half of what an expert shard has, up to 65,536 tokens; masks grow with the square.
    moe=MoE(num_experts=num_experts, experts_per_token=2, d_ff=d_ff, every=2, group_size=1024),
    remat="attention",
  )


def _switch(name: str, model: Model, mesh: Mesh) -> Experiment:
  return Experiment(
    name=name,
    model=model,
    data=Data(sequence_length=8192),
    training=Training(batch_size=1024, steps=250_000, losses=Losses(z=1e-6, load_balance=0.01)),
    optimizer=AdamW(learning_rate=1e-3, schedule=Cosine(final_fraction=0.005), weight_decay=1e-4),
    evaluation=Evaluation(batch_size=1024),
    mesh=mesh,
  )
