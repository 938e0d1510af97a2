"""Where a long operation reports how far it has come, handed down by the caller."""

import contextlib
from collections.abc import Iterator


class Progress:
  """Reports that nobody sees. `moejax.display.Display` shows them on a terminal; a notebook may pass its own."""

  def stage(self, name: str, total: float | None = None, line_every: int | None = None) -> None:
    """A new stage begins; `total` is in the units of `advance`, None where it is not known.

    A log has a line each time the stage has advanced to a multiple of `line_every`; None leaves it to the log.
    """

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Stages that run within the current one, which goes on after them."""
    yield

  def advance(self, completed: float, facts: str = "") -> None:
    """The current stage has come this far; `facts` are its latest figures."""

  def whole(self, done_s: float, left_s: float | None) -> None:
    """Seconds of work done and left in the whole operation, None where they are not known yet."""

  def note(self, text: str) -> None:
    """One line that should stay visible, such as a warning."""


SILENT = Progress()
"""The default of functions that take a Progress."""
