"""A run's parameters come back on any mesh, without the optimizer, and only as the model that was trained."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_fixtures import initial_state, spec_of, tiny

from moejax.config import Mesh
from moejax.errors import UserError
from moejax.inference.load import load_run
from moejax.training.checkpoint import Checkpointer
from moejax.training.run_directory import claim, read_experiment


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run that was saved after step 3 by two devices, and its state."""
  directory = tmp_path_factory.mktemp("run")
  experiment = tiny(True, mesh=Mesh(data=2))
  state = initial_state(experiment.model, experiment.optimizer, 5)
  state = jax.device_put(state, spec_of(experiment).shardings)
  claim(directory, experiment, 6)
  checkpointer = Checkpointer(directory / "checkpoints", experiment.training.checkpoints)
  checkpointer.save(state, 3, {"data": {}, "train_time_s": 1.0})
  checkpointer.close()
  return directory, experiment, jax.device_get(state.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(data=1), Mesh(data=2, expert=2, model=2)], ids=str)
def test_parameters_are_those_that_were_saved_whatever_the_mesh(saved, mesh):
  directory, experiment, parameters = saved
  loaded = load_run(directory, dataclasses.replace(experiment, mesh=mesh))
  assert loaded.step == 3 and loaded.model.partitioner.mesh.size == (mesh.size if mesh.data else 8)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.parameters), parameters)
  placed = jax.tree.map(lambda array: array.sharding, loaded.parameters)
  assert placed == loaded.model.shardings


def test_a_run_is_read_with_its_data_axis_open(saved):
  directory, experiment, _ = saved
  assert read_experiment(directory) == dataclasses.replace(experiment, mesh=Mesh())


def test_another_model_is_refused_by_the_field_in_which_it_differs(saved):
  directory, experiment, _ = saved
  other = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, d_ff=64))
  with pytest.raises(UserError, match=r"model\.d_ff is 32 there and 64 here.*can are .*model\.remat, .*mesh, rules"):
    load_run(directory, other)


def test_a_directory_without_a_run_or_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(UserError, match="does not exist; give a directory written by `moejax train`"):
    load_run(tmp_path)
  claim(tmp_path, tiny(False), 6)
  with pytest.raises(UserError, match="holds no checkpoint; train the run first"):
    load_run(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="holds no checkpoint; train the run first"):
    load_run(tmp_path)
  (tmp_path / "experiment.json").write_text('{"model": {}}')
  with pytest.raises(UserError, match=r"experiment\.json is not an experiment: name is missing"):
    load_run(tmp_path)
