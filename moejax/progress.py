"""Where a long operation reports how far it has come, handed down by the caller."""

import contextlib


class Progress:
  """Reports that nobody sees. `moejax.display.Display` shows them on a terminal; a notebook may pass its own."""

  def stage(self, name: str, total: float | None = None, line_every: int | None = None) -> None:
    """A new stage begins.

    Args:
      name: what runs now.
      total: in the units of `advance`, None where it is not known.
      line_every: in a log, a line each time the stage has advanced to a multiple of this; None leaves it to the log.
    """

  def advance(self, completed: float, facts: str = "") -> None:
    """The current stage has come this far; `facts` are its latest figures."""

  def aside(self) -> contextlib.AbstractContextManager[None]:
    """A context for nested stages; the current stage continues after them."""
    return contextlib.nullcontext()

  def whole(self, done_s: float, left_s: float | None) -> None:
    """Seconds of work done and left in the whole operation, None where they are not known yet."""

  def note(self, text: str) -> None:
    """One line that should stay visible, such as a warning."""


SILENT = Progress()
"""The default of functions that take a Progress."""


def training_facts(
  loss: float, tokens_per_s: float | None = None, mfu: float | None = None, dropped: float | None = None
) -> str:
  """Loss and speed as a stage of training shows them; MFU and the fraction of choices that was dropped, where known."""
  facts = [f"loss {loss:.3f}"]
  if tokens_per_s is not None:
    facts.append(f"{tokens_per_s:,.0f} tokens/s")
  if mfu is not None:
    facts.append(f"MFU {mfu:.1%}")
  if dropped is not None:
    facts.append(f"dropped {dropped:.1%}")
  return "  ".join(facts)
