"""What happens to the other processes of a program when one is told to stop, dies or hangs. Each fault is real."""

import json
import pathlib
import shutil
import signal
import sys
import time

import pytest
from started import EXPERIMENTS, read_losses, started, steps_done, train, wait_until

BOUND_S = 20.0
"""MOEJAX_HANG_TIMEOUT_S of the processes that `started` starts."""

ENDLESS = ("--training.steps", "100000", "--training.checkpoints.every", "100000")


def saved(directory: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
  "told",
  [
    pytest.param([0], id="the first", marks=pytest.mark.nightly),
    pytest.param([1], id="the second", marks=pytest.mark.slow),
    pytest.param([0, 1], id="all", marks=pytest.mark.nightly),
  ],
)
def test_a_preemption_of_any_process_saves_one_step_of_all_and_ends_all_with_75(text, tmp_path, told):
  directory = tmp_path / "run"
  with started(2, 1, train(text, directory, "dense", *ENDLESS), tmp_path) as both:
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


@pytest.mark.parametrize(
  "victim", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.nightly)]
)
def test_the_death_of_a_process_ends_the_other_with_a_message_that_names_it(text, tmp_path, victim):
  directory = tmp_path / "run"
  with started(2, 1, train(text, directory, "dense", *ENDLESS), tmp_path) as both:
    wait_until(lambda: steps_done(directory) >= 2, both)
    begin = time.monotonic()
    both[victim].send(signal.SIGKILL)
    other = both[1 - victim]
    assert other.wait(BOUND_S) == 1
    assert time.monotonic() - begin < BOUND_S
  last = other.output.splitlines()[-1]
  assert last.startswith(f"moejax: process {victim} (host ") and f"pid {both[victim].popen.pid}" in last, other.output
  assert "it ended without a message" in last


@pytest.mark.parametrize(
  "victim", [pytest.param(0, marks=pytest.mark.nightly), pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_process_that_hangs_ends_the_other_within_the_bound_and_is_named(text, tmp_path, victim):
  directory = tmp_path / "run"
  with started(2, 1, train(text, directory, "dense", *ENDLESS), tmp_path, MOEJAX_HANG_TIMEOUT_S="5") as both:
    wait_until(lambda: steps_done(directory) >= 2, both)
    both[victim].send(signal.SIGSTOP)
    other = both[1 - victim]
    assert other.wait(5 + 15) == 1
  assert f"moejax: process {victim} (host " in other.output and "has not responded for 5 s" in other.output


def arrays(directory: pathlib.Path, step: int) -> dict[str, str]:
  """The checksums of a checkpoint's arrays."""
  return json.loads((directory / "checkpoints" / str(step) / "progress" / "metadata").read_text())["arrays"]


@pytest.mark.slow
def test_damage_that_one_process_finds_makes_all_use_the_checkpoint_before_and_the_end_is_the_same(
  run_of_two, tmp_path
):
  (straight, command, _), damaged = run_of_two, tmp_path / "damaged"
  shutil.copytree(straight, damaged)
  (damaged / "summary.json").unlink()
  newest = damaged / "checkpoints" / "4"
  for path in newest.glob("state/ocdbt.process_1/d/*"):  # some files, and parts of a file, are not needed
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
  command = [str(damaged) if word == str(straight) else word for word in command]
  with started(2, 2, command, tmp_path) as both:
    assert [process.wait() for process in both] == [0, 0], both[0].output + both[1].output
  said = [f"the checkpoint {newest} is damaged" in process.output for process in both]
  assert said == [True, False], both[0].output + both[1].output
  assert newest.with_name("damaged-4").is_dir() and "step 2 is used instead" in both[0].output
  assert arrays(damaged, 4) == arrays(straight, 4) and read_losses(damaged) == read_losses(straight)


LATE = """
import os, time
from moejax.__main__ import command
from moejax.training import {module} as late
function = late.{function}
def sleep(*arguments):
  time.sleep(40 * int(os.environ["JAX_PROCESS_ID"]))
  late.{function} = function
  return function(*arguments)
late.{function} = sleep
command()
"""


@pytest.mark.nightly
@pytest.mark.parametrize(
  ("verb", "late"),
  [
    ("train", {"module": "prepare", "function": "make_train_step"}),
    ("compare", {"module": "state", "function": "TrainSpec.init_state"}),
  ],
)
def test_a_process_that_compiles_for_longer_than_collective_operations_wait_is_waited_for(text, tmp_path, verb, late):
  directory = tmp_path / "run"
  words = train(text, directory, "dense")[3:]
  if verb == "compare":
    words = ["compare", f"{EXPERIMENTS}:suite", *words[2:]]
  with started(2, 2, [sys.executable, "-c", LATE.format(**late), *words], tmp_path) as both:
    assert [process.wait(400) for process in both] == [0, 0], both[0].output + both[1].output
  assert len(read_losses(directory if verb == "train" else directory / "runs" / "dense")) == 4
