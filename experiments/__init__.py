"""Declarations of experiments: data, and nothing else. One dictionary lists them."""

from collections.abc import Callable

from experiments.books_mini import books_mini, books_mini_dense
from experiments.quickstart import quick_large, quick_small, quickstart
from moejax.config import Experiment, Suite

EXPERIMENTS: dict[str, Callable[[], Experiment | Suite]] = {
  "quickstart": quickstart,
  "books_mini": books_mini,
  "books_mini_dense": books_mini_dense,
  "quick_small": quick_small,
  "quick_large": quick_large,
}
"""By the name that the command line knows; members of a suite are found by their own names too."""
