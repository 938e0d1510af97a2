"""Routers: what is refused, each in a line with the remedy."""

import pytest

from moejax.config import Router
from moejax.errors import UserError


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "random"}, r"router\.kind='random' is not one of top_k, top_p, expert_choice, dense$"),
    ({"scores": "tanh"}, r"router\.scores='tanh' is not one of softmax, sigmoid$"),
    ({"kind": "top_p"}, r"router\.threshold=None with router\.kind='top_p'; set it to a number above 0 and at most 1$"),
    ({"threshold": 0.5}, r"router\.threshold=0\.5 with router\.kind='top_k'; only top_p uses it; set it to None$"),
    ({"kind": "top_p", "threshold": 1.5}, r"router\.threshold=1\.5 must lie between 0\.0 and 1\.0$"),
    ({"kind": "top_p", "threshold": 0.0}, r"router\.threshold=0\.0 must be above 0$"),
    ({"groups_per_token": 2}, r"router\.groups_per_token=2 is more than router\.expert_groups=1; use at most 1$"),
    (
      {"kind": "dense", "renormalize": False, "bias_rate": 0.1},
      r"router\.bias_rate=0\.1 would have no effect with router\.kind='dense'; set it to 0\.0 or use top_k$",
    ),
    (
      {"kind": "top_p", "threshold": 0.5, "expert_groups": 2},
      r"router\.expert_groups=2 would have no effect with router\.kind='top_p'; set it to 1 or use top_k$",
    ),
    (
      {"kind": "expert_choice"},
      r"router\.renormalize=True with router\.kind='expert_choice', whose weights equal the scores; set it to False$",
    ),
    (
      {"kind": "dense", "renormalize": False, "scores": "sigmoid"},
      r"router\.kind='dense' weights experts by a softmax without noise; use scores softmax and gumbel 0$",
    ),
    ({"scale": 0.0}, r"router\.scale=0\.0 must be above 0$"),
    ({"jitter": 1.0}, r"router\.jitter=1\.0 must be 0 or above and below 1$"),
    ({"gumbel": -1.0}, r"router\.gumbel=-1\.0 must be 0 or above$"),
    ({"bias_rate": -1.0}, r"router\.bias_rate=-1\.0 must be 0 or above$"),
  ],
)
def test_what_cannot_be_meant_is_refused(fields, message):
  with pytest.raises(UserError, match=f"^{message}"):
    Router(**fields)


def test_only_jitter_and_gumbel_draw_random_numbers():
  assert not Router().is_noisy
  assert Router(jitter=0.1).is_noisy and Router(gumbel=1.0).is_noisy
