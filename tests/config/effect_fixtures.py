"""Small experiments whose fields are changed one by one."""

from dataclasses import replace

from moejax.config import (
  AdamW,
  Data,
  Depths,
  Evaluation,
  Experiment,
  GroupedQuery,
  LinearScaling,
  Mesh,
  Model,
  MoE,
  Router,
  ThresholdDepths,
  TopKDepths,
  Training,
)

DENSE = Experiment(
  name="dense",
  model=Model(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, vocab_size=264),
  data=Data(sequence_length=32),
  training=Training(batch_size=8),
  optimizer=AdamW(learning_rate=1e-3),
  evaluation=Evaluation(batch_size=8),
  mesh=Mesh(data=1),
)

GROUPED_QUERY = {
  "window": 4, "chunk": 4, "rotary_embedding": False, "rope_theta": 500.0, "sinks": True, "output_bias": True,
  "score_scale": 0.5, "rope_scaling": LinearScaling(factor=2.0), "norm_after_rotary": True, "score_log_scale": 0.1,
}  # fmt: skip
LATENT = {
  "kv_rank": 6, "q_rank": 8, "rotary_dim": 2, "value_dim": 6, "score_scale": 0.5,
  "rope_scaling": LinearScaling(factor=2.0),
}  # fmt: skip
"""Other values of the fields of attention layers."""

GROUPED_DISPATCH = {"exchange": "all_gather", "exchange_chunks": 2, "receive_factor": 1.0}
"""The same of the dispatch."""

LLAMA_4 = {
  "switch": {"model.moe.weights_on": "inputs"}, "log scale": {"model.attention[grouped_query].score_log_length": 3},
}  # fmt: skip
"""Other values of fields that need others."""

DEPTHS = {
  "top_k_depths": {
    "model.depths": ThresholdDepths(share=0.5), "model.depths[top_k].every": 1, "model.depths[top_k].share": 0.25,
    "training.losses.depths": 0.1,
  },
  "threshold_depths": {
    "model.depths[threshold].threshold": 0.6, "model.depths[threshold].every": 1, "model.depths[threshold].share": 0.25,
  },
}  # fmt: skip
"""Other values of the fields of mixtures of depths."""


def routed(depths: Depths) -> Experiment:
  """The dense experiment with a mixture of depths."""
  losses = replace(DENSE.training.losses, depths=0.01)
  return replace(DENSE, model=replace(DENSE.model, depths=depths), training=replace(DENSE.training, losses=losses))


def ahead() -> Experiment:
  """The dense experiment with multi-token prediction."""
  losses = replace(DENSE.training.losses, multi_token=0.3)
  return replace(
    DENSE, model=replace(DENSE.model, multi_token_depth=1), training=replace(DENSE.training, losses=losses)
  )


OPTIMIZERS = {
  "lion": {"optimizer[Lion].beta1": 0.8, "optimizer[Lion].beta2": 0.8, "optimizer[Lion].moment_dtype": "bfloat16"},
  "lora": {
    "optimizer[LoRA].rank": 4, "optimizer[LoRA].alpha": 8.0, "optimizer[LoRA].routers": True,
    "optimizer[LoRA].beta1": 0.8,
    "optimizer[LoRA].beta2": 0.8, "optimizer[LoRA].epsilon": 1e-6,
  },
  "spiel": {
    "optimizer[SpIEL].density": 0.5, "optimizer[SpIEL].interval": 50, "optimizer[SpIEL].accumulated": 4,
    "optimizer[SpIEL].replaced": 0.5, "optimizer[SpIEL].beta1": 0.8, "optimizer[SpIEL].beta2": 0.8,
    "optimizer[SpIEL].epsilon": 1e-6,
  },
  "muon": {
    "optimizer[Muon].beta": 0.8, "optimizer[Muon].iterations": 3, "optimizer[Muon].update_rms": 0.1,
    "optimizer[Muon].adam_beta1": 0.8, "optimizer[Muon].moment_dtype": "bfloat16", "optimizer[Muon].adam_beta2": 0.8,
  },
}  # fmt: skip
"""Other values of the fields of optimizers that are not the default."""


def sparse(mesh: Mesh = DENSE.mesh, **moe) -> Experiment:
  fields = {"num_experts": 8, "experts_per_token": 2, "d_ff": 8, "group_size": 32} | moe
  return replace(DENSE, name="sparse", model=replace(DENSE.model, moe=MoE(**fields)), mesh=mesh)


MORE_BASES = {
  "switch": sparse(experts_per_token=1, router=Router(renormalize=False)),
  "log scale": replace(DENSE, model=replace(DENSE.model, attention=(GroupedQuery(score_log_scale=0.1),))),
  "top_k_depths": routed(TopKDepths(share=0.5)),
  "threshold_depths": routed(ThresholdDepths(share=0.5)),
  "ahead": ahead(),
}
"""Further experiments."""
MORE_CHANGES = LLAMA_4 | DEPTHS | OPTIMIZERS
"""The changes of their fields, and of optimizers."""
