"""Small experiments whose fields are changed one by one."""

from dataclasses import replace

from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, MoE, Training

DENSE = Experiment(
  name="dense",
  model=Model(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, vocab_size=264),
  data=Data(sequence_length=32),
  training=Training(batch_size=8),
  optimizer=AdamW(learning_rate=1e-3),
  evaluation=Evaluation(batch_size=8),
  mesh=Mesh(data=1),
)


def sparse(mesh: Mesh = DENSE.mesh, **moe) -> Experiment:
  fields = {"num_experts": 8, "experts_per_token": 2, "d_ff": 8, "group_size": 32} | moe
  return replace(DENSE, name="sparse", model=replace(DENSE.model, moe=MoE(**fields)), mesh=mesh)
