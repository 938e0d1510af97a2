"""A batch in parts: every gradient, loss, statistic and bias as in one part, whatever is padding in each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import random_batch, spec_of, tiny

from moejax.config import DenseRouter, Losses, Mesh, Router
from moejax.models.abstract import parameter_name
from moejax.training.step import _gradients, make_train_step

ROWS, LENGTH = 16, 32
PADDINGS = {
  "none": [LENGTH] * ROWS,
  "by part": [32] * 4 + [5] * 4 + [17] * 4 + [1] * 4,
  "parts without a token": [32] * 4 + [0] * 8 + [3] * 4,
  "random": np.random.default_rng(7).integers(0, LENGTH + 1, ROWS).tolist(),
}
"""Real tokens of each row."""

ALL_LOSSES = Losses(
  z=0.01, load_balance=0.3, sequence_balance=0.2, global_balance=0.4, router_z=0.05, mutual_information=0.3
)
NOISY = Router(scores="sigmoid", bias_rate=0.01, jitter=0.3, gumbel=1.0)
DENSE = DenseRouter()
ROUTED_ALIKE = Losses(z=0.01, router_z=0.05, mutual_information=0.3, attention_mutual_information=0.5)
CASES = {
  "dense": (None, {}, Losses(z=0.01)),
  "sums over tokens": ({"dispatch": "grouped"}, {}, Losses(load_balance=0.3, sequence_balance=0.2, router_z=0.05)),
  "all losses, bias and noise": ({"group_size": 64, "router": NOISY}, {}, ALL_LOSSES),
  "mixture of attention": (
    {"router": DENSE, "experts_per_token": 8, "dispatch": "dense", "group_size": None},
    {"num_kv_heads": 2, "attention_experts": 4},
    ROUTED_ALIKE,
  ),
}
FAST = "all losses, bias and noise"


def experiment_of(case, parts=1, mesh=None):
  moe, model, losses = CASES[case]
  experiment = tiny(moe is not None)
  if moe is not None:
    model = model | {"moe": dataclasses.replace(experiment.model.moe, **moe)}
  return dataclasses.replace(
    experiment,
    model=dataclasses.replace(experiment.model, **model),
    training=dataclasses.replace(experiment.training, losses=losses, gradient_accumulation=parts),
    mesh=mesh or Mesh(data=1),
  )


def padded(experiment, rows):
  batch = random_batch(experiment)
  real_BT = np.arange(LENGTH) < np.array(rows)[:, None]
  return batch | {"segments": batch["segments"] * real_BT, "weights": batch["weights"] * real_BT}


@functools.cache
def gradients_of(case, parts, mesh=None):
  """A compiled function of the batch."""
  spec = spec_of(experiment_of(case, parts, mesh))
  parameters = spec.init_state(0).parameters
  key = jax.random.key(3) if "noise" in case else None
  function = jax.jit(lambda parameters, batch: _gradients(spec, parameters, batch, key))
  return lambda batch: jax.device_get(function(parameters, jax.device_put(batch, spec.partitioner.batch)))


@functools.cache
def in_one_part(case, padding):
  return gradients_of(case, 1)(padded(experiment_of(case), PADDINGS[padding]))


def check_equal(found, expected):
  gradients, metrics = found
  for (path, mine), other in zip(
    jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected[0]), strict=True
  ):
    np.testing.assert_allclose(mine, other, atol=5e-6 * np.abs(other).max() + 1e-12, err_msg=parameter_name(path))
  assert metrics.keys() == expected[1].keys()
  if "router/choices" in metrics:  # what moves the biases
    np.testing.assert_array_equal(metrics["router/choices"], expected[1]["router/choices"])
  for name, value in expected[1].items():
    np.testing.assert_allclose(metrics[name], value, rtol=5e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
  ("case", "parts"),
  [
    pytest.param(case, parts, marks=marks)
    for case in CASES
    for parts, marks in ((4, () if case == FAST else pytest.mark.slow), (2, pytest.mark.nightly))
  ],
)
def test_a_batch_in_parts_has_the_gradients_losses_and_statistics_of_the_whole(case, parts, padding):
  check_equal(gradients_of(case, parts)(padded(experiment_of(case), PADDINGS[padding])), in_one_part(case, padding))


@pytest.mark.slow
def test_parts_on_a_mesh_have_the_gradients_losses_and_statistics_of_the_whole_on_one_device():
  found = gradients_of("all losses, bias and noise", 2, Mesh(data=2, expert=2, model=2))
  batch = padded(experiment_of("all losses, bias and noise"), PADDINGS["by part"])
  check_equal(found(batch), in_one_part("all losses, bias and noise", "by part"))


@pytest.mark.parametrize("parts", [pytest.param(4, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.nightly)])
def test_the_biases_move_by_the_counts_of_the_whole_batch(parts):
  moved = []
  for count in (1, parts):
    spec = spec_of(experiment_of("all losses, bias and noise", count))
    batch = padded(experiment_of("all losses, bias and noise"), PADDINGS["by part"])
    state, _ = make_train_step(spec)(spec.init_state(0), batch, jnp.float32(0.0))
    moved.append(np.asarray(state.parameters["layers"]["blocks"][1]["feed_forward"]["bias_E"]))
  assert moved[0].any()
  np.testing.assert_array_equal(moved[1], moved[0])
