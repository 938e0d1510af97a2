"""Formats numbers for readers: 6.44B parameters, 15.2 ms, 2.213 ± 0.004."""

import math

MISSING = "\N{EN DASH}"
"""The text for a missing number."""

Number = float | None
"""A number, or None if it is unknown."""


def count(value: Number) -> str:
  """Three significant digits and k, M, B or T: 6_442_450_944 is 6.44B."""
  if (text := _no_number(value)) is not None:
    return text
  assert value is not None
  rounded = float(f"{value:.3g}")
  for power, suffix in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
    if abs(rounded) >= 10**power:
      return _three_digits(rounded / 10**power) + suffix
  return f"{value:.3g}"


def whole(value: Number) -> str:
  """All digits with thousands separators: 1,280."""
  text = _no_number(value)
  return f"{value:,.0f}" if text is None else text


def duration(seconds: Number) -> str:
  """Three significant digits in a suitable unit: 15.2 ms, 83.1 s, 12.5 min, 5.00 h, 3.20 days."""
  if (text := _no_number(seconds)) is not None:
    return text
  assert seconds is not None
  value, unit = in_unit(seconds, time_unit(seconds)), time_unit(seconds)
  return f"{_three_digits(value)} {unit}"


SECONDS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}


def time_unit(seconds: float) -> str:
  """A suitable unit for `seconds`."""
  for unit, limit in (("µs", 9.995e-4), ("ms", 0.9995), ("s", 120.0), ("min", 7200.0), ("h", 172800.0)):
    if abs(seconds) < limit:
      return unit
  return "days"


def in_unit(seconds: float, unit: str) -> float:
  return seconds / SECONDS[unit]


def percent(value: Number, digits: int = 1) -> str:
  """0.413 is 41.3 %."""
  text = _no_number(value)
  return f"{100 * (value or 0):.{digits}f} %" if text is None else text


def ratio(value: Number) -> str:
  """Three decimals: 1.023."""
  text = _no_number(value)
  return f"{value:.3f}" if text is None else text


def interval(ends: tuple[Number, Number] | None) -> str:
  """Both ends with three decimals: 0.981 to 1.024."""
  return "interval unknown" if ends is None or None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"


def signed_interval(value: Number, ends: tuple[Number, Number] | None) -> str:
  """A difference and its interval with signs: +0.161 (+0.102 to +0.220)."""
  if (text := _no_number(value)) is not None:
    return text
  if ends is None or None in ends:
    return _minus(f"{value:+.3f} (interval unknown)")
  return _minus(f"{value:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})")


def _minus(text: str) -> str:
  return text.replace("-", "\N{MINUS SIGN}")


def with_stderr(value: Number, stderr: Number, *, scale: float = 1.0, unit: str = "", signed: bool = False) -> str:
  """Value ± standard error, with two digits of the error but at most four decimals of the unscaled value: 2.213 ±
  0.012."""
  if (text := _no_number(value)) is not None:
    return text
  assert value is not None
  digits = _decimals(stderr, scale)
  text = f"{value * scale:{'+' if signed else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")
  if stderr is not None:
    text += f" ± {stderr * scale:.{digits}f}"
  return f"{text} {unit}".strip()


def _no_number(value: Number) -> str | None:
  if value is None:
    return MISSING
  return None if math.isfinite(value) else "not finite"


def _three_digits(value: float) -> str:
  rounded = float(f"{value:.3g}")
  before_point = len(str(int(abs(rounded))))
  return f"{rounded:,.{max(0, 3 - before_point)}f}"


def _decimals(stderr: Number, scale: float) -> int:
  most = 4 - round(math.log10(scale))
  if stderr is None or not math.isfinite(stderr) or stderr <= 0:
    return most
  return min(most, max(0, 1 - math.floor(math.log10(stderr * scale))))
