"""`moejax prune` on a tiny run: the new run, its report, and what it refuses."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_fixtures import spec_of, tiny

import moejax
from moejax import cli
from moejax.config import Data, Mesh
from moejax.config.parameters import parameter_counts
from moejax.errors import UserError
from moejax.inference.load import load_run
from moejax.training.checkpoint import Checkpointer
from moejax.training.run_directory import claim, read_experiment

pytestmark = pytest.mark.slow  # compiles several programs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run with a checkpoint, of parameters as they are drawn."""
  tmp = tmp_path_factory.mktemp("prune")
  text = tmp / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"Document {i} counts to {i + 1}."}) + "\n" for i in range(200)))
  experiment = tiny(True, mesh=Mesh(data=1), data=Data(sequence_length=32, train=(str(text),)))
  claim(tmp / "run", experiment, 6)
  checkpointer = Checkpointer(tmp / "run" / "checkpoints", experiment.training.checkpoints)
  checkpointer.save(spec_of(experiment).init_state(5), 3, {"data": {}, "train_time_s": 1.0})
  checkpointer.close()
  return tmp / "run", text


def prune(*arguments):
  with pytest.raises(SystemExit) as stop:
    cli.main(["prune", *map(str, arguments)])
  return stop.value.code


def test_a_new_run_has_fewer_experts_and_a_report_of_both(trained, capsys):
  run, text = trained
  new = run.with_name("run_keep_6")
  assert prune(run, "--keep", 6, "--rounds", 1, "--calibration-tokens", 600, "--mesh.data", 1, "--data", text) == 0
  found = json.loads((new / "pruning.json").read_text())
  (layer,) = found["layers"]
  assert len(layer["kept"]) == 6 and 0 < layer["error"] < 1 and 0 < layer["skip_ratio"] < 1
  before, after = found["models"]
  assert after["parameters_total"] == parameter_counts(read_experiment(new).model).total < before["parameters_total"]
  assert after["parameters_bytes_per_device"] == 4 * after["parameters_total"]
  assert before["perplexity"] != after["perplexity"] and min(before["tokens_per_s"], after["tokens_per_s"]) > 0
  there, here = load_run(run), load_run(new)
  assert here.step == 0 and here.experiment.model.moe.num_experts == 6
  of_run, of_new = (loaded.parameters["layers"]["blocks"][1]["feed_forward"] for loaded in (there, here))
  np.testing.assert_array_equal(of_new["w_router_DE"], of_run["w_router_DE"][..., np.array(layer["kept"])])
  assert f"moejax train {new}/experiment.json" in capsys.readouterr().out
  assert prune(run, "--keep", 6) == 2 and "holds a run" in capsys.readouterr().err


def test_what_cannot_be_pruned_is_refused(trained, tmp_path, capsys):
  run, _ = trained
  assert prune(run, tmp_path / "new", "--keep", 8) == 2
  assert "--keep 8 must be between 1 and 7" in capsys.readouterr().err
  assert prune(run, tmp_path / "new") == 2 and "needs --keep N" in capsys.readouterr().err
  assert prune(run, tmp_path / "new", "--keep", 4, "--rounds", 0) == 2
  assert "--rounds 0 must be above 0" in capsys.readouterr().err
  other = read_experiment(run)
  with pytest.raises(UserError, match="with 6 experts; do not change it"):
    moejax.prune(run, tmp_path / "new", 6, experiment=dataclasses.replace(other, name="other"))
