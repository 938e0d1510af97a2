"""`moejax sparsity` on a tiny run that was trained with all experts."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_fixtures import spec_of, tiny

from moejax import cli
from moejax.config import Data, DenseRouter, Mesh, MoE
from moejax.config.parameters import parameter_counts
from moejax.training.checkpoint import Checkpointer
from moejax.training.run_directory import claim

pytestmark = pytest.mark.slow  # compiles several programs for each mode


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run with a checkpoint, of parameters as they are drawn, and its model."""
  tmp = tmp_path_factory.mktemp("sparsity")
  text = tmp / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"Document {i} counts to {i + 1}."}) + "\n" for i in range(200)))
  experiment = tiny(False, mesh=Mesh(data=1), data=Data(sequence_length=32, train=(str(text),)))
  moe = MoE(num_experts=8, experts_per_token=8, d_ff=16, router=DenseRouter(), dispatch="dense")
  experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe))
  claim(tmp / "run", experiment, 6)
  checkpointer = Checkpointer(tmp / "run" / "checkpoints", experiment.training.checkpoints)
  checkpointer.save(spec_of(experiment).init_state(5), 3, {"data": {}, "train_time_s": 1.0})
  checkpointer.close()
  return tmp / "run", experiment.model


def sparsity(*arguments):
  with pytest.raises(SystemExit) as stop:
    cli.main(["sparsity", *map(str, arguments), "--mesh.data", "1"])
  return stop.value.code


def test_each_mode_is_scored_counted_and_timed_and_the_sparsest_within_the_limit_is_named(trained, capsys):
  run, model = trained
  modes = ("threshold:0.0001", "top_k:2")
  assert sparsity(run, "--modes", *modes, "--max-increase", 1e-5, "--batch-sizes", 2, "--rounds", 1) == 0
  found = json.loads((run / "sparsity.json").read_text())
  everything, threshold, two = found["modes"]
  assert [row["mode"] for row in found["modes"]] == ["all", *modes]
  assert threshold["perplexity_increase"] == pytest.approx(0, abs=1e-5)
  assert everything["active_fraction"] == threshold["active_fraction"] == 1.0
  assert two["experts_per_token"] == [2.0, 2.0] and abs(two["perplexity_increase"]) > 1e-4
  fewer = dataclasses.replace(model, moe=dataclasses.replace(model.moe, experts_per_token=2, router="top_k"))
  assert two["parameters_active"] == parameter_counts(fewer).active
  assert all(row["tokens_per_s"]["2"] > 0 for row in found["modes"])
  assert found["chosen"] in ("all", *modes)
  out = capsys.readouterr().out
  assert "top_k:2" in out and "Fewest active parameters with a perplexity at most" in out


def test_other_text_is_scored_in_place_of_the_runs_own(trained, tmp_path):
  run, _ = trained
  other = tmp_path / "other.jsonl"
  other.write_text("".join(json.dumps({"text": "zzzz " * 20}) + "\n" for _ in range(20)))
  scores = []
  for options in ((), ("--data", other)):
    assert sparsity(run, "--modes", "top_k:4", "--batch-sizes", *options) == 0
    scores.append(json.loads((run / "sparsity.json").read_text())["modes"][0]["perplexity"])
  assert scores[0] != pytest.approx(scores[1], rel=1e-3)


def test_a_model_that_was_trained_otherwise_is_refused(tmp_path, capsys):
  claim(tmp_path / "run", tiny(True), 6)
  assert sparsity(tmp_path / "run") == 2
  assert "moejax sparsity is for models that were trained with router.kind='dense'" in capsys.readouterr().err
