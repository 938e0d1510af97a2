"""The interface to which long operations report their progress."""

import contextlib


class Progress:
  """A Progress without output. `moejax.display.Display` shows progress on a terminal, and notebooks may pass their
  own."""

  def stage(self, name: str, total: float | None = None, line_every: int | None = None) -> None:
    """Starts a new stage.

    Args:
      name: description of the stage.
      total: its length in the units of `advance`, or None if unknown.
      line_every: a log has a line for each multiple of this. None lets the log choose.
    """

  def advance(self, completed: float, facts: str = "") -> None:
    """Sets the position of the current stage. `facts` are its latest metrics."""

  def aside(self) -> contextlib.AbstractContextManager[None]:
    """A context for nested stages; the current stage continues after them."""
    return contextlib.nullcontext()

  def whole(self, done_s: float, left_s: float | None) -> None:
    """Sets the seconds done and left of the whole operation, or None while they are unknown."""

  def note(self, text: str) -> None:
    """Shows a line permanently, such as a warning."""


SILENT = Progress()
"""The default of functions that take a Progress."""


def training_facts(
  loss: float, tokens_per_s: float | None = None, mfu: float | None = None, dropped: float | None = None
) -> str:
  """Formats the metrics of a training stage: loss, speed and, if known, MFU and the fraction of dropped choices."""
  facts = [f"loss {loss:.3f}"]
  if tokens_per_s is not None:
    facts.append(f"{tokens_per_s:,.0f} tokens/s")
  if mfu is not None:
    facts.append(f"MFU {mfu:.1%}")
  if dropped is not None:
    facts.append(f"dropped {dropped:.1%}")
  return "  ".join(facts)
