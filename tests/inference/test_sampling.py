"""Which tokens may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.inference.sampling import GREEDY, Sampling, sample

PROBS_V = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


def drawn(sampling, vocab_size=5, rows=4000):
  """Share of each token among many draws."""
  logits_BV = jnp.broadcast_to(jnp.log(PROBS_V).astype(jnp.float32), (rows, 5))
  tokens_B = sample(logits_BV, jax.random.split(jax.random.key(0), rows), sampling, vocab_size)
  return np.bincount(tokens_B, minlength=5) / rows


@pytest.mark.parametrize(
  "sampling, allowed",
  [
    (Sampling(temperature=1.0), [0, 1, 2, 3, 4]),
    (Sampling(temperature=1.0, top_k=2), [1, 3]),
    (Sampling(temperature=1.0, top_p=0.69), [1, 3]),  # 0.4 + 0.3 reaches it
    (Sampling(temperature=1.0, top_p=0.71), [1, 3, 4]),
    (Sampling(temperature=1.0, top_k=3, top_p=0.9), [1, 3, 4]),  # 0.4 + 0.3 of 0.85 is 0.82
    (Sampling(temperature=1.0, min_p=0.3), [1, 3, 4]),  # 0.3 x 0.4 is 0.12
    (Sampling(temperature=1.0, min_p=1.0), [1]),
    (Sampling(temperature=1.0, min_p=0.3, top_k=2), [1, 3]),
    (Sampling(temperature=1.0, top_k=10**12, top_p=1.0, min_p=0.0), [0, 1, 2, 3, 4]),
    (Sampling(temperature=1.0, top_p=1e-9), [1]),
    (Sampling(temperature=1e-9), [1]),
    (Sampling(temperature=1e-30, top_p=0.9, min_p=0.1), [1]),
    (GREEDY, [1]),
  ],
)
def test_the_allowed_tokens_are_drawn_by_their_probability(sampling, allowed):
  expected_V = np.where(np.isin(np.arange(5), allowed), PROBS_V, 0.0)
  # 4000 draws: a share errs by 0.008.
  np.testing.assert_allclose(drawn(sampling), expected_V / expected_V.sum(), atol=0.03)


def test_temperature_sharpens():
  np.testing.assert_allclose(drawn(Sampling(temperature=0.5)), PROBS_V**2 / np.sum(PROBS_V**2), atol=0.03)


def test_the_hottest_temperature_draws_every_token_of_the_tokenizer_alike():
  np.testing.assert_allclose(drawn(Sampling(temperature=1e30), vocab_size=4), [0.25] * 4 + [0.0], atol=0.03)


def test_a_top_p_of_1_keeps_tokens_whose_probability_is_below_the_rounding_of_sums():
  V = 5000
  probs_V = np.full(V, 1.0)
  probs_V[-1] = 1e-4
  logits_BV = jnp.log(jnp.broadcast_to(jnp.asarray(probs_V / probs_V.sum(), jnp.float32), (2, V)))
  keys_B = jax.random.split(jax.random.key(0), 2)
  all_B, of_1_B = (sample(logits_BV, keys_B, Sampling(temperature=1.0, top_p=p), V) for p in (None, 1.0))
  np.testing.assert_array_equal(all_B, of_1_B)


def test_an_id_beyond_the_tokenizers_is_never_chosen():
  assert drawn(Sampling(temperature=1.0), vocab_size=2)[2:].sum() == 0
  assert drawn(GREEDY, vocab_size=1)[0] == 1


@pytest.mark.parametrize(
  "fields",
  [
    {"temperature": -1.0}, {"temperature": 1e-40}, {"temperature": 1e31}, {"temperature": float("nan")},
    {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 1.5},
    {"min_p": float("nan")}, {"top_k": 5, "temperature": 0.0}, {"min_p": 0.1, "temperature": 0.0},
  ],
  ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused(fields):
  with pytest.raises(UserError, match=next(iter(fields))):
    Sampling(**{"temperature": 1.0, **fields})
