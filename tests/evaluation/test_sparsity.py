"""`moejax sparsity` on a tiny run that was trained with all experts."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from harness_fixtures import write_benchmarks

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_fixtures import spec_of, tiny

import moejax
from moejax import cli
from moejax.config import Data, DenseRouter, Mesh, MoE
from moejax.config.parameters import parameter_counts
from moejax.errors import UserError
from moejax.evaluation.sparsity import experts_used
from moejax.models.moe.router_counts import EXPERTS, HEADS
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
  model = dataclasses.replace(experiment.model, num_kv_heads=2, attention_experts=4, moe=moe)
  experiment = dataclasses.replace(experiment, model=model)
  claim(tmp / "run", experiment, 6)
  checkpointer = Checkpointer(tmp / "run" / "checkpoints", experiment.training.checkpoints)
  checkpointer.save(spec_of(experiment).init_state(5), 3, {"data": {}, "train_time_s": 1.0})
  checkpointer.close()
  return tmp / "run", experiment.model


def sparsity(*arguments):
  with pytest.raises(SystemExit) as stop:
    cli.main(["sparsity", *map(str, arguments), "--mesh.data", "1"])
  return stop.value.code


def test_each_mode_is_scored_counted_and_timed_and_the_sparsest_within_the_limit_is_named(trained, tmp_path, capsys):
  run, model = trained
  modes = ("threshold:0.0001", "top_k:2", "threshold:1000")
  tasks = ("--tasks", "arc_easy", "lambada_openai", "--evaluation.task-data", write_benchmarks(tmp_path / "data"))
  speed = ("--batch-sizes", 2, "--rounds", 1)
  assert sparsity(run, "--modes", *modes, "--max-increase", 1e-5, *speed, *tasks) == 0
  found = json.loads((run / "sparsity.json").read_text())
  everything, threshold, two, best = found["modes"]
  assert [row["mode"] for row in found["modes"]] == ["all", *modes]
  assert threshold["perplexity_increase"] == pytest.approx(0, abs=1e-5)
  assert everything["active_fraction"] == threshold["active_fraction"] == 1.0
  assert two["experts_per_token"] == [2.0, 2.0] and abs(two["perplexity_increase"]) > 1e-4
  fewer = dataclasses.replace(model, moe=dataclasses.replace(model.moe, experts_per_token=2, router="top_k"))
  assert two["parameters_active"] == parameter_counts(fewer).active
  assert all(row["tokens_per_s"]["2"] > 0 for row in found["modes"])
  assert found["chosen"] in ("all", *modes)
  # Layers: with the low threshold all experts, with the high one the best in the feed-forward and none in attention.
  key = "attention_experts_above_threshold"
  assert threshold["experts_per_token"] == [8.0, 8.0] and threshold[key] == [4.0, 4.0]
  assert best["experts_per_token"] == [1.0, 1.0] and best[key] == [0.0, 0.0] and key not in two
  assert threshold["experts_per_token_stdev"] == threshold[f"{key}_stdev"] == [0.0, 0.0]
  # Benchmarks: the same scores as `moejax evaluate --sparse`, whose results lie beside them.
  assert threshold["tasks"] == pytest.approx(everything["tasks"])
  assert {"arc_easy/acc", "arc_easy/acc_stderr", "lambada_openai/acc", "average/accuracy"} <= {*two["tasks"]}
  results = json.loads((run / "sparse" / "top_k_2" / "results.json").read_text())["results"]
  assert two["tasks"]["arc_easy/acc"] == results["arc_easy"]["acc,none"]
  out = capsys.readouterr().out
  assert "top_k:2" in out and "Fewest active parameters with a perplexity at most" in out and "arc_easy/acc" in out
  assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in ("sparsity.png", "sparsity_layers.png"))


def test_the_experts_of_a_token_are_counted_over_tokens_and_not_over_padding():
  draws = np.random.default_rng(0)
  tokens_LOM = np.broadcast_to(draws.random((1, 2, 50)) < 0.8, (3, 2, 50)).astype(np.float32)
  choices_LOME = (draws.random((3, 2, 50, 8)) < 0.4) * tokens_LOM[..., None]
  probs_LOME = draws.dirichlet(np.ones(4), (3, 2, 50)) * tokens_LOM[..., None]
  counts = {
    EXPERTS: {"choices": choices_LOME, "tokens": tokens_LOM},
    HEADS: {"probs": probs_LOME, "tokens": tokens_LOM},
  }
  assert {*experts_used(counts, None)} == {EXPERTS}
  for kind, sums_3L in experts_used(counts, 0.48).items():
    for layer in range(3):
      real = tokens_LOM[layer] > 0
      above_XE = choices_LOME[layer][real] if kind == EXPERTS else probs_LOME[layer][real] > 0.48 / 4
      used_X = above_XE.sum(axis=-1)
      tokens, used, squares = np.asarray(sums_3L)[:, layer]
      assert tokens == real.sum() and used == used_X.sum()
      assert squares / tokens - (used / tokens) ** 2 == pytest.approx(used_X.var(), rel=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("--rounds", 0), "--rounds 0 must be 1 or above"),
    (("--batch-sizes", 1, 0), "--batch-sizes 0 must be 1 or above"),
    (("--batch-sizes", 4, 4), "--batch-sizes 4 4 names one twice"),
    (("--limit", 3), "--limit 3 has no effect without --tasks"),
    (("--max-increase", -0.1), "--max-increase -0.1 must be 0 or above"),
    (("--max-increase", "nan"), "--max-increase nan must be 0 or above"),
    (("--modes", "top_k:2", "top_k:2.0"), "modes top_k:2 top_k:2 name one twice"),
    (("--modes", "top_k:9"), "sparse mode top_k:9 is more than moe.num_experts=8"),
  ],
)
def test_wrong_options_are_refused_before_the_run_is_read(trained, options, message, capsys):
  assert sparsity(trained[0], *options) == 2
  assert message in capsys.readouterr().err


def test_other_text_is_scored_in_place_of_the_runs_own(trained, tmp_path):
  run, _ = trained
  other = tmp_path / "other.jsonl"
  other.write_text("".join(json.dumps({"text": "zzzz " * 20}) + "\n" for _ in range(20)))
  scores = []
  for options in ((), ("--data", other)):
    assert sparsity(run, "--modes", "top_k:4", "--batch-sizes", *options) == 0
    scores.append(json.loads((run / "sparsity.json").read_text())["modes"][0]["perplexity"])
  assert scores[0] != pytest.approx(scores[1], rel=1e-3)


def test_batch_sizes_that_the_devices_do_not_divide_are_measured(trained):
  run, _ = trained
  found = moejax.sparsity(run, ["top_k:2"], batch_sizes=[1, 3], rounds=1)
  assert all(set(row["tokens_per_s"]) == {"1", "3"} for row in found["modes"])


def test_a_model_that_was_trained_otherwise_is_refused(tmp_path, capsys):
  claim(tmp_path / "run", tiny(True), 6)
  assert sparsity(tmp_path / "run") == 2
  assert "moejax sparsity is for models that were trained with router.kind='dense'" in capsys.readouterr().err


def test_the_python_function_returns_what_it_writes(trained, tmp_path):
  run, _ = trained
  copy = tmp_path / "run"
  shutil.copytree(run, copy)
  found = moejax.sparsity(copy, ["top_k:2"], batch_sizes=[], max_increase=10.0)
  assert [row["mode"] for row in found["modes"]] == ["all", "top_k:2"] and found["chosen"] == "top_k:2"
  assert "tokens_per_s" not in found["modes"][0] and json.loads((copy / "sparsity.json").read_text()) == found
  with pytest.raises(UserError, match=r"^max_increase -1.0 must be 0 or above"):
    moejax.sparsity(copy, max_increase=-1.0)
