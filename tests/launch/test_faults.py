"""What happens to the other processes of a program when one is told to stop, dies or hangs. Each fault is real."""

import pathlib
import signal
import time

import pytest
from started import started, steps_done, train, wait_until

BOUND_S = 20.0
"""MOEJAX_HANG_TIMEOUT_S of the processes that `started` starts."""

ENDLESS = ("--training.steps", "100000", "--training.checkpoints.every", "100000")


def saved(directory: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("told", [[0], [1], [0, 1]], ids=["the first", "the second", "all"])
def test_a_preemption_of_any_process_saves_one_step_of_all_and_ends_all_with_75(text, tmp_path, told):
  directory = tmp_path / "run"
  with started(2, 4, train(text, directory, "dense", *ENDLESS), tmp_path) as both:
    wait_until(lambda: steps_done(directory) >= 2, both)
    for index in told:
      both[index].send(signal.SIGTERM)
    begin = time.monotonic()
    codes = [process.wait(60) for process in both]
    seconds = time.monotonic() - begin
  assert codes == [75, 75], both[0].output + both[1].output
  assert seconds < 30
  (step,) = saved(directory)
  assert all(f"the same command continues from step {step} of 100000" in process.output for process in both)
  assert not (directory / "lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_other_with_a_message_that_names_it(text, tmp_path, victim):
  directory = tmp_path / "run"
  with started(2, 4, train(text, directory, "dense", *ENDLESS), tmp_path) as both:
    wait_until(lambda: steps_done(directory) >= 2, both)
    begin = time.monotonic()
    both[victim].send(signal.SIGKILL)
    other = both[1 - victim]
    assert other.wait(BOUND_S) == 1
    assert time.monotonic() - begin < BOUND_S
  last = other.output.splitlines()[-1]
  assert last.startswith(f"moejax: process {victim} (host ") and f"pid {both[victim].popen.pid}" in last, other.output
  assert "it ended without a message" in last


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_ends_the_other_within_the_bound_and_is_named(text, tmp_path, victim):
  directory = tmp_path / "run"
  with started(2, 4, train(text, directory, "dense", *ENDLESS), tmp_path, MOEJAX_HANG_TIMEOUT_S="5") as both:
    wait_until(lambda: steps_done(directory) >= 2, both)
    both[victim].send(signal.SIGSTOP)
    other = both[1 - victim]
    assert other.wait(5 + 15) == 1
  assert f"moejax: process {victim} (host " in other.output and "has not responded for 5 s" in other.output
