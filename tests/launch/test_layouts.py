"""Training on several processes is the same training: batches, losses and parameters, whatever the mesh."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from layouts import cases
from started import LAUNCH, read_losses, train

LAYOUTS = pathlib.Path(__file__).with_name("layouts.py")


def run(*command: str, timeout_s: float = 900.0) -> str:
  """What a command prints, which must succeed."""
  done = subprocess.run([*command], capture_output=True, text=True, timeout=timeout_s, check=False)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout + done.stderr


def trained(processes: int, text: pathlib.Path, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """What layouts.py finds on 8 devices of so many processes."""
  options = ("--processes", str(processes), "--devices-per-process", str(8 // processes), "--")
  out = folder / f"{processes}.npz"
  run(*LAUNCH, *options, sys.executable, str(LAYOUTS), str(text), str(folder / f"corpus-{processes}"), str(out))
  with np.load(out) as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def of_one_process(text, tmp_path_factory):
  return trained(1, text, tmp_path_factory.mktemp("one"))


@pytest.mark.nightly  # minutes for each
@pytest.mark.parametrize("processes", [2, 4])
def test_losses_and_parameters_are_those_of_one_process_and_batches_have_the_same_bits(
  text, tmp_path, of_one_process, processes
):
  found = trained(processes, text, tmp_path)
  assert found.keys() == of_one_process.keys()
  assert {"/".join(name.split("/")[:2]) for name in found} == cases().keys()
  for name, expected in of_one_process.items():
    if name.endswith("/batches"):
      np.testing.assert_array_equal(found[name], expected, name)
    else:
      np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-4, err_msg=name)
  for case in cases():
    losses = found[f"{case}/losses"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0], case


def cut(of: pathlib.Path, to: pathlib.Path, step: int) -> None:
  """A copy of a run as it was after a step, but for the lines of later steps, which a resumed run removes."""
  shutil.copytree(of, to)
  for path in (to / "checkpoints").iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  for name in ("summary.json", "held_out.npz"):
    (to / name).unlink()


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_resumes_in_another_and_the_loss_goes_on(text, tmp_path):
  """8 devices of two processes, 4 of one, 4 of two, on other meshes each time."""
  straight, second, third = (tmp_path / name for name in ("straight", "second", "third"))

  def train_on(processes: int, devices: int, directory: pathlib.Path, *mesh: str) -> None:
    options = ("--training.steps", "6", "--training.checkpoints.keep-last", "3", *mesh)
    launch = (*LAUNCH, "--processes", str(processes), "--devices-per-process", str(devices), "--")
    run(*launch, *train(text, directory, "sparse", *options))

  train_on(2, 4, straight, "--mesh.data", "8")
  cut(straight, second, 2)
  train_on(1, 4, second, "--mesh.data", "2", "--mesh.expert", "2")
  cut(second, third, 4)
  train_on(2, 2, third, "--mesh.data", "1", "--mesh.model", "4")
  losses, expected = read_losses(third), read_losses(straight)
  assert len(losses) == 6 and expected[-1] < expected[0]
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert losses != expected, "the later steps are those of the other run"
  with np.load(third / "held_out.npz") as mine, np.load(straight / "held_out.npz") as other:
    np.testing.assert_array_equal(mine["targets"], other["targets"])
    np.testing.assert_allclose(mine["nats"], other["nats"], rtol=1e-4)
