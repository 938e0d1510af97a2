"""Candidates of a pair that start from its trained dense model."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from test_learning_rates import Watching

from moejax.comparison import fairness, run
from moejax.comparison.branches import branch
from moejax.comparison.budget import Allotment, allot
from moejax.comparison.match import match
from moejax.comparison.runs import make_runs
from moejax.config import (
  GroupedDispatch,
  Losses,
  Measurement,
  Mesh,
  MoE,
  Pair,
  Precision,
  TopKRouter,
  Upcycled,
  WarmupStableDecay,
)
from moejax.data.corpus import build_corpus
from moejax.data.mixture import training_mixture
from moejax.data.pipeline import batches_by_step
from moejax.data.text import open_text
from moejax.errors import UserError
from moejax.evaluation.evaluators import make_evaluators
from moejax.evaluation.held_out import BATCH_TYPES, make_scorer
from moejax.inference.load import load_run
from moejax.interrupts import Interrupted
from moejax.partitioning import make_partitioner, to_devices
from moejax.training.loop import rows_of_process
from moejax.training.run_directory import read_experiment
from moejax.training.state import make_train_spec


def upcycled_suite(tiny_suite, seeds=1, batch_size=8, **fields):
  """A dense member, an MoE from random parameters, and the same MoE, upcycled."""
  (pair,) = tiny_suite.pairs
  optimizer = dataclasses.replace(pair.dense.optimizer, schedule=WarmupStableDecay())
  dense = dataclasses.replace(pair.dense, optimizer=optimizer, mesh=Mesh(data=1))
  moe = MoE(
    num_experts=8, experts_per_token=4, d_ff=dense.model.d_ff // 2, dispatch=GroupedDispatch(),
    router=TopKRouter(renormalize=True, scale=2.0),
  )  # fmt: skip
  sparse = dataclasses.replace(
    dense,
    name="sparse",
    model=dataclasses.replace(dense.model, moe=moe),
    training=dataclasses.replace(dense.training, steps=None, losses=Losses(load_balance=0.01)),
  )
  training = dataclasses.replace(sparse.training, batch_size=batch_size)
  up = dataclasses.replace(sparse, name="up", training=training)
  fields = {"candidate": "up"} | fields
  pair = Pair(dense=dense, candidates=(sparse, up), seeds=seeds, upcycled=(Upcycled(**fields),))
  fraction = fields.get("parent_fraction", 0.5)
  return dataclasses.replace(
    tiny_suite,
    pairs=(pair,),
    tolerance=0.9,
    shorter_budgets=(fraction,) if fraction < 1 else (),
    measurement=Measurement(warmup_steps=2, rounds=2, steps_per_round=3),
  )


class Counter:
  def steps(self, experiment):
    return 100

  def tokens(self, experiment, steps):
    return 256 * steps


def budgets(suite) -> dict[str, Allotment]:
  times = dict.fromkeys((member.name for member in suite.members), 1.0)
  return {each.name: each for each in allot(suite, match(suite, times), times, Counter())}


@pytest.mark.parametrize(
  ("fields", "own", "parent", "steps"),
  [
    ({}, 50, "dense-at-0.5", 50),
    ({"parent_fraction": 0.25}, 75, "dense-at-0.25", 25),
    ({"count_parent": False}, 100, "dense-at-0.5", 50),
    ({"parent_fraction": 1.0, "count_parent": False}, 100, "dense", 100),
  ],
)
def test_the_time_of_a_parent_and_of_its_candidate_add_up_to_the_budget(tiny_suite, fields, own, parent, steps):
  suite = upcycled_suite(tiny_suite, seeds=2, batch_size=16, **fields)
  allotments = budgets(suite)
  assert {name: each.steps for name, each in allotments.items()} == {"dense": 100, "sparse": 100, "up": own}
  assert {each.budget_s for each in allotments.values()} == {100.0}
  placed = {member.name: member for member in suite.members}
  runs = make_runs(suite, list(allotments.values()), placed.__getitem__)
  assert list(runs) == ["dense", "dense-seed1", "sparse", "sparse-seed1", "up", "up-seed1"]
  found = [runs[name].parent for name in ("up", "up-seed1")]
  assert [each.experiment.name for each in found] == [parent, parent.replace("dense", "dense-seed1")]
  assert [each.steps for each in found] == [steps] * 2
  assert [each.batches(16) for each in found] == [-(-steps // 2)] * 2  # half as many, of twice the size
  assert all(runs[name].parent is None for name in list(runs)[:4])
  assert runs["up"].branches(suite) == [] and len(runs["dense"].branches(suite)) == len(suite.shorter_budgets)
  if suite.shorter_budgets:
    assert branch(runs["dense"].experiment, 100, suite.shorter_budgets[0]).experiment == found[0].experiment


def with_moe(suite, **fields):
  (pair,) = suite.pairs
  sparse, up = pair.candidates
  changed = dataclasses.replace(
    up, model=dataclasses.replace(up.model, moe=dataclasses.replace(up.model.moe, **fields))
  )
  return dataclasses.replace(pair, candidates=(sparse, changed))


def test_a_candidate_that_cannot_start_from_its_dense_model_is_refused_by_name(tiny_suite):
  suite = upcycled_suite(tiny_suite)
  wrong = {
    "experts have a capacity|with a capacity": {"dispatch": "einsum"},
    "sum to 2.*scale=2.0": {"router": TopKRouter(renormalize=True)},
    "num_experts": {"num_experts": 7},
    "experts_per_token": {"experts_per_token": 3},
    "num_shared_experts=1": {"num_shared_experts": 1},
    "model.moe.d_ff=7": {"d_ff": 7},
  }
  for message, fields in wrong.items():
    with pytest.raises(UserError, match=message) as error:
      with_moe(suite, **fields)
    assert "\n" not in str(error.value)
  (pair,) = suite.pairs
  deeper = dataclasses.replace(pair.candidates[1], model=dataclasses.replace(pair.candidates[1].model, num_layers=3))
  with pytest.raises(UserError, match="num_layers=3 must be that of the dense model, 2"):
    dataclasses.replace(pair, candidates=(pair.candidates[0], deeper))
  lower = dataclasses.replace(
    pair.candidates[1].model, compute_dtype="bfloat16", precision=Precision(experts="int8"), remat="layer_inputs"
  )
  dataclasses.replace(pair, candidates=(pair.candidates[0], dataclasses.replace(pair.candidates[1], model=lower)))
  for upcycled, message in (
    ((Upcycled(candidate="other"),), "'other' is not a candidate for 'dense'; its candidates are sparse, up"),
    ((Upcycled(candidate="up"), Upcycled(candidate="up")), "given 2 times"),
  ):
    with pytest.raises(UserError, match=message):
      dataclasses.replace(pair, upcycled=upcycled)
  for fields in ({"parent_fraction": 0.0}, {"parent_fraction": 1.0}, {"parent_fraction": 1.5}, {"noise": -1.0}):
    with pytest.raises(UserError):
      Upcycled(candidate="up", **fields)
  with pytest.raises(UserError, match=r"parent_fraction=0\.5 is not among shorter_budgets=\(\)"):
    dataclasses.replace(suite, shorter_budgets=())


def test_the_curve_of_a_candidate_begins_after_its_parent():
  relative = fairness.relative_curve(np.array([1.0, 50.0, 100.0]), np.array([4.0, 3.0, 2.0]))
  dense, own = fairness.curve([relative], [2.0], 100.0), fairness.curve([relative], [1.8], 50.0, before=50.0)
  assert own.x_Z[0] > 50 and own.end == 100.0
  found = fairness.equal(dense, own, 0.0)
  assert found.at == 100.0 and found.difference == pytest.approx(-0.2)
  apart = fairness.curve([relative], [1.8], 50.0)
  assert fairness.equal(dense, apart, 0.0).factor.value > found.factor.value


def first_loss_of_parent(directory: pathlib.Path, suite, corpus) -> float:
  """The loss of the parent of the candidate on the first batch that it was not trained on."""
  origin = json.loads((directory / "runs" / "up" / "upcycled.json").read_text())
  (up,) = suite.pairs[0].candidates
  partitioner = make_partitioner(up.mesh, up.rules, jax.devices()[:1])
  there = directory / "runs" / origin["parent"]
  parent = load_run(there, dataclasses.replace(read_experiment(there), mesh=up.mesh))
  assert parent.step == origin["parent_steps"]
  spec = make_train_spec(parent.experiment, partitioner)
  batch = batches_by_step(training_mixture(corpus, up.data), up.data, up.training.batch_size)[origin["first_batch"]]
  rows = rows_of_process(dataclasses.replace(spec, experiment=up))
  on_devices = to_devices({name: batch[name] for name in BATCH_TYPES}, partitioner.batch, rows)
  loss_BT, _ = make_scorer(spec)(parent.parameters, on_devices)
  return float(np.average(np.asarray(loss_BT), weights=batch["weights"]))


@pytest.mark.slow
def test_an_upcycled_candidate_starts_where_its_parent_ended_and_resumes(tiny_suite, tmp_path_factory, tmp_path):
  text = tmp_path_factory.mktemp("text")
  for i in range(40):
    (text / f"{i:02d}.txt").write_text(f"chapter {i}\n" + "it was the best of times, it was the worst of times; " * 20)
  suite = upcycled_suite(tiny_suite, batch_size=16)

  def changed(member):
    training = dataclasses.replace(member.training, steps=20 if member.name == "dense" else None)
    return dataclasses.replace(
      member, training=training, data=dataclasses.replace(member.data, train=(str(text),), validation_fraction=0.2)
    )

  (pair,) = suite.pairs
  pair = dataclasses.replace(pair, dense=changed(pair.dense), candidates=(changed(pair.candidates[1]),))
  suite = dataclasses.replace(suite, pairs=(pair,))

  def compare(display):
    return run.compare(suite, open_text(suite.members[0].data), tmp_path, make_evaluators, display).to_json()

  stop = Watching(stop=3, step=2)  # dense and its branch, and then the candidate
  with pytest.raises(Interrupted):
    compare(stop)
  assert stop.stages[-1][0].endswith("up") or any(name == "train up" for name, _ in stop.stages)
  result = compare(Watching())
  assert result["complete"]
  dense, up = result["members"]
  assert up["start"] == "upcycled from the dense model after 50 % of the budget, which counts"
  assert up["parent"] == "dense-at-0.5" and up["parent_counts"]
  parent = json.loads((tmp_path / "runs" / "dense-at-0.5" / "summary.json").read_text())
  assert up["parent_time_s"] == parent["train_time_s"] and up["parent_tokens"] == parent["tokens"]
  assert up["parent_flops"] == parent["tokens"] * dense["model_flops_per_token"]
  assert up["steps"] == int(0.5 * dense["budget_s"] / up["step_time_s"])
  against = next(each for each in result["pairs"][0]["candidates"] if each["moe"] == "up")
  whole = (up["train_time_s"] + parent["train_time_s"]) / dense["train_time_s"]
  assert against["whole_run_ratio"] == pytest.approx(whole) and against["start"] == up["start"]
  corpus = build_corpus(open_text(suite.members[0].data), tmp_path / "corpus")
  rows = [json.loads(line) for line in (tmp_path / "runs" / "up" / "metrics.jsonl").read_text().splitlines()]
  first = next(row for row in rows if row["step"] == 1)
  assert first["loss"] == pytest.approx(first_loss_of_parent(tmp_path, suite, corpus), rel=1e-5)
  page = (tmp_path / "report" / "index.html").read_text()
  assert up["start"] in page and "of its parent" in page

  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
  assert compare(Watching()) == result
  assert {path: path.stat().st_mtime_ns for path in before} == before
