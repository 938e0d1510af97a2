"""Shorter budgets as branches of runs with a stable learning rate."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from test_learning_rates import Watching

from moejax.comparison import run
from moejax.comparison.branches import branch
from moejax.config import Measurement, WarmupStableDecay
from moejax.config.stored import read_experiment_file
from moejax.data.text import open_text
from moejax.errors import UserError
from moejax.evaluation.evaluators import make_evaluators
from moejax.evaluation.held_out import HeldOut
from moejax.interrupts import Interrupted
from moejax.overrides import override
from moejax.training.optimizers import learning_rate
from moejax.training.run import train_experiment


def with_schedule(experiment, **fields):
  optimizer = dataclasses.replace(experiment.optimizer, schedule=WarmupStableDecay(**fields))
  return dataclasses.replace(experiment, optimizer=optimizer)


def test_a_branch_has_the_learning_rates_of_the_whole_run_until_its_decay(tiny_dense):
  random = np.random.default_rng(0)
  for _ in range(60):
    whole = with_schedule(
      tiny_dense,
      warmup_fraction=float(random.choice([0.0, 0.01, random.uniform(0, 0.1)])),
      decay_fraction=float(random.uniform(0.05, 1.0)),
    )
    steps, fraction = int(random.integers(40, 3000)), float(random.uniform(0.2, 0.95))
    short = branch(whole, steps, fraction)
    own, rates = short.experiment, whole.optimizer
    assert short.steps == own.training.steps == round(fraction * steps)
    for step in range(short.begin):
      assert learning_rate(own.optimizer, step, short.steps) == learning_rate(rates, step, steps)
    schedule = rates.schedule
    warmup = schedule.warmup_steps(steps)
    assert own.optimizer.schedule.warmup_steps(short.steps) == warmup
    decay = schedule.decay_fraction * (short.steps - 1 - warmup)
    assert short.begin == pytest.approx(short.steps - decay, abs=2)


def test_a_budget_within_the_warmup_is_refused(tiny_dense):
  with pytest.raises(UserError, match=r"shorter_budgets=0\.1 is 10 steps of dense, but its warm-up has 20"):
    branch(with_schedule(tiny_dense, warmup_fraction=0.2), 100, 0.1)


def test_shorter_budgets_need_a_stable_learning_rate_and_lie_below_the_whole_one(tiny_suite):
  with pytest.raises(UserError, match="schedule of 'dense' is Cosine; use WarmupStableDecay"):
    override(tiny_suite, ["--shorter-budgets", "0.5"])
  for fraction in ("0", "1", "-0.5", "2"):
    with pytest.raises(UserError, match="must be above 0 and below 1"):
      override(tiny_suite, ["--optimizer.schedule", "WarmupStableDecay", "--shorter-budgets", fraction])


@pytest.mark.slow
def test_branches_equal_runs_of_their_budget_and_resume(tiny_suite, tmp_path_factory, tmp_path):
  text = tmp_path_factory.mktemp("text")
  for i in range(40):
    (text / f"{i:02d}.txt").write_text(f"chapter {i}\n" + "it was the best of times, it was the worst of times; " * 20)
  settings = ["--data.train", str(text), "--training.steps", "20", "--tolerance", "0.9"]
  settings += ["--optimizer.schedule", "WarmupStableDecay", "--shorter-budgets", "0.5"]
  suite = override(tiny_suite, settings)
  pairs = tuple(dataclasses.replace(pair, candidates=pair.candidates[:1]) for pair in suite.pairs)
  suite = dataclasses.replace(suite, pairs=pairs, measurement=Measurement(warmup_steps=2, rounds=2, steps_per_round=3))

  def compare(display):
    return run.compare(suite, open_text(suite.members[0].data), tmp_path, make_evaluators, display).to_json()

  with pytest.raises(Interrupted):
    compare(Watching(stop=2, step=9))  # in the branch of the dense member, which begins after step 8
  again = Watching()
  result = compare(again)
  assert "train dense" not in [name for name, _ in again.stages]
  assert result["complete"]
  for candidate in result["pairs"][0]["candidates"]:
    (shorter,) = candidate["shorter_budgets"]
    assert shorter["budget"] == 0.5 and shorter["bits_per_byte_difference"] is not None
  assert "Shorter budgets" in (tmp_path / "report" / "index.html").read_text()
  for name in ("dense-at-0.5", "sparse-at-0.5"):
    branched = tmp_path / "runs" / name
    experiment = read_experiment_file(branched / "experiment.json")
    alone = tmp_path / "alone" / name
    evaluators = functools.partial(make_evaluators)
    summary = train_experiment(experiment, open_text(experiment.data), alone, evaluators)
    there = json.loads((branched / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (there["steps"], there["tokens"])
    nats = [HeldOut.load(folder / "held_out.npz").nats for folder in (alone, branched)]
    np.testing.assert_allclose(*nats, rtol=1e-5)
    losses = []
    for folder in (alone, branched):
      rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
      losses.append({row["step"]: row["loss"] for row in rows if "loss" in row})
    common = sorted(losses[0].keys() & losses[1].keys())
    assert max(common) == there["steps"]
    np.testing.assert_allclose(*([series[step] for step in common] for series in losses), rtol=1e-5)
