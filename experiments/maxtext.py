"""Models whose step times MaxText and the recipes beside it record: what the plans are checked with.

The sizes named after MaxText are its default model (2048 wide, 16 heads, 7168 hidden, 16 layers), scaled to 16, 32, 64
and 128 billion parameters. `docs/step-time.md` has the runs.
"""

from moejax.config import Data, Evaluation, Experiment, Losses, Mesh, Model, MoE, Optimizer, Training


def maxtext_16b() -> Experiment:
  """Dense, 15.9B: 256 v5e, 12,288 tokens a chip."""
  model = _model(num_layers=32, d_model=4096, num_heads=64, num_kv_heads=64, d_ff=28_672)
  return _experiment("maxtext_16b", model, sequence_length=2048, batch_size=1536, mesh=Mesh(data=256))


def maxtext_32b() -> Experiment:
  """Dense, 31.7B: 256 v5e, 8,192 tokens a chip."""
  model = _model(num_layers=32, d_model=8192, num_heads=64, num_kv_heads=64, d_ff=28_672)
  return _experiment("maxtext_32b", model, sequence_length=2048, batch_size=1024, mesh=Mesh(data=256))


def maxtext_64b() -> Experiment:
  """Dense, 62.8B: 256 v5e, 4,096 tokens a chip."""
  model = _model(num_layers=64, d_model=8192, num_heads=64, num_kv_heads=64, d_ff=28_672)
  return _experiment("maxtext_64b", model, sequence_length=2048, batch_size=512, mesh=Mesh(data=256))


def maxtext_128b() -> Experiment:
  """Dense, 125.1B: 128 v5p, 2,048 tokens a chip."""
  model = _model(num_layers=64, d_model=8192, num_heads=128, num_kv_heads=128, d_ff=57_344)
  return _experiment("maxtext_128b", model, sequence_length=2048, batch_size=128, mesh=Mesh(data=16, model=8))


def llama2_70b() -> Experiment:
  """Llama 2 70B (arXiv 2307.09288): 256 v6e, 16,384 tokens a chip."""
  model = _model(num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=28_672)
  return _experiment("llama2_70b", model, sequence_length=4096, batch_size=1024, mesh=Mesh(data=256))


def mistral_7b() -> Experiment:
  """Mistral 7B (arXiv 2310.06825), without its window: 8 v6e, 49,152 tokens a chip."""
  model = _model(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14_336)
  return _experiment("mistral_7b", model, sequence_length=8192, batch_size=48, mesh=Mesh(data=8))


def mixtral_8x22b() -> Experiment:
  """Mixtral 8x22B: 8 experts, two a token, in every layer: 140.6B in all; 256 v6e, 32,768 tokens a chip."""
  moe = MoE(num_experts=8, experts_per_token=2, d_ff=16_384, capacity_factor=1.25, group_size=4096)
  model = _model(num_layers=56, d_model=6144, num_heads=48, num_kv_heads=8, d_ff=16_384, moe=moe)
  return _experiment("mixtral_8x22b", model, sequence_length=4096, batch_size=2048, mesh=Mesh(data=256))


def _model(
  num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int, moe: MoE | None = None
) -> Model:
  return Model(
    num_layers=num_layers,
    d_model=d_model,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=128,
    d_ff=d_ff,
    vocab_size=32_000,
    tie_embeddings=False,
    moe=moe,
    remat="layer_inputs",
  )


def _experiment(name: str, model: Model, sequence_length: int, batch_size: int, mesh: Mesh) -> Experiment:
  return Experiment(
    name=name,
    model=model,
    data=Data(sequence_length=sequence_length),
    training=Training(batch_size=batch_size, losses=Losses(load_balance=0.01 if model.moe else 0.0)),
    optimizer=Optimizer(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=batch_size),
    mesh=mesh,
  )
