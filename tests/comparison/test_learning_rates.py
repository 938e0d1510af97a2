"""Learning rates of the members of a comparison: trials, the choice, and what the report says of it."""

import dataclasses
import json
import os
import signal

import pytest
from rich.console import Console

from moejax.comparison import learning_rates, run
from moejax.comparison.learning_rates import Trial, chosen, method, read_tried, trials, try_rate
from moejax.comparison.record import Tried
from moejax.config import GivenLearningRates, LearningRateSweep, Measurement
from moejax.data.text import open_text
from moejax.display import Display
from moejax.errors import UserError
from moejax.evaluation.evaluators import make_evaluators
from moejax.interrupts import Interrupted
from moejax.overrides import override


def trial_of(tiny_suite, factor: float = 2.0, steps: int = 100) -> Trial:
  dense = tiny_suite.members[0]
  return trials(dense, LearningRateSweep(factors=(factor, 3.0), budget=0.1), steps)[0]


def write_losses(directory, losses: list[float]) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
  (directory / "metrics.jsonl").write_text("\n".join(lines))


def test_trials_differ_in_the_learning_rate_alone_and_last_for_a_part_of_the_budget(tiny_suite):
  dense = tiny_suite.members[0]
  rate = dense.optimizer.learning_rate
  found = trials(dense, LearningRateSweep(factors=(0.5, 1.0, 4.0), budget=0.1), 200)
  assert [trial.learning_rate for trial in found] == [0.5 * rate, rate, 4 * rate]
  assert {trial.steps for trial in found} == {20} == {trial.experiment.training.steps for trial in found}
  assert len({trial.folder for trial in found}) == 3
  (alike,) = {dataclasses.replace(trial.experiment, optimizer=dense.optimizer) for trial in found}
  training = dataclasses.replace(alike.training, steps=dense.training.steps, log_every=dense.training.log_every)
  assert dataclasses.replace(alike, training=training) == dense


def test_a_trial_is_scored_by_its_last_tenth_and_a_divergent_one_has_no_loss(tiny_suite, tmp_path):
  trial = trial_of(tiny_suite)
  assert trial.steps == 10
  write_losses(tmp_path / "a", [9.0] * 9 + [4.0])
  (tmp_path / "a" / "checkpoints").mkdir()
  try_rate(trial, tmp_path / "a", lambda: {"train_time_s": 2.5})
  assert read_tried(trial, tmp_path / "a") == Tried(
    learning_rate=trial.learning_rate, loss=4.0, steps=10, train_time_s=2.5
  )
  assert not (tmp_path / "a" / "checkpoints").exists()

  def diverge():
    raise FloatingPointError("the loss is NaN")

  write_losses(tmp_path / "b", [9.0] * 5)
  try_rate(trial, tmp_path / "b", diverge)
  assert read_tried(trial, tmp_path / "b") == Tried(learning_rate=trial.learning_rate, steps=10)


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"learning_rate": "fast", "steps": 10}', "\x00", "{"])
def test_a_damaged_result_is_made_again(tiny_suite, tmp_path, content):
  (tmp_path / learning_rates.RESULT).write_text(content)
  assert read_tried(trial_of(tiny_suite), tmp_path) is None


def test_the_result_of_another_rate_or_length_does_not_count(tiny_suite, tmp_path):
  trial = trial_of(tiny_suite)
  write_losses(tmp_path, [4.0] * 10)
  try_rate(trial, tmp_path, lambda: {"train_time_s": 1.0})
  assert read_tried(trial, tmp_path)
  assert read_tried(trial_of(tiny_suite, factor=4.0), tmp_path) is None
  assert read_tried(trial_of(tiny_suite, steps=200), tmp_path) is None


def test_the_lowest_loss_is_chosen_and_a_member_that_always_diverges_is_an_error():
  tried = [Tried(learning_rate=rate, loss=loss) for rate, loss in ((1e-3, 2.0), (2e-3, 1.5), (4e-3, None))]
  assert chosen("dense", tried) == 2e-3
  with pytest.raises(UserError, match=r"dense diverged with every learning rate of the sweep \(0\.004\)"):
    chosen("dense", tried[2:])


def test_every_suite_says_how_its_learning_rates_were_chosen(tiny_suite):
  assert "not tuned" in method(dataclasses.replace(tiny_suite, learning_rates=GivenLearningRates()))
  swept = method(dataclasses.replace(tiny_suite, learning_rates=LearningRateSweep()))
  assert "0.5, 1 and 2 times" in swept and "10 % of its budget" in swept


@pytest.mark.parametrize("fields", [{"factors": ()}, {"factors": (1.0,)}, {"factors": (1.0, 1.0)}, {"budget": 0.0},
                                    {"factors": (0.0, 1.0)}, {"factors": (-1.0, 1.0)}, {"budget": 1.5}])  # fmt: skip
def test_a_sweep_that_chooses_nothing_is_refused(fields):
  with pytest.raises(UserError, match=r"learning_rates\.(factors|budget)="):
    LearningRateSweep(**fields)


def test_the_command_line_sets_a_sweep(tiny_suite):
  found = override(tiny_suite, ["--learning-rates", "sweep", "--learning-rates.factors", "0.25", "4"])
  assert found.learning_rates == LearningRateSweep(factors=(0.25, 4.0))


class Watching(Display):
  """Notes every stage and note; sends Ctrl-C to this process at `step` of the `stop`-th stage of training."""

  def __init__(self, stop: int | None = None, step: int = 3):
    super().__init__("test", Console(quiet=True))
    self.notes, self.stages, self.stop, self.step = [], [], stop, step

  def note(self, text):
    self.notes.append(text)
    super().note(text)

  def stage(self, name, total=None, line_every=None):
    self.stages.append((name, total))
    super().stage(name, total, line_every)

  def advance(self, completed, facts=""):
    super().advance(completed, facts)
    trained = [name for name, _ in self.stages if name.startswith("train ")]
    if self.stop == len(trained) and self.stages[-1][0] == trained[-1] and completed == self.step:
      self.stop = None
      os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_comparison_trains_with_the_chosen_rates_and_resumes_a_sweep(tiny_suite, tmp_path_factory, tmp_path):
  text = tmp_path_factory.mktemp("text")
  for i in range(40):
    (text / f"{i:02d}.txt").write_text(f"chapter {i}\n" + "it was the best of times, it was the worst of times; " * 20)
  sweep = LearningRateSweep(factors=(1e-3, 1.0), budget=0.5)
  suite = override(tiny_suite, ["--data.train", str(text), "--training.steps", "20", "--tolerance", "0.9"])
  pairs = tuple(dataclasses.replace(pair, candidates=pair.candidates[:1]) for pair in suite.pairs)
  measurement = Measurement(warmup_steps=2, rounds=2, steps_per_round=3)
  suite = dataclasses.replace(suite, pairs=pairs, learning_rates=sweep, measurement=measurement)

  def compare(display):
    return run.compare(suite, open_text(suite.members[0].data), tmp_path, make_evaluators, display).to_json()

  with pytest.raises(Interrupted):
    compare(Watching(stop=2))
  done = tmp_path / "learning_rates" / "dense-x0.001" / learning_rates.RESULT
  before = done.stat().st_mtime_ns
  result = compare(Watching())
  assert done.stat().st_mtime_ns == before
  assert result["complete"] and "0.001 and 1 times" in result["learning_rates"]
  for member in result["members"]:
    tried = {each["learning_rate"]: each["loss"] for each in member["learning_rate_trials"]}
    assert len(tried) == 2 and member["learning_rate"] == max(tried) == min(tried, key=tried.get)
    experiment = json.loads((tmp_path / "runs" / member["name"] / "experiment.json").read_text())
    assert experiment["optimizer"]["learning_rate"] == member["learning_rate"]
  page = (tmp_path / "report" / "index.html").read_text()
  assert result["learning_rates"] in page and "A wider sweep" in page
  assert not list(tmp_path.glob("learning_rates/*/checkpoints"))
