"""Runs of `moejax train` are read with their size, tokens and held-out loss, and `moejax fit` fits them."""

import json

import numpy as np
import pytest

import moejax
from moejax import cli
from moejax.config import Evaluation, Experiment
from moejax.errors import UserError
from moejax.evaluation.held_out import HeldOut
from moejax.scaling.ensemble import fit_ensemble
from moejax.scaling.finished_runs import read_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Three dense runs and an MoE of different sizes."""
  folder = tmp_path_factory.mktemp("runs")
  for i in range(16):
    (folder / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(n * i) for n in range(60)))
  directories = []
  for name, layers, steps in (("quick_small", 1, 4), ("quick_small", 1, 8), ("quick_small", 2, 8),
                              ("quick_small_8e", 2, 8)):  # fmt: skip
    experiment = moejax.find(name)
    assert isinstance(experiment, Experiment)
    fields = {
      "data.train": (f"{folder}/*.txt",), "data.validation_fraction": 0.3, "data.sequence_length": 32,
      "evaluation": Evaluation(batch_size=8, max_tokens=512), "model.num_layers": layers, "training.batch_size": 8,
      "training.steps": steps, "mesh.data": 1,
    }  # fmt: skip
    directory = folder / f"{name}_{layers}_{steps}"
    moejax.train(moejax.replace(experiment, **fields), directory)
    directories.append(directory)
  return directories


def test_runs_have_the_loss_of_their_held_out_text_and_are_fitted(runs, tmp_path, capsys):
  found = read_runs(runs)
  for run, directory in zip(found, runs, strict=True):
    summary, held_out = json.loads((directory / "summary.json").read_text()), HeldOut.load(directory / "held_out.npz")
    assert run.tokens == summary["tokens"] and run.shape.is_dense == ("8e" not in directory.name)
    bits = run.loss * held_out.targets.sum() / held_out.text_bytes.sum() / np.log(2)
    assert bits == pytest.approx(summary["held_out/bits_per_byte"])
  with pytest.raises(SystemExit) as stopped:
    cli.main(["fit", *map(str, runs), "--json", f"{tmp_path}/fit.json", "--plot", f"{tmp_path}/fit.svg"])
  assert stopped.value.code == 0 and "joint: fitted to 4 runs" in capsys.readouterr().out
  stored = json.loads((tmp_path / "fit.json").read_text())
  assert stored["fits"][0]["error_nats"] < 0.5 and "<svg" in (tmp_path / "fit.svg").read_text()
  again = fit_ensemble(read_runs([tmp_path / "fit.json"]), replicates=2)
  assert again.fits[0].constants == pytest.approx(stored["fits"][0]["constants"])


def test_damaged_runs_and_runs_of_other_text_are_refused(runs, tmp_path):
  damaged = tmp_path / "damaged"
  damaged.mkdir()
  for name in ("experiment.json", "held_out.npz"):
    (damaged / name).write_bytes((runs[0] / name).read_bytes())
  (damaged / "summary.json").write_text("{")
  with pytest.raises(UserError, match=r"summary\.json is damaged"):
    read_runs([damaged])
  (damaged / "summary.json").write_bytes((runs[0] / "summary.json").read_bytes())
  held_out = HeldOut.load(runs[0] / "held_out.npz")
  HeldOut(held_out.nats, held_out.correct, held_out.targets, held_out.text_bytes + 1).save(damaged / "held_out.npz")
  with pytest.raises(UserError, match="were scored on different held-out text"):
    read_runs([runs[0], damaged])


def test_finished_runs_inform_a_decision_and_their_decoding_corrects_the_cost_of_serving(runs, tmp_path, capsys):
  words = ["decide", "quick_small", "quick_small_8e", "--topology", "v5e:2x4", "--days", "1", "--width", "1"]
  answers = {}
  for name, more in (("roofline", []), ("measured", ["--measure", str(runs[2]), str(runs[3])])):
    path = tmp_path / f"{name}.json"
    with pytest.raises(SystemExit) as stopped:
      cli.main([*words, "--runs", *map(str, runs), *more, "--json", str(path)])
    assert stopped.value.code == 0
    answers[name] = json.loads(path.read_text())
  assert {law["name"] for law in answers["roofline"]["laws"]} >= {"joint", "your runs (joint)"}
  measured = answers["measured"]["measured_decoding"]
  over = {("8e" in one["run"]): one["step_time_s"] / one["roofline_s"] for one in measured}
  moe = answers["measured"]["moe"]
  times = [answers[name]["serving"][moe]["step_time_s"] for name in ("measured", "roofline")]
  assert times[0] / times[1] == pytest.approx(over[True] / over[False])
  with pytest.raises(SystemExit) as stopped:
    cli.main([*words, "--measure", str(runs[2])])
  assert stopped.value.code == 2 and "--measure needs a dense and an MoE run" in capsys.readouterr().err
