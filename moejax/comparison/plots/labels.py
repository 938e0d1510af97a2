"""Labels beside points, such that none covers another, a marker, a line or the edge."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

ANGLES = np.deg2rad([0, 180, 90, 270, 35, 145, 325, 215, 60, 120, 300, 240])
DISTANCES = (9.0, 15.0, 24.0, 36.0, 52.0)
"""Points from the marker's center to the label's nearest edge."""
MARKER = 8.0
"""Points from a marker's center that no label may cover."""
GAP = 2.0
"""Points between two labels."""


def place(
  axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], lines: Sequence[np.ndarray] = ()
) -> list[Annotation]:
  """Writes each text beside its point (data coordinates); `lines` [points, 2] are drawn lines to keep clear of.

  The figure's layout is frozen as it is now, since where things are decides what is free.
  """
  figure = axes.figure
  assert isinstance(figure, Figure)
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  scale = figure.dpi / 72
  anchors = axes.transData.transform(np.asarray(points, dtype=float)) / scale
  notes = [
    axes.annotate(text, point, xytext=(0, 0), textcoords="offset points", ha="center", va="center", fontsize=9)
    for text, point in zip(texts, points, strict=True)
  ]
  sizes = [np.array(note.get_window_extent().size) / scale for note in notes]
  bounds = np.array(axes.get_window_extent().extents) / scale
  on_lines = [_between(axes.transData.transform(line) / scale) for line in lines]
  clear = np.concatenate(on_lines) if on_lines else np.zeros((0, 2))
  centers = _arrange(anchors, sizes, bounds, clear)
  for note, anchor, center, size in zip(notes, anchors, centers, sizes, strict=True):
    note.set_position(tuple(center - anchor))
    if _distance(_box(center, size), anchor) > DISTANCES[1] + 1:
      _leader(axes, anchor * scale, _nearest(_box(center, size), anchor) * scale)
  return notes


def overlap(one: np.ndarray, other: np.ndarray) -> float:
  """Area that two boxes (left, bottom, right, top) share."""
  width = min(one[2], other[2]) - max(one[0], other[0])
  height = min(one[3], other[3]) - max(one[1], other[1])
  return max(0.0, width) * max(0.0, height)


def _arrange(anchors: np.ndarray, sizes: Sequence[np.ndarray], bounds: np.ndarray, clear: np.ndarray) -> np.ndarray:
  """Center of each label: the cheapest of its candidates, chosen in turn until no change helps."""
  candidates = [_candidates(anchor, size) for anchor, size in zip(anchors, sizes, strict=True)]
  fixed = [
    [_cost(_box(center, size), rank, i, anchors, bounds, clear) for rank, center in enumerate(options)]
    for i, (options, size) in enumerate(zip(candidates, sizes, strict=True))
  ]
  chosen = [int(np.argmin(costs)) for costs in fixed]
  for _ in range(4):
    for i, size in enumerate(sizes):
      others = [_box(candidates[j][chosen[j]], sizes[j] + GAP) for j in range(len(sizes)) if j != i]
      costs = [
        cost + 10.0 * sum(overlap(_box(center, size), other) for other in others)
        for cost, center in zip(fixed[i], candidates[i], strict=True)
      ]
      chosen[i] = int(np.argmin(costs))
  return np.array([options[best] for options, best in zip(candidates, chosen, strict=True)]).reshape(-1, 2)


def _candidates(anchor: np.ndarray, size: np.ndarray) -> list[np.ndarray]:
  """Centers around the anchor, nearest first."""
  centers = []
  for distance in DISTANCES:
    for angle in ANGLES:
      direction = np.array([np.cos(angle), np.sin(angle)])
      # Above and below, the label's half height counts; beside, its half width.
      reach = np.where(np.abs(direction) < 0.3, 0.0, size / 2) * np.sign(direction)
      centers.append(anchor + direction * distance + reach)
  return centers


def _cost(box: np.ndarray, rank: int, own: int, anchors: np.ndarray, bounds: np.ndarray, clear: np.ndarray) -> float:
  outside = np.maximum(bounds[:2] - box[:2], 0).sum() + np.maximum(box[2:] - bounds[2:], 0).sum()
  covered = sum(overlap(box, np.concatenate([anchor - MARKER, anchor + MARKER])) for anchor in anchors)
  crossed = ((clear > box[:2] - 1) & (clear < box[2:] + 1)).all(axis=1).sum()
  # A label that is nearer to another marker than to its own would be read as that one's.
  away = np.array([_distance(box, anchor) for anchor in anchors])
  confused = np.maximum(1.3 * away[own] + 4 - np.delete(away, own), 0).sum()
  end = _nearest(box, anchors[own])
  leader = anchors[own] + (end - anchors[own]) * np.linspace(0.3, 1, 12)[:, None]
  cut = len(clear) > 0 and np.abs(clear[:, None] - leader).max(axis=2).min() < 2.5
  return 1000.0 * outside + 10.0 * covered + 25.0 * crossed + 30.0 * confused + 60.0 * cut + 1.5 * rank


def _box(center: np.ndarray, size: np.ndarray) -> np.ndarray:
  return np.concatenate([center - size / 2, center + size / 2])


def _nearest(box: np.ndarray, point: np.ndarray) -> np.ndarray:
  return np.clip(point, box[:2], box[2:])


def _distance(box: np.ndarray, point: np.ndarray) -> float:
  return float(np.hypot(*(_nearest(box, point) - point)))


def _leader(axes: Axes, start: np.ndarray, end: np.ndarray) -> None:
  (x0, y0), (x1, y1) = axes.transData.inverted().transform([start + 0.3 * (end - start), end])
  axes.plot([x0, x1], [y0, y1], color="#8b939c", linewidth=0.7, zorder=2, scalex=False, scaley=False)


def _between(line: np.ndarray) -> np.ndarray:
  """Points every 3 along a polyline."""
  pieces = [line[:1]]
  for start, end in itertools.pairwise(line):
    steps = max(1, int(np.hypot(*(end - start)) / 3))
    pieces.append(start + (end - start) * np.linspace(0, 1, steps + 1)[1:, None])
  return np.concatenate(pieces)
