"""Lengths rounded up to a few, so that a program is compiled for each of those and not for each example."""

from collections.abc import Iterator, Sequence

SMALLEST = 16


def bucket(length: int) -> int:
  """The least of 16, 24, 32, 48, 64, 96, 128, ... that is not below `length`: at most half again as much."""
  size = SMALLEST
  while size < length:
    if size * 3 // 2 >= length:
      return size * 3 // 2
    size *= 2
  return size


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
  """Indices in batches of like length, the longest first: what does not fit in memory shows at once."""
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  for start in range(0, len(order), batch_size):
    yield order[start : start + batch_size]
