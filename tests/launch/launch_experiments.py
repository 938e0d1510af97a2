"""Tiny experiments, which commands of these tests name: `tests/launch/launch_experiments.py:dense` and `:sparse`."""

from dataclasses import replace

from moejax.config import (
  AdamW,
  Checkpoints,
  Constant,
  Data,
  Evaluation,
  Experiment,
  Losses,
  Measurement,
  Model,
  MoE,
  Pair,
  Suite,
  Training,
)


def dense() -> Experiment:
  """A model that every mesh of 8 devices divides."""
  return Experiment(
    name="dense",
    model=Model(num_layers=2, d_model=16, num_heads=8, num_kv_heads=8, head_dim=2, d_ff=16, vocab_size=264),
    data=Data(sequence_length=16),
    training=Training(batch_size=8, steps=4, checkpoints=Checkpoints(every=2), log_every=1),
    optimizer=AdamW(learning_rate=1e-2, schedule=Constant(warmup_fraction=0.0)),
    evaluation=Evaluation(batch_size=8),
  )


def sparse() -> Experiment:
  """The same with experts in its second layer."""
  experiment = dense()
  return replace(
    experiment,
    name="sparse",
    model=replace(experiment.model, moe=MoE(num_experts=8, experts_per_token=2, d_ff=8, every=2, group_size=16)),
    training=replace(experiment.training, losses=Losses(load_balance=0.01, router_z=0.001)),
  )


def suite() -> Suite:
  """The two as a comparison, which is measured in a few steps."""
  measurement = Measurement(warmup_steps=1, rounds=2, steps_per_round=2)
  return Suite(name="suite", pairs=(Pair(dense=dense(), candidates=(sparse(),)),), measurement=measurement)
