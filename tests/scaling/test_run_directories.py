"""What the directories of finished runs must hold, so that a law can be fitted to them. Nothing is trained."""

import json

import numpy as np
import pytest

import moejax
from moejax.config.plain import to_plain
from moejax.errors import UserError
from moejax.evaluation.held_out import HeldOut
from moejax.scaling.finished_runs import read_runs


def make(directory, tokens=1e5, nats=300.0):
  """A finished run with 100 held-out targets."""
  directory.mkdir(parents=True)
  content = {"steps": 10, **to_plain(moejax.find("quick_small"))}
  (directory / "experiment.json").write_text(json.dumps(content))
  (directory / "summary.json").write_text(json.dumps({"name": directory.name, "tokens": tokens}))
  hundred = np.array([100.0])
  HeldOut(np.array([nats]), hundred, hundred, hundred).save(directory / "held_out.npz")
  return directory


def test_a_number_that_no_run_has_is_damage(tmp_path):
  (run,) = read_runs([make(tmp_path / "good")])
  assert run.loss == 3.0 and run.tokens == 1e5
  wrong = {
    "nan": {"nats": float("nan")}, "infinite": {"nats": float("inf")}, "negative": {"nats": -3.0},
    "no-tokens": {"tokens": None}, "backwards": {"tokens": -5}, "huge": {"tokens": 1e30}, "words": {"tokens": "many"},
  }  # fmt: skip
  for name, fields in wrong.items():
    with pytest.raises(UserError, match="is damaged") as error:
      read_runs([make(tmp_path / name, **fields)])
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_run_counts_once_and_an_upcycled_run_of_a_comparison_not_at_all(tmp_path):
  runs = [make(tmp_path / "runs" / name, nats=nats) for name, nats in (("dense", 300.0), ("moe", 290.0), ("up", 280.0))]
  (runs[2] / "upcycled.json").write_text(json.dumps({"parent": "dense"}))
  assert [run.loss for run in read_runs([tmp_path])] == [3.0, 2.9]
  for twice in ([runs[0], runs[0]], [tmp_path, runs[1]]):
    with pytest.raises(UserError, match="are the same run; give each run once"):
      read_runs(twice)
