"""Models with published step times of other frameworks, with which plans are calibrated and checked.

Fuji is axlearn's name for models of Llama's shape. The sizes named after MaxText are its default model (2048 wide, 16
heads, 7168 hidden, 16 layers), scaled to 16, 32 and 64 billion parameters. `docs/step-time.md` has the runs.
"""

from dataclasses import replace

from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, Training


def fuji_7b_v1() -> Experiment:
  """Dense, 6.6B: 2.85 s per step on 256 v5p, 3.03 s on 512 v4 (with --mesh.replica 32 --mesh.data 16)."""
  return _experiment("fuji_7b_v1", _fuji_7b(), sequence_length=2048, batch_size=2048, mesh=Mesh(replica=4, data=64))


def fuji_7b_v2() -> Experiment:
  """Dense, 6.6B, with twice the sequence: 2.21 s per step on four slices of 256 v5e."""
  return _experiment("fuji_7b_v2", _fuji_7b(), sequence_length=4096, batch_size=1024, mesh=Mesh(replica=4, data=256))


def fuji_70b_v2() -> Experiment:
  """Dense, 69B: 19.5 s per step on 256 v6e (with --training.gradient-accumulation 4)."""
  model = _model(num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=28_672)
  model = replace(model, vocab_size=32_768, remat="attention")
  return _experiment("fuji_70b_v2", model, sequence_length=4096, batch_size=1024, mesh=Mesh(data=256))


def maxtext_16b() -> Experiment:
  """Dense, 15.8B: 256 v5e, 12,288 tokens per chip."""
  model = _model(num_layers=32, d_model=4096, num_heads=64, num_kv_heads=64, d_ff=28_672)
  return _experiment("maxtext_16b", model, sequence_length=2048, batch_size=1536, mesh=Mesh(data=256))


def maxtext_32b() -> Experiment:
  """Dense, 31.7B: 256 v5e, 8,192 tokens per chip."""
  model = _model(num_layers=32, d_model=8192, num_heads=64, num_kv_heads=64, d_ff=28_672)
  return _experiment("maxtext_32b", model, sequence_length=2048, batch_size=1024, mesh=Mesh(data=256))


def maxtext_64b() -> Experiment:
  """Dense, 62.8B: 256 v5e, 4,096 tokens per chip."""
  model = _model(num_layers=64, d_model=8192, num_heads=64, num_kv_heads=64, d_ff=28_672)
  return _experiment("maxtext_64b", model, sequence_length=2048, batch_size=512, mesh=Mesh(data=256))


def mistral_7b() -> Experiment:
  """Mistral 7B (arXiv 2310.06825), without its window: 8 v6e, 49,152 tokens per chip."""
  model = _model(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14_336)
  return _experiment("mistral_7b", model, sequence_length=8192, batch_size=48, mesh=Mesh(data=8))


def _fuji_7b() -> Model:
  model = _model(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, d_ff=11_008)
  return replace(model, vocab_size=32_768, tie_embeddings=True, remat="attention")


def _model(num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int) -> Model:
  return Model(
    num_layers=num_layers,
    d_model=d_model,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=128,
    d_ff=d_ff,
    vocab_size=32_000,
    tie_embeddings=False,
    remat="layer_inputs",
    gradient_dtype="compute",  # as in the measured frameworks
  )


def _experiment(name: str, model: Model, sequence_length: int, batch_size: int, mesh: Mesh) -> Experiment:
  return Experiment(
    name=name,
    model=model,
    data=Data(sequence_length=sequence_length),
    training=Training(batch_size=batch_size),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=batch_size),
    mesh=mesh,
  )
