"""The fraction of a run that was spent on steps that count."""

import pytest

from moejax.training.goodput import Goodput


def test_lost_seconds_of_each_cause_count_once():
  goodput = Goodput({"skipped_s": 2.0, "evaluation_s": 1.0})
  for cause, seconds in (("evaluation_s", 4.0), ("repeated_s", 5.0), ("skipped_s", 1.0)):
    goodput.add(cause, seconds)
  found = goodput.summary(20.0)  # in which are the skipped steps
  assert found.pop("fraction") == pytest.approx((20 - 3) / (20 + 10))
  assert found == {"skipped_s": 3.0, "evaluation_s": 5.0, "repeated_s": 5.0}
  assert Goodput({}).summary(3.0) == {"fraction": 1.0}
