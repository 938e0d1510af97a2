"""The loop over chosen experts, against plain loops, and its gradient against that of sorted rows."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from moe_reference import expert

from moejax.models.moe.experts import Weights
from moejax.models.moe.few_tokens import visit_experts
from moejax.models.moe.grouped import _by_rows, _of_few_tokens
from moejax.models.products import Operand

M, A, D, F, E = 3, 2, 6, 4, 4
RANDOM = np.random.default_rng(0)
EXPERTS_MA = np.array([[2, 0], [0, 1], [7, -1]])  # 7 and -1 are those of another device; nobody chose 3
CHOSEN_MA = np.array([[True, True], [True, False], [True, True]])
X_MD, WEIGHTS_MA = RANDOM.normal(size=(M, D)), RANDOM.random((M, A))
SHAPES = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
MATRICES = {name: RANDOM.normal(size=shape) for name, shape in SHAPES.items()}


def arrays(names=tuple(SHAPES), dtype=jnp.float32):
  weights = {name: Operand(jnp.asarray(MATRICES[name], dtype), None) for name in names}
  return (
    jnp.asarray(X_MD, dtype),
    EXPERTS_MA,
    jnp.asarray(WEIGHTS_MA, jnp.float32),
    CHOSEN_MA,
    Weights(weights, {}, "swiglu"),
  )


@pytest.mark.parametrize("names", [("gate", "up", "down"), ("up", "down")], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("form", [jnp.asarray, tuple], ids=["stacked", "separate"])
def test_each_token_has_the_weighted_sum_of_the_experts_that_it_chose(names, form):
  expected_MD = np.zeros((M, D))
  for m, a in np.ndindex(M, A):
    if CHOSEN_MA[m, a] and 0 <= (e := EXPERTS_MA[m, a]) < E:
      gate_DF = MATRICES["gate"][e] if "gate" in names else None
      expected_MD[m] += WEIGHTS_MA[m, a] * expert(X_MD[m], gate_DF, MATRICES["up"][e], MATRICES["down"][e])
  *choices, weights = arrays(names)
  matrices = {name: Operand(form(operand.value), None) for name, operand in weights.matrices.items()}
  got_MD = jax.jit(visit_experts)(*choices, Weights(matrices, {}, "swiglu"))
  np.testing.assert_allclose(got_MD, expected_MD, rtol=1e-4, atol=1e-5)
  assert np.any(expected_MD[0]) and not np.any(expected_MD[2])


def test_an_infinite_expert_changes_only_the_tokens_that_chose_it():
  x_MD, experts_MA, weights_MA, chosen_MA, weights = arrays()
  expected = visit_experts(x_MD, experts_MA, weights_MA, chosen_MA, weights)
  up_EDF = weights["up"].value.at[2].set(jnp.inf)
  infinite = Weights(weights.matrices | {"up": Operand(up_EDF, None)}, {}, "swiglu")
  got = visit_experts(x_MD, experts_MA, weights_MA, chosen_MA, infinite)
  assert not np.all(np.isfinite(got[0]))
  np.testing.assert_array_equal(got[1:], expected[1:])


def test_it_has_the_values_and_gradients_of_sorted_rows():
  x_MD, experts_MA, weights_MA, chosen_MA, weights = arrays()
  widths = {"gate": F, "up": F, "down": D}
  biases = {name: jnp.asarray(RANDOM.normal(size=(E, width)), jnp.float32) for name, width in widths.items()}
  weights = Weights(weights.matrices, biases, "swiglu_clipped")

  def of(function):
    loss = lambda x_MD, weights_MA, weights: jnp.sum(  # noqa: E731
      jnp.sin(function(x_MD, experts_MA, weights_MA, chosen_MA, weights))
    )
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x_MD, weights_MA, weights)

  got, expected = of(_of_few_tokens), of(_by_rows)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
