"""Declarations of experiments: data, and nothing else. One dictionary lists them."""

from collections.abc import Callable

from experiments.quickstart import quick_large, quick_small, quickstart
from moejax.config import Experiment, Suite

EXPERIMENTS: dict[str, Callable[[], Experiment | Suite]] = {
  "quickstart": quickstart,
  "quick_small": quick_small,
  "quick_large": quick_large,
}
"""By the name that the command line knows; members of a suite are found by their own names too."""
