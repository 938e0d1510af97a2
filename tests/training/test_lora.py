"""LoRA as an optimizer, and weights that stay 0."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import initial_state, run_steps, spec_of, tiny

from moejax.config import AdamW, LoRA, Mesh
from moejax.errors import UserError

LORA = LoRA(learning_rate=1e-2, rank=2, alpha=6.0)


def by_path(tree):
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def adapted(names):
  """Whether a parameter is a matrix between the embed dimension and an inner one."""
  own = [name for name in names if name not in ("layers", "experts")]
  inner = [name for name in own if name not in ("embed", "expert_embed")]
  return len(inner) < len(own) and bool(inner) and not {None, "vocab"} & set(inner)


def stepped(optimizer, steps, rate):
  """Parameters before and after updates by random gradients, and the last state of the optimizer."""
  spec = spec_of(tiny(True, optimizer=optimizer))
  state, drawn = initial_state(spec.experiment.model, optimizer, 0), np.random.default_rng(0)
  parameters, inner = state.parameters, state.optimizer
  update = jax.jit(spec.optimizer.update)
  for _ in range(steps):
    gradients = jax.tree.map(lambda leaf: drawn.standard_normal(leaf.shape, np.float32), parameters)
    updates, inner = update(gradients, inner, parameters, learning_rate=jnp.float32(rate))
    parameters = jax.tree.map(lambda leaf, moved: leaf - rate * moved, parameters, updates)
  names = by_path(
    jax.tree.map(lambda of: 1.0 * adapted(of), spec.model.names, is_leaf=lambda of: isinstance(of, tuple))
  )
  return by_path(state.parameters), by_path(parameters), inner, names


def test_matrices_of_layers_move_within_the_rank_and_all_else_stays():
  before, after, state, names = stepped(LORA, 3, 1e-2)
  assert 0 < sum(names.values()) < len(names)
  for path, is_adapted in names.items():
    moved = after[path] - before[path]
    if not is_adapted:
      np.testing.assert_array_equal(moved, 0, err_msg=path)
      continue
    factors = state.factors[path]
    merged = LORA.alpha / LORA.rank * np.einsum("...DX,...XF->...DF", factors["down"], factors["up"])
    assert np.linalg.norm(moved) > 0 and all(np.linalg.matrix_rank(merged).ravel() <= LORA.rank)
    # The weight is the first one plus the product, whichever way its dimensions stand.
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(merged), rel=1e-3)
    np.testing.assert_allclose(np.sort(moved.ravel()), np.sort(merged.ravel()), atol=1e-5)


def test_routers_are_trained_if_they_are_to_be():
  optimizer = dataclasses.replace(LORA, routers=True)
  (before, after, state, _), (_, without, *_) = stepped(optimizer, 1, 1e-2), stepped(LORA, 1, 1e-2)
  for path in before:
    if "w_router" not in path:  # also LoRA's own matrices, whose gradients are the same
      np.testing.assert_array_equal(after[path] == before[path], without[path] == before[path])
      continue
    np.testing.assert_array_equal(without[path], before[path])
    # The first step of Adam is the sign of the gradient.
    step = (before[path] - after[path]) / 1e-2 - LORA.weight_decay * before[path]
    np.testing.assert_allclose(np.abs(step), 1, atol=1e-3)
    np.testing.assert_allclose(state.factors[path]["whole"], after[path], atol=1e-7)
  assert sum("w_router" in path for path in before) == 1
  with pytest.raises(UserError, match=r"optimizer\.routers=True would have no effect: no layer is sparse"):
    tiny(False, optimizer=optimizer)


def test_the_first_weights_are_those_of_the_base_and_no_rate_moves_nothing():
  before, after, state, names = stepped(LORA, 2, 0.0)
  assert all(np.array_equal(before[path], after[path]) for path in names)
  assert all(not np.any(pair["up"]) for pair in state.factors.values())


def test_a_step_is_that_of_adam_on_the_two_factors():
  """Against automatic differentiation through base + scale x down x up."""
  spec = spec_of(tiny(False, optimizer=LORA))
  state = initial_state(spec.experiment.model, LORA, 0)
  drawn = np.random.default_rng(0)
  gradients = jax.tree.map(lambda leaf: drawn.standard_normal(leaf.shape, np.float32), state.parameters)
  (path,) = [path for path in state.optimizer.factors if "w_down_FD" in path]
  pair = jax.tree.map(lambda x: x + 0.1, state.optimizer.factors[path])  # `up` is 0 at first
  inner = state.optimizer._replace(factors=state.optimizer.factors | {path: pair})
  _, after = spec.optimizer.update(gradients, inner, state.parameters, learning_rate=jnp.float32(0.1))

  def loss(pair):
    w_LFD = LORA.alpha / LORA.rank * jnp.einsum("LFX,LXD->LFD", pair["down"], pair["up"])
    return jnp.sum(w_LFD * by_path(gradients)[path])

  of_pair = jax.grad(loss)(pair)
  for name in pair:
    # The first step of Adam is the sign of the gradient.
    wanted = pair[name] - 0.1 * (np.sign(of_pair[name]) + LORA.weight_decay * pair[name])
    np.testing.assert_allclose(after.factors[path][name], wanted, atol=1e-5)


def test_the_state_is_narrow():
  spec = spec_of(tiny(True, optimizer=LORA))
  sizes = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
           for tree in (spec.abstract_state.optimizer, spec.model.parameters)]  # fmt: skip
  assert sizes[0] < sizes[1]


@pytest.mark.parametrize("optimizer", [AdamW(learning_rate=1e-2), LORA], ids=["AdamW", "LoRA"])
def test_zeros_of_matrices_stay_and_their_share_with_them(optimizer):
  spec = spec_of(tiny(True, optimizer=dataclasses.replace(optimizer, keep_zeros=True)))
  state, drawn = initial_state(spec.experiment.model, optimizer, 0), np.random.default_rng(0)
  pruned = jax.tree.map(lambda leaf: np.where(drawn.random(leaf.shape) < 0.75, 0, leaf), state.parameters)
  gradients = jax.tree.map(lambda leaf: drawn.standard_normal(leaf.shape, np.float32), pruned)
  updates, _ = jax.jit(spec.optimizer.update)(gradients, state.optimizer, pruned, learning_rate=jnp.float32(1e-2))
  axes = jax.tree.leaves(spec.model.names, is_leaf=lambda of: isinstance(of, tuple))
  for names, weight, update in zip(axes, jax.tree.leaves(pruned), jax.tree.leaves(updates), strict=True):
    if len([name for name in names if name != "layers"]) > 1:
      assert not np.any(np.asarray(update)[weight == 0]) and 0.6 < np.mean(weight - 1e-2 * update == 0) <= 1
    elif isinstance(optimizer, AdamW):
      assert np.all(np.asarray(update)[weight == 0] != 0)  # a bias or a scale may leave 0


@pytest.mark.slow
def test_lora_learns_alike_on_one_device_and_on_eight():
  one, losses, _ = run_steps(tiny(True, optimizer=LORA), steps=4)
  assert losses[-1] < losses[0]
  eight, *_ = run_steps(tiny(True, optimizer=LORA, mesh=Mesh(data=2, expert=2, model=2)), steps=4)
  for mine, other in zip(jax.tree.leaves(eight.parameters), jax.tree.leaves(one.parameters), strict=True):
    np.testing.assert_allclose(mine, other, atol=1e-3)
