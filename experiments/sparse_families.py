"""Published sparse models: gpt-oss (arXiv 2508.10925), DeepSeek-V3 (arXiv 2412.19437) and Llama 4."""

import dataclasses

from moejax.config import (
  DATA_EXPERT_MODEL,
  AdamW,
  Data,
  Evaluation,
  Experiment,
  GroupedDispatch,
  GroupedQuery,
  Latent,
  Llama3Scaling,
  Losses,
  Mesh,
  Model,
  MoE,
  TopKRouter,
  Training,
  YarnScaling,
)


def gpt_oss_20b() -> Experiment:
  """gpt-oss 20B: 20.9B in total, 3.6B active without the embedding. The mesh is for 64 chips."""
  return _experiment("gpt_oss_20b", _gpt_oss(24, 32), Mesh(data=8, expert=8), 4096, 128, Losses(load_balance=0.001))


def gpt_oss_120b() -> Experiment:
  """gpt-oss 120B: 116.8B in total, 5.1B active without the embedding. The mesh is for 256 chips."""
  return _experiment("gpt_oss_120b", _gpt_oss(36, 128), Mesh(data=16, expert=16), 4096, 256, Losses(load_balance=0.001))


def deepseek_v3() -> Experiment:
  """DeepSeek-V3, without its layer for multi-token prediction: 671.0B in total, 37.6B active. The mesh is for 2048
  chips. As pretrained, with 4096 tokens and without YaRN."""
  router = TopKRouter(scores="sigmoid", bias_rate=0.001, scale=2.5, expert_groups=8, groups_per_token=4)
  model = Model(
    num_layers=61,
    d_model=7168,
    num_heads=128,
    num_kv_heads=128,
    head_dim=128,
    attention=(Latent(kv_rank=512, q_rank=1536, rotary_dim=64),),
    d_ff=18_432,
    vocab_size=129_280,
    tie_embeddings=False,
    norm_epsilon=1e-6,
    logit_chunks=4,
    moe=MoE(
      num_experts=256,
      experts_per_token=8,
      d_ff=2048,
      leading_dense=3,
      num_shared_experts=1,
      router=router,
      dispatch=GroupedDispatch(),
    ),
    remat="layer_inputs",
  )
  losses = Losses(sequence_balance=0.0001)
  return _experiment("deepseek_v3", model, Mesh(data=32, expert=64), 4096, 4096, losses)


def deepseek_v3_mtp() -> Experiment:
  """DeepSeek-V3 with its module for multi-token prediction of 11.6B more parameters, as it was pretrained."""
  base = deepseek_v3()
  losses = dataclasses.replace(base.training.losses, multi_token=0.3)
  return dataclasses.replace(
    base,
    name="deepseek_v3_mtp",
    model=dataclasses.replace(base.model, multi_token_depth=1),
    training=dataclasses.replace(base.training, losses=losses),
  )


def llama4_scout() -> Experiment:
  """Llama 4 Scout, without its image encoder: 107.8B in total, 17.2B active. The mesh is for 256 chips."""
  scaling = Llama3Scaling(factor=16.0, low_frequency=1.0, high_frequency=1.0, original_length=8192)
  local = GroupedQuery(chunk=8192, rope_scaling=scaling, norm_after_rotary=True)
  model = _llama4(local, num_experts=16, every=1, d_ff=8192)
  return _experiment("llama4_scout", model, Mesh(data=16, expert=16), 8192, 256, Losses(load_balance=0.001))


def llama4_maverick() -> Experiment:
  """Llama 4 Maverick, without its image encoder: 400.7B in total, 17.2B active; every second layer is sparse. The mesh
  is for 512 chips."""
  model = _llama4(GroupedQuery(chunk=8192), num_experts=128, every=2, d_ff=16_384)
  return _experiment("llama4_maverick", model, Mesh(data=16, expert=32), 8192, 512, Losses(load_balance=0.001))


def _gpt_oss(num_layers: int, num_experts: int) -> Model:
  scaling = YarnScaling(factor=32.0, original_length=4096, whole_dimensions=False)
  local, whole = (GroupedQuery(window=w, rope_scaling=scaling, sinks=True, output_bias=True) for w in (128, None))
  return Model(
    num_layers=num_layers,
    d_model=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    attention=(local, whole),
    d_ff=2880,
    vocab_size=201_088,
    tie_embeddings=False,
    attention_bias=True,
    rope_theta=150_000.0,
    activation="swiglu_clipped",
    logit_chunks=8,
    moe=MoE(num_experts=num_experts, experts_per_token=4, d_ff=2880, bias=True, dispatch=GroupedDispatch()),
    remat="layer_inputs",
  )


def _llama4(local: GroupedQuery, num_experts: int, every: int, d_ff: int) -> Model:
  return Model(
    num_layers=48,
    d_model=5120,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    attention=(local,) * 3 + (GroupedQuery(rotary_embedding=False, score_log_scale=0.1),),
    d_ff=d_ff,
    vocab_size=202_048,
    tie_embeddings=False,
    rope_theta=5e5,
    logit_chunks=8,
    moe=MoE(
      num_experts=num_experts,
      experts_per_token=1,
      d_ff=8192,
      every=every,
      num_shared_experts=1,
      weights_on="inputs",
      router=TopKRouter(scores="sigmoid", renormalize=False),
      dispatch=GroupedDispatch(),
    ),
    remat="layer_inputs",
  )


def _experiment(
  name: str, model: Model, mesh: Mesh, sequence_length: int, batch_size: int, losses: Losses
) -> Experiment:
  return Experiment(
    name=name,
    model=model,
    data=Data(sequence_length=sequence_length),
    training=Training(batch_size=batch_size, losses=losses),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=batch_size),
    mesh=mesh,
    rules=(*DATA_EXPERT_MODEL, ("embed", ("data",))),
  )
