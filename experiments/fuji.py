"""The Llama-shaped Fuji models whose step times axlearn's fuji.py records: what the plans are checked with."""

from moejax.config import Data, Evaluation, Experiment, Mesh, Model, Optimizer, Training

TOKENS_PER_STEP = 4 * 2**20


def fuji_7b_v1() -> Experiment:
  """Dense, 6.6B, 2048 tokens: 2.85 s a step on 256 v5p, 3.03 s on 512 v4 (with --mesh.replica 32 --mesh.data 16)."""
  return _experiment("fuji_7b_v1", _7b(), sequence_length=2048, mesh=Mesh(replica=4, data=64))


def fuji_7b_v2() -> Experiment:
  """Dense, 6.6B, 4096 tokens: 2.21 s a step on four slices of 256 v5e."""
  return _experiment("fuji_7b_v2", _7b(), sequence_length=4096, mesh=Mesh(replica=4, data=256))


def fuji_70b_v2() -> Experiment:
  """Dense, 69B, 4096 tokens: 19.5 s a step on 256 v6e, in four parts, or 4.9 s on four such slices."""
  model = Model(
    num_layers=80,
    d_model=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    d_ff=28_672,
    vocab_size=32_768,
    tie_embeddings=False,
    remat="attention",
  )
  return _experiment("fuji_70b_v2", model, sequence_length=4096, mesh=Mesh(data=256))


def _7b() -> Model:
  return Model(
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    d_ff=11008,
    vocab_size=32_768,
    remat="attention",
  )


def _experiment(name: str, model: Model, sequence_length: int, mesh: Mesh) -> Experiment:
  batch_size = TOKENS_PER_STEP // sequence_length
  return Experiment(
    name=name,
    model=model,
    data=Data(sequence_length=sequence_length),
    training=Training(batch_size=batch_size),
    optimizer=Optimizer(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=batch_size),
    mesh=mesh,
  )
