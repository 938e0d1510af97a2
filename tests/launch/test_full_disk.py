"""What happens when one of several processes, or all of them, cannot write a checkpoint. The limit on the size of their
files is that of the operating system."""

import pathlib
import re
import resource

import pytest
from started import Started, started, train, wait_until

LIMIT = 100_000
"""Bytes of a file: logs and metrics of this run are shorter, and the part of each process in a checkpoint is longer."""

LARGER = ("--model.d-model", "64", "--model.d-ff", "256")
OFTEN = ("--training.steps", "80", "--training.checkpoints.every", "5", "--training.log-every", "20")


def limit(processes: list[Started], size: int) -> None:
  """How long the files of some processes may become from now on."""
  for process in processes:
    hard = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (size, hard))


def newest(directory: pathlib.Path) -> int:
  """Step of the newest checkpoint, 0 if there is none."""
  folders = (directory / "checkpoints").glob("*")
  return max((int(path.name) for path in folders if path.name.isdigit()), default=0)


def warned(process: Started) -> list[tuple[int, int]]:
  """Steps whose checkpoints could not be saved, and the process that could not."""
  found = re.findall(r"checkpoint of step (\d+) could not be saved: process (\d) \(host .*ulimit -f", process.output)
  return [(int(step), int(index)) for step, index in found]


@pytest.mark.nightly
def test_training_continues_while_any_process_cannot_write_and_an_unsaved_last_step_is_an_error(text, tmp_path):
  directory = tmp_path / "run"
  command = train(text, directory, "dense", *LARGER, *OFTEN)
  with started(2, 4, command, tmp_path) as both:
    wait_until(lambda: newest(directory) > 0, both)
    for victims in ([0], [1], [0, 1]):
      limit([both[index] for index in victims], LIMIT)
      before, kept = len(warned(both[0])), newest(directory)
      wait_until(lambda: len(warned(both[0])) > before, both)  # noqa: B023  # it is called before the next turn
      step, index = warned(both[0])[before]
      assert index == victims[0] and newest(directory) in (kept, step - 5), both[0].output
      limit(both, resource.RLIM_INFINITY)
    wait_until(lambda: newest(directory) > step, both)
    limit([both[1]], LIMIT)
    assert [process.wait() for process in both] == [1, 1], both[0].output + both[1].output
  kept = newest(directory)
  assert f"the last checkpoint (step 80) could not be saved in {directory}/checkpoints" in both[0].output
  assert step < kept < 80 and f"the same command, which resumes from step {kept}" in both[0].output
  with started(2, 4, command, tmp_path) as both:
    assert [process.wait() for process in both] == [0, 0], both[0].output
  assert newest(directory) == 80 and not list((directory / "checkpoints").glob("*tmp*"))
