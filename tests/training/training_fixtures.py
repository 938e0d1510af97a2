"""Tiny experiments and batches that the tests of training share."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import AdamW, Budget, Checkpoints, Data, Experiment, Losses, Mesh, Model, MoE, Training
from moejax.data.corpus import Corpus
from moejax.partitioning import make_partitioner
from moejax.training.prepare import Prepared, Workspace, on_devices, prepare
from moejax.training.state import make_train_spec
from moejax.training.step import BATCH_TYPES, make_train_step


def tiny(sparse: bool, **fields) -> Experiment:
  """A model that every mesh of 8 devices divides."""
  moe = MoE(num_experts=8, experts_per_token=2, d_ff=16, every=2, group_size=16) if sparse else None
  experiment = Experiment(
    name="tiny_moe" if sparse else "tiny_dense",
    model=Model(num_layers=2, d_model=32, num_heads=8, num_kv_heads=8, head_dim=4, d_ff=32, vocab_size=264, moe=moe),
    data=Data(sequence_length=32),
    training=Training(
      batch_size=16,
      steps=6,
      budget=Budget(),
      losses=Losses(z=1e-4, load_balance=0.01 if sparse else 0.0, router_z=0.001 if sparse else 0.0),
      checkpoints=Checkpoints(every=2),
      log_every=1,
    ),
    optimizer=AdamW(learning_rate=3e-3),
    mesh=Mesh(data=1),
  )
  return dataclasses.replace(experiment, **fields)


@functools.cache
def spec_of(experiment: Experiment):
  return make_train_spec(experiment, make_partitioner(experiment.mesh, experiment.rules))


def prepared_on(experiment: Experiment, corpus: Corpus) -> Prepared:
  """The experiment on the devices present, ready to run."""
  (placed,) = on_devices([experiment], corpus.tokenizer)
  return prepare(Workspace(corpus.folder, {experiment.name: placed}, corpus), experiment.name)


@functools.cache
def step_of(experiment: Experiment):
  """Its train step, compiled once for all tests of this process."""
  return make_train_step(spec_of(experiment))


def random_batch(experiment: Experiment, seed: int = 0) -> dict[str, np.ndarray]:
  """Tokens with a pattern to learn, documents of 12 tokens, a padded tail in the last row."""
  shape = (experiment.training.batch_size, experiment.data.sequence_length)
  random = np.random.default_rng(seed)
  tokens = (np.arange(shape[1]) * 7 + random.integers(0, 50, (shape[0], 1))) % 257
  segments = np.broadcast_to(np.arange(shape[1]) // 12 + 1, shape).copy()
  segments[-1, 20:] = 0
  weights = (segments > 0) & (np.arange(shape[1]) % 12 != 11)
  batch = {
    "tokens": tokens, "targets": (tokens + 7) % 257, "segments": segments,
    "positions": np.broadcast_to(np.arange(shape[1]) % 12, shape), "weights": weights,
  }  # fmt: skip
  return {name: np.asarray(rows, BATCH_TYPES[name]) for name, rows in batch.items()}


def read_metrics(directory):
  """The records of a run."""
  return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@functools.cache
def initial_state(model: Model, optimizer: object, seed: int):
  """Drawn on one device, on the host: test_state.py holds that every mesh draws the same."""
  experiment = dataclasses.replace(tiny(model.moe is not None), model=model, optimizer=optimizer)
  return jax.device_get(spec_of(experiment).init_state(seed))


def fresh_state(experiment: Experiment):
  """The first state of an experiment on its mesh."""
  state = initial_state(experiment.model, experiment.optimizer, experiment.training.seed)
  return jax.device_put(state, spec_of(experiment).shardings)


def run_steps(experiment: Experiment, steps: int = 5):
  """Parameters, losses and last metrics after some steps on one batch."""
  spec, step = spec_of(experiment), step_of(experiment)
  state, losses = fresh_state(experiment), []
  for _ in range(steps):
    batch = jax.device_put(random_batch(experiment), spec.partitioner.batch)
    state, metrics = step(state, batch, jnp.float32(3e-3))
    losses.append(float(metrics["loss"]))
  return jax.device_get(state), losses, jax.device_get(metrics)


def product_flops(jaxpr) -> int:
  """FLOPs of all matrix products of a traced function without loops."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      total += product_flops(inner) if hasattr(inner, "eqns") else 0
  return total
