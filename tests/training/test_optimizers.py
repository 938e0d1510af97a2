"""Optimizers and schedules: the rate of each step, what each optimizer does to which weight, a user's own."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fixtures import initial_state, run_steps, spec_of, tiny

from moejax.config import AdamW, Constant, Cosine, Linear, Lion, Mesh, Muon, Optimizer, Schedule, WarmupStableDecay
from moejax.errors import UserError
from moejax.training.optimizers import OPTIMIZERS, learning_rate

SCHEDULES = (Cosine(), Linear(), WarmupStableDecay(), Constant())


def rates(schedule: Schedule, steps: int) -> list[float]:
  return [learning_rate(AdamW(learning_rate=1.0, schedule=schedule), step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_every_schedule_rises_in_equal_steps_to_the_peak_and_never_rises_again(schedule):
  found = rates(dataclasses.replace(schedule, warmup_fraction=0.1), 101)
  assert found[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
  assert found[10] == pytest.approx(1.0) and max(found) == pytest.approx(1.0)
  assert all(a >= b for a, b in itertools.pairwise(found[11:]))
  assert found[-1] == pytest.approx(getattr(schedule, "final_fraction", 1.0))


def test_half_way_down_cosine_and_linear_are_at_the_mean_of_peak_and_final():
  assert rates(Cosine(warmup_fraction=0.0, final_fraction=0.1), 101)[50] == pytest.approx(0.55)
  assert rates(Linear(warmup_fraction=0.0, final_fraction=0.1), 101)[50] == pytest.approx(0.55)


def test_warmup_stable_decay_is_at_the_peak_until_its_decay_begins():
  found = rates(WarmupStableDecay(warmup_fraction=0.0, decay_fraction=0.2), 101)
  assert found[:81] == [1.0] * 81 and found[90] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_one_step_is_possible(schedule):
  assert 0.0 < rates(schedule, 1)[0] <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("optimizer", "sparse"),
  [(Lion(learning_rate=3e-3), False), (Muon(learning_rate=3e-3, iterations=2), True)],
  ids=["Lion", "Muon"],
)
def test_every_optimizer_learns_alike_on_one_device_and_on_eight(optimizer, sparse):
  """Lion treats every element alike; Muon has matrices of layers and of experts."""
  one, losses, _ = run_steps(tiny(sparse, optimizer=optimizer), steps=4)
  assert losses[-1] < losses[0]
  eight, *_ = run_steps(tiny(sparse, optimizer=optimizer, mesh=Mesh(data=2, expert=2, model=2)), steps=4)
  for mine, other in zip(jax.tree.leaves(eight.parameters), jax.tree.leaves(one.parameters), strict=True):
    # Lion's sign amplifies rounding where a momentum is nearly 0.
    np.testing.assert_allclose(mine, other, atol=1e-3)


@pytest.mark.parametrize("optimizer", [AdamW(learning_rate=1.0), Lion(learning_rate=1.0), Muon(learning_rate=1.0)])
def test_no_moment_of_a_sharded_parameter_is_replicated(optimizer):
  spec = spec_of(tiny(True, optimizer=optimizer, mesh=Mesh(data=2, expert=2, model=2)))
  placed: dict[tuple, set] = {}
  for leaf in jax.tree.leaves(spec.model.parameters):
    placed.setdefault(leaf.shape, set()).add(leaf.sharding.spec)
  moments = [leaf for leaf in jax.tree.leaves(spec.abstract_state.optimizer) if leaf.shape in placed]
  assert len(moments) >= len(jax.tree.leaves(spec.model.parameters))
  assert all(leaf.sharding.spec in placed[leaf.shape] for leaf in moments)


def test_muon_orthogonalizes_the_matrices_of_layers_and_leaves_the_rest_to_adam():
  spec = spec_of(tiny(True, optimizer=Muon(learning_rate=1e-3, weight_decay=0.0)))
  state = initial_state(spec.experiment.model, spec.experiment.optimizer, 0)
  drawn = np.random.default_rng(0)
  gradients = jax.tree.map(lambda leaf: drawn.standard_normal(leaf.shape, np.float32), state.parameters)
  updates, _ = jax.jit(spec.optimizer.update)(gradients, state.optimizer, state.parameters)
  block = updates["layers"]["blocks"][1]
  query = np.asarray(block["attention"]["w_q_DNH"][0]).reshape(32, 32)
  expert = np.asarray(block["feed_forward"]["experts"]["w_down_EFD"][0, 3])
  for matrix in (query, expert):
    singular = np.linalg.svd(matrix, compute_uv=False)
    # Five Newton-Schulz iterations bring singular values to about 1, here times 0.2 sqrt(larger side).
    assert np.all(np.abs(singular / (0.2 * np.sqrt(32)) - 1.0) < 0.5)
  embedding, gradient = np.asarray(updates["embedding_VD"]), np.asarray(gradients["embedding_VD"])
  # Adam's first update has one size everywhere, with Nesterov momentum 28 / 19.
  np.testing.assert_allclose(embedding, np.sign(gradient) * 28 / 19, atol=1e-3)


def test_weights_decay_on_matrices_alone_with_every_optimizer():
  for optimizer in (AdamW(learning_rate=1.0), Lion(learning_rate=1.0), Muon(learning_rate=1.0)):
    spec = spec_of(tiny(True, optimizer=optimizer))
    ones, zeros = (
      jax.tree.map(lambda leaf, value=value: jnp.full(leaf.shape, value, leaf.dtype), spec.model.parameters)
      for value in (1.0, 0.0)
    )
    updates = jax.jit(lambda ones, zeros, of=spec.optimizer: of.update(zeros, of.init(ones), ones)[0])(ones, zeros)
    for update, names in zip(jax.tree.leaves(updates), _names(spec), strict=True):
      wanted = optimizer.weight_decay if len([name for name in names if name != "layers"]) > 1 else 0.0
      np.testing.assert_allclose(update, wanted, rtol=1e-6)


@pytest.mark.parametrize(
  ("optimizer", "narrow", "wide"),
  [(AdamW(learning_rate=1.0), 1, 1), (Lion(learning_rate=1.0), 1, 0), (Muon(learning_rate=1.0), 1, None)],
  ids=["AdamW", "Lion", "Muon"],
)
def test_the_first_moment_alone_is_stored_in_bfloat16(optimizer, narrow, wide):
  found = {}
  for dtype in ("float32", "bfloat16"):
    spec = spec_of(tiny(True, optimizer=dataclasses.replace(optimizer, moment_dtype=dtype)))
    arrays = [leaf for leaf in jax.tree.leaves(spec.abstract_state.optimizer) if leaf.ndim]
    found[dtype] = [sum(leaf.size for leaf in arrays if leaf.dtype == of) for of in (jnp.bfloat16, jnp.float32)]
    updates, _ = jax.eval_shape(
      spec.optimizer.update, spec.model.parameters, spec.abstract_state.optimizer, spec.model.parameters
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, spec.abstract_state.parameters))} == {np.dtype("float32")}
  parameters = sum(leaf.size for leaf in jax.tree.leaves(spec.model.parameters) if leaf.ndim)
  assert found["bfloat16"][0] == narrow * parameters and found["float32"][0] == 0
  assert sum(found["bfloat16"]) == sum(found["float32"])
  assert wide is None or found["bfloat16"][1] == wide * parameters


@pytest.mark.slow
def test_a_first_moment_in_bfloat16_trains_almost_as_one_in_float32():
  losses = {
    dtype: np.array(run_steps(tiny(False, optimizer=AdamW(learning_rate=3e-3, moment_dtype=dtype)))[1])
    for dtype in ("float32", "bfloat16")
  }
  assert 0 < np.abs(losses["bfloat16"] - losses["float32"]).max() < 1e-3


def _names(spec) -> list[tuple]:
  return jax.tree.leaves(spec.model.names, is_leaf=lambda leaf: isinstance(leaf, tuple))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent(Optimizer):
  """Plain gradient descent, as a user's own file would define it."""


def test_an_optimizer_of_ones_own_is_a_class_and_a_function_in_the_table(monkeypatch):
  experiment = tiny(False, optimizer=Descent(learning_rate=1.0, weight_decay=0.0))
  with pytest.raises(UserError, match=r"optimizer Descent has no function; add one, as in .*OPTIMIZERS\[Descent\]"):
    spec_of(experiment)
  monkeypatch.setitem(OPTIMIZERS, Descent, lambda config, parameters: optax.identity())
  _, losses, _ = run_steps(experiment, steps=3)
  assert losses[-1] < losses[0]
