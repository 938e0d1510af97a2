"""Table 1 of DS-MoE (arXiv 2404.05567): dense, sparse, and densely trained models of one size, with plain GeLU layers.

The totals in the table do not include embeddings. The dense models here have the same totals within 0.2 %. The sparse
and DS-MoE models have 2 to 5 % fewer parameters, a difference that the paper does not explain. Vocabulary and batch
sharding are our choice. Set the text with --data.train.
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
  Mesh,
  Model,
  MoE,
  TopKRouter,
  Training,
)


def ds_dense_1b() -> Experiment:
  """Dense-1B: 1.0B without embeddings, 30B tokens; 24 hours on 8 H100 in the paper."""
  return _dense("ds_dense_1b", num_layers=24, d_model=2048, num_kv_heads=2, d_ff=8192, batch_size=256, steps=57_221)


def ds_dense_3b() -> Experiment:
  """Dense-3B: 2.7B without embeddings, 100B tokens; 64 hours on 32 H100 in the paper."""
  return _dense("ds_dense_3b", num_layers=28, d_model=3072, num_kv_heads=4, d_ff=12_288, batch_size=1024, steps=47_684)


def ds_dense_6b() -> Experiment:
  """Dense-6B: 6.2B without embeddings, 100B tokens; 124 hours on 32 H100 in the paper."""
  return _dense("ds_dense_6b", num_layers=36, d_model=4096, num_kv_heads=4, d_ff=16_384, batch_size=1024, steps=47_684)


def ds_moe_1b() -> Experiment:
  """DS-MoE-1B: 16 experts of heads and 32 of the feed-forward in every layer, all of them trained on every token."""
  return _densely_trained(ds_dense_1b(), "ds_moe_1b", attention_experts=16, alphas=(3.5e-4, 6.3e-4))


def ds_moe_3b() -> Experiment:
  """DS-MoE-3B: 8 experts of heads and 32 of the feed-forward in every layer, all of them trained on every token."""
  return _densely_trained(ds_dense_3b(), "ds_moe_3b", attention_experts=8, alphas=(2e-4, 4e-4))


def ds_moe_6b() -> Experiment:
  """DS-MoE-6B: 8 experts of heads and 32 of the feed-forward in every layer, all of them trained on every token."""
  return _densely_trained(ds_dense_6b(), "ds_moe_6b", attention_experts=8, alphas=(2e-4, 2e-4))


def ds_smoe_1b() -> Experiment:
  """SMoE-1B: 8 experts, two per token, in every layer, dropless."""
  return _sparse(ds_dense_1b(), "ds_smoe_1b", num_experts=8, d_ff=1024)


def ds_smoe_5b() -> Experiment:
  """SMoE-5B: 16 experts, two per token, in every layer, dropless."""
  return _sparse(ds_dense_3b(), "ds_smoe_5b", num_experts=16, d_ff=1536)


def _dense(
  name: str, num_layers: int, d_model: int, num_kv_heads: int, d_ff: int, batch_size: int, steps: int
) -> Experiment:
  return Experiment(
    name=name,
    model=Model(
      num_layers=num_layers,
      d_model=d_model,
      num_heads=32,
      num_kv_heads=num_kv_heads,
      head_dim=d_model // 32,
      d_ff=d_ff,
      vocab_size=50_304,
      activation="gelu",
      remat="attention",
    ),
    data=Data(sequence_length=2048),
    training=Training(batch_size=batch_size, steps=steps),
    optimizer=AdamW(learning_rate=3e-4, weight_decay=0.01),
    evaluation=Evaluation(batch_size=batch_size),
    mesh=Mesh(),
  )


def _densely_trained(dense: Experiment, name: str, attention_experts: int, alphas: tuple[float, float]) -> Experiment:
  """Divides the feed-forward layer into 32 experts. `alphas` are the coefficients of the mutual-information losses of
  attention heads and of feed-forward layers."""
  width = dense.model.d_ff // 32
  moe = MoE(num_experts=32, experts_per_token=32, d_ff=width, router=DenseRouter(), dispatch=DenseDispatch())
  losses = Losses(attention_mutual_information=alphas[0], mutual_information=alphas[1])
  model = replace(dense.model, attention_experts=attention_experts, moe=moe)
  return replace(dense, name=name, model=model, training=replace(dense.training, losses=losses))


def _sparse(dense: Experiment, name: str, num_experts: int, d_ff: int) -> Experiment:
  moe = MoE(
    num_experts=num_experts,
    experts_per_token=2,
    d_ff=d_ff,
    dispatch=GroupedDispatch(),
    router=TopKRouter(renormalize=False),
  )
  training = replace(dense.training, losses=Losses(load_balance=0.01))
  return replace(dense, name=name, model=replace(dense.model, moe=moe), training=training)
