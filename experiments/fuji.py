"""Fuji 7B v1, the Llama-shaped model whose step times axlearn's fuji.py records: what the plans are calibrated on."""

from moejax.config import Data, Evaluation, Experiment, Mesh, Model, Optimizer, Training


def fuji_7b_v1() -> Experiment:
  """Dense, 6.6B: 2.85 s a step on 256 v5p, 3.03 s on 512 v4 (with --mesh.replica 32 --mesh.data 16)."""
  return Experiment(
    name="fuji_7b_v1",
    model=Model(
      num_layers=32,
      d_model=4096,
      num_heads=32,
      num_kv_heads=32,
      head_dim=128,
      d_ff=11008,
      vocab_size=32_768,
      remat="attention",
    ),
    data=Data(sequence_length=2048),
    training=Training(batch_size=2048),
    optimizer=Optimizer(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=2048),
    mesh=Mesh(replica=4, data=64),
  )
