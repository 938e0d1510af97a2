"""DS-MoE (arXiv 2404.05567) at a size that trains on a CPU: a dense model, DS-MoE with and without its
mutual-information loss, and a sparse MoE, with the same number of parameters within 1 %, text and training length.

`docs/ds_moe.py` trains them with several seeds. The text is Python's standard library unless `--data.train` and
`--data.validation` name another.
"""

from dataclasses import replace

from moejax.config import (
  AdamW,
  Data,
  DenseDispatch,
  DenseRouter,
  Evaluation,
  Experiment,
  GroupedDispatch,
  Losses,
  Model,
  MoE,
  Pair,
  Suite,
  TopKRouter,
  Training,
)


def ds_moe_mini() -> Suite:
  """Dense versus DS-MoE and sparse MoE at equal step time, with the inference cost of each."""
  return Suite(name="ds_moe_mini", pairs=(Pair(dense=ds_mini_dense(), candidates=(ds_mini_moe(), ds_mini_smoe())),))


def ds_mini_dense() -> Experiment:
  """Dense, 0.32M parameters, 0.6M bytes: 2 minutes on one CPU core."""
  return Experiment(
    name="ds_mini_dense",
    model=Model(
      num_layers=3,
      d_model=96,
      num_heads=6,
      num_kv_heads=1,
      head_dim=16,
      d_ff=400,
      vocab_size=264,
      activation="gelu",
      layers="unrolled",
    ),
    data=Data(sequence_length=128),
    training=Training(batch_size=16, steps=300),
    optimizer=AdamW(learning_rate=3e-3),
    evaluation=Evaluation(batch_size=16, max_tokens=60_000),
  )


def ds_mini_moe() -> Experiment:
  """DS-MoE: 6 experts of heads and 32 of the feed-forward in every layer, all of them trained on every token."""
  dense = ds_mini_dense()
  moe = MoE(num_experts=32, experts_per_token=32, d_ff=12, router=DenseRouter(), dispatch=DenseDispatch())
  losses = Losses(mutual_information=0.03, attention_mutual_information=0.01)
  return replace(
    dense,
    name="ds_mini_moe",
    model=replace(dense.model, d_ff=384, attention_experts=6, moe=moe),
    training=replace(dense.training, losses=losses),
    # Twice that of the dense model: the weights of the experts, 1/32 on average, also scale the effect of an update.
    optimizer=replace(dense.optimizer, learning_rate=6e-3),
  )


def ds_mini_moe_no_mi() -> Experiment:
  """DS-MoE without its mutual-information loss."""
  with_loss = ds_mini_moe()
  return replace(with_loss, name="ds_mini_moe_no_mi", training=replace(with_loss.training, losses=Losses()))


def ds_mini_smoe() -> Experiment:
  """Sparse MoE: 8 experts, two per token, in every layer, dropless, and trained sparsely."""
  dense = ds_mini_dense()
  moe = MoE(
    num_experts=8,
    experts_per_token=2,
    d_ff=50,
    dispatch=GroupedDispatch(),
    router=TopKRouter(renormalize=False),
  )
  training = replace(dense.training, losses=Losses(load_balance=0.01))
  return replace(dense, name="ds_mini_smoe", model=replace(dense.model, moe=moe), training=training)
