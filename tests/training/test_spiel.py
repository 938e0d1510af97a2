"""SpIEL: a sparse set of weights is trained, and changes at intervals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers as Axes
from training_fixtures import run_steps, tiny

from moejax.config import Mesh, SpIEL
from moejax.errors import UserError
from moejax.training.spiel import spiel

CONFIG = SpIEL(learning_rate=0.05, density=0.2, interval=4, accumulated=2, replaced=0.5)
STACK, ROWS, COLUMNS = 2, 5, 8
SIZE, CHOSEN = ROWS * COLUMNS, 8


class Reference:
  """One matrix as a vector, whose chosen weights are a dictionary."""

  def __init__(self, weights):
    self.weights, self.chosen, self.steps = weights.copy(), {}, 0

  def step(self, gradient, rate):
    c, phase = CONFIG, self.steps % CONFIG.interval
    for i, of in self.chosen.items():
      of["age"] += 1
      of["mean"] = c.beta1 * of["mean"] + (1 - c.beta1) * gradient[i]
      of["square"] = c.beta2 * of["square"] + (1 - c.beta2) * gradient[i] ** 2
      mean, square = of["mean"] / (1 - c.beta1 ** of["age"]), of["square"] / (1 - c.beta2 ** of["age"])
      of["delta"] -= rate * (mean / (np.sqrt(square) + c.epsilon) + c.weight_decay * of["delta"])
    if phase == 0:
      self.proposed = {int(i): [] for i in np.argsort(-np.abs(gradient))[:CHOSEN]}
    if phase < c.accumulated:
      for i, of in self.proposed.items():
        of.append(gradient[i])
    if phase == c.accumulated - 1:
      self.choose(CHOSEN if self.steps < c.interval else int(c.replaced * rate / c.learning_rate * CHOSEN))
    self.steps += 1
    now = self.weights.copy()
    for i, of in self.chosen.items():
      now[i] += of["delta"]
    return now

  def choose(self, count):
    weak = sorted(self.chosen, key=lambda i: abs(self.chosen[i]["delta"]))[:count]
    free = [i for i in self.proposed if i not in self.chosen or i in weak]
    strong = sorted(free, key=lambda i: -abs(sum(self.proposed[i])))[:count]
    for i in [i for i in weak if i not in strong][: len([i for i in strong if i not in weak])]:
      del self.chosen[i]
    for i in strong:
      if i not in self.chosen:
        g, n, c = np.array(self.proposed[i]), CONFIG.accumulated, CONFIG
        moments = {"mean": g.mean() * (1 - c.beta1**n), "square": (g**2).mean() * (1 - c.beta2**n)}
        self.chosen[i] = {"delta": 0.0, "age": n, **moments}


def test_the_weights_are_those_of_a_loop_over_dictionaries():
  drawn = np.random.default_rng(0)
  parameters = {"norm": drawn.standard_normal(3), "w": drawn.standard_normal((ROWS, STACK, COLUMNS))}
  parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters)
  optimizer = spiel(CONFIG, {"norm": None, "w": Axes((0,), (2,))})
  state, update, first = optimizer.init(parameters), jax.jit(optimizer.update), parameters
  references = [Reference(np.asarray(parameters["w"][:, s], np.float64).ravel()) for s in range(STACK)]
  changed_before, replaced = None, 0
  for step in range(14):
    rate = np.float32(CONFIG.learning_rate * (1 - step / 16))
    gradients = {name: jnp.asarray(drawn.standard_normal(w.shape), jnp.float32) for name, w in parameters.items()}
    updates, state = update(gradients, state, parameters, learning_rate=rate)
    parameters = jax.tree.map(lambda w, u, rate=rate: w - rate * u, parameters, updates)
    np.testing.assert_array_equal(parameters["norm"], first["norm"])
    for s, reference in enumerate(references):
      wanted = reference.step(np.asarray(gradients["w"][:, s], np.float64).ravel(), float(rate))
      np.testing.assert_allclose(np.asarray(parameters["w"][:, s]).ravel(), wanted, atol=2e-5)
    changed = np.abs(np.asarray(parameters["w"] - first["w"])) > 1e-4
    assert changed.sum() <= STACK * CHOSEN and (step >= CONFIG.accumulated or not changed.any())
    replaced += changed_before is not None and bool((changed_before & ~changed).any())
    changed_before = changed
  assert replaced >= 2  # weights were reset in every later replacement
  assert all(len(reference.chosen) == CHOSEN for reference in references)


def test_a_learning_rate_of_0_changes_no_weight():
  parameters = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, COLUMNS)), jnp.float32)}
  optimizer = spiel(CONFIG, {"w": Axes((0,), (1,))})
  state, update = optimizer.init(parameters), jax.jit(optimizer.update)
  for _ in range(7):
    updates, state = update(parameters, state, parameters, learning_rate=np.float32(0))
    assert not np.any(updates["w"])
  indices = np.sort(np.asarray(state.chosen["['w']"].indices_X))
  np.testing.assert_array_equal(indices, np.sort(np.argsort(-np.abs(parameters["w"]).ravel())[:CHOSEN]))


def test_mistakes_name_the_limit():
  with pytest.raises(UserError, match=r"optimizer.density=1.5 must lie between 0 and 1"):
    dataclasses.replace(CONFIG, density=1.5)
  with pytest.raises(UserError, match=r"optimizer.accumulated=5 must lie between 1 and 4"):
    dataclasses.replace(CONFIG, accumulated=5)


@pytest.mark.slow
def test_it_learns_alike_on_one_device_and_on_eight():
  optimizer = dataclasses.replace(CONFIG, learning_rate=3e-3)
  one, losses, _ = run_steps(tiny(True, optimizer=optimizer), steps=5)
  assert losses[-1] < losses[0]
  eight, *_ = run_steps(tiny(True, optimizer=optimizer, mesh=Mesh(data=2, expert=2, model=2)), steps=5)
  for mine, other in zip(jax.tree.leaves(eight.parameters), jax.tree.leaves(one.parameters), strict=True):
    np.testing.assert_allclose(mine, other, atol=1e-3)
