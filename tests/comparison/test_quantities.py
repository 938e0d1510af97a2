"""Numbers as text."""

import math

import pytest

from moejax.comparison.quantities import count, duration, percent, ratio, whole, with_stderr


@pytest.mark.parametrize(
  ("value", "text"),
  [(0, "0"), (999, "999"), (214_016, "214k"), (999_600, "1.00M"), (1_032_448, "1.03M"), (6_442_450_944, "6.44B"),
   (1.28e11, "128B"), (2e12, "2.00T"), (None, "\N{EN DASH}"), (math.inf, "not finite")],
)  # fmt: skip
def test_count(value, text):
  assert count(value) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.0000421, "42.1 µs"), (0.0152, "15.2 ms"), (0.99994, "1.00 s"), (1.0123, "1.01 s"), (83.14, "83.1 s"),
   (750, "12.5 min"), (30_967.2, "8.60 h"), (276_480, "3.20 days"), (None, "\N{EN DASH}")],
)  # fmt: skip
def test_duration(seconds, text):
  assert duration(seconds) == text


def test_estimate_shows_two_digits_of_the_error():
  assert with_stderr(2.24091, 0.01213) == "2.241 ± 0.012"
  assert with_stderr(0.78612, 0.00004) == "0.7861 ± 0.0000"
  assert with_stderr(0.5441, 0.0023, scale=100, unit="%") == "54.41 ± 0.23 %"
  assert with_stderr(-0.0703, 0.0041, signed=True) == "\N{MINUS SIGN}0.0703 ± 0.0041"
  assert with_stderr(0.0129, 0.0011, scale=100, unit="points", signed=True) == "+1.29 ± 0.11 points"
  assert with_stderr(4.61724, None) == "4.6172"
  assert with_stderr(None, 0.1) == "\N{EN DASH}"


def test_plain_numbers():
  assert whole(30_600) == "30,600"
  assert percent(0.4127) == "41.3 %"
  assert ratio(1.02041) == "1.020"
