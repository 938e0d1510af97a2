"""Ctrl-C between two steps instead of within one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
  """A run was asked to stop, and everything up to the stop is saved."""


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
  """Yields a function that says whether SIGINT or SIGTERM came; a second SIGINT raises KeyboardInterrupt at once.

  A step gives its state's memory away, so an exception in the middle of one would leave nothing to save. Outside the
  main thread, where Python delivers no signals, nothing is deferred.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False
    return
  received: list[int] = []

  def note(number: int, frame: FrameType | None) -> None:
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(number)

  before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield lambda: bool(received)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
