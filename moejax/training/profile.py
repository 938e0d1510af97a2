"""Traces a few training steps with `jax.profiler`, for XProf, TensorBoard and Perfetto."""

import contextlib
import dataclasses
import gzip
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from moejax import processes
from moejax.errors import UserError
from moejax.files import write_json, write_whole
from moejax.training.prepare import Prepared

FOLDER = "profile"
"""The directory in a run directory that holds the trace and the two files below."""

PROGRAM, STEPS = "program.txt.gz", "steps.json"
"""The compiled program as text, whose instructions the trace names, and which steps were traced."""

WARM_UP = 2
"""Steps before the first traced one. The first steps of a process are slower."""


def check_profile(traced: int, left: int, steps: int) -> None:
  """Raises UserError if fewer than `traced` steps can be traced in a run with `left` of its `steps` steps left."""
  if traced < 1:
    raise UserError(f"--profile={traced} must be at least 1")
  if left < traced + WARM_UP:
    raise UserError(
      f"--profile={traced} needs {traced + WARM_UP} training steps, the first {WARM_UP} of which are not traced, but "
      f"{left} of the {steps} steps of this run are left; use another --workdir or raise training.steps"
    )


@contextlib.contextmanager
def profiled(prepared: Prepared, directory: pathlib.Path, steps: int | None) -> Iterator[Prepared]:
  """A prepared run whose first steps after the warm-up are traced. Process 0 writes the trace of its devices.

  Args:
    prepared: the run.
    directory: of the run.
    steps: number of steps to trace. None traces nothing.
  """
  if steps is None or not processes.is_first():
    yield prepared
    return
  traced = _Traced(prepared, directory / FOLDER, steps)
  try:
    yield dataclasses.replace(prepared, step=traced)
  finally:
    traced.stop()


class _Traced:
  """A training step that counts its calls, and starts and stops the trace."""

  def __init__(self, prepared: Prepared, folder: pathlib.Path, steps: int):
    self._prepared, self._folder, self._steps = prepared, folder, steps
    self._calls = 0
    self._begin: float | None = None
    """When the trace started. None if there is none now."""

  def __call__(self, state: Any, batch: Any, learning_rate: Any) -> Any:
    if self._calls == WARM_UP:
      jax.block_until_ready(state)  # the steps before
      self._start()
    self._calls += 1
    state, metrics = self._prepared.step(state, batch, learning_rate)
    if self._calls == WARM_UP + self._steps and self._begin is not None:
      jax.block_until_ready((state, metrics))
      seconds = time.perf_counter() - self._begin
      self.stop()
      self._write(int(state.step), seconds)
    return state, metrics

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python calls would slow down the steps
    jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
    self._begin = time.perf_counter()

  def stop(self) -> None:
    """Writes the trace, if one has started."""
    if self._begin is not None:
      self._begin = None
      jax.profiler.stop_trace()

  def _write(self, last: int, seconds: float) -> None:
    step: Any = self._prepared.step
    write_whole(self._folder / PROGRAM, gzip.compress((step.as_text() or "").encode(), 6))
    first = last - self._steps + 1
    write_json(self._folder / STEPS, {"first_step": first, "steps": self._steps, "step_time_s": seconds / self._steps})
