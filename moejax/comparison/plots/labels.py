"""Places labels beside points, such that none covers another label or a point."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.comparison.plots.figure import HEIGHT, WIDTH

CHARACTER, LINE = 6.3, 14.0
"""Width of a character and height of a line, in pixels."""
MARKER = 7.0
"""Pixels from the center of a point that no label may cover."""

Box = tuple[float, float, float, float]

PLACES = (
  # Offsets in pixels from the point, and the alignment of the text.
  (12, 0, "left"), (-12, 0, "right"), (0, -16, "center"), (0, 16, "center"), (10, -14, "left"), (10, 14, "left"),
  (-10, -14, "right"), (-10, 14, "right"), (0, -32, "center"), (0, 32, "center"), (12, -30, "left"), (12, 30, "left"),
  (-12, -30, "right"), (-12, 30, "right"), (0, -48, "center"), (0, 48, "center"),
)  # fmt: skip


def place(points: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, Any]]:
  """Offset and alignment of the label of each point. `points` are in pixels, with y downward."""
  taken: list[Box] = []
  placed = {}
  for name, point in points.items():
    others = [_around(other) for key, other in points.items() if key != name]
    boxes = [_box(point, name, option) for option in PLACES]
    costs = [
      sum(overlap(box, other) for other in (*taken, *others)) + 100 * _outside(box) + rank
      for rank, box in enumerate(boxes)
    ]
    best = costs.index(min(costs))
    taken.append(boxes[best])
    dx, dy, align = PLACES[best]
    placed[name] = {"dx": dx, "dy": dy, "align": align}
  return placed


def pixels(values: Sequence[float], size: float) -> list[float]:
  """Positions of numbers on an axis of `size` pixels, with a margin on both sides."""
  low, high = min(values), max(values)
  margin = 0.1 * size
  return [margin + (size - 2 * margin) * ((value - low) / (high - low) if high > low else 0.5) for value in values]


def overlap(one: Box, other: Box) -> float:
  """Area that two boxes (left, top, right, bottom) share."""
  width = min(one[2], other[2]) - max(one[0], other[0])
  height = min(one[3], other[3]) - max(one[1], other[1])
  return max(0.0, width) * max(0.0, height)


def _box(point: tuple[float, float], text: str, option: tuple[float, float, str]) -> Box:
  dx, dy, align = option
  width = CHARACTER * len(text)
  left = point[0] + dx - {"left": 0.0, "center": width / 2, "right": width}[align]
  return left, point[1] + dy - LINE / 2, left + width, point[1] + dy + LINE / 2


def _around(point: tuple[float, float]) -> Box:
  return point[0] - MARKER, point[1] - MARKER, point[0] + MARKER, point[1] + MARKER


def _outside(box: Box) -> float:
  return max(0.0, -box[0]) + max(0.0, box[2] - WIDTH) + max(0.0, -box[1]) + max(0.0, box[3] - HEIGHT)
