"""Declarations of experiments: data, and nothing else. One dictionary lists them."""

from collections.abc import Callable

from experiments.quickstart import quickstart, quickstart_large, quickstart_small
from moejax.config import Experiment, Suite

EXPERIMENTS: dict[str, Callable[[], Experiment | Suite]] = {
  "quickstart": quickstart,
  "quickstart_small": quickstart_small,
  "quickstart_large": quickstart_large,
}
"""By the name that the command line knows; members of a suite are found by their own names too."""
