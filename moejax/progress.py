"""Where a long operation reports how far it has come, handed down by the caller."""


class Progress:
  """Reports that nobody sees. `moejax.display.Display` shows them on a terminal; a notebook may pass its own."""

  def stage(self, name: str, total: float | None = None) -> None:
    """A new stage begins; `total` is in the units of `advance`, None where it is not known."""

  def advance(self, completed: float, facts: str = "") -> None:
    """The current stage has come this far; `facts` are its latest figures."""

  def whole(self, done_s: float, left_s: float | None) -> None:
    """Seconds of work done and left in the whole operation, None where they are not known yet."""

  def note(self, text: str) -> None:
    """One line that should stay visible, such as a warning."""


SILENT = Progress()
"""The default of functions that take a Progress."""
