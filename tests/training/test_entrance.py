"""What a command opens, checks, makes and compiles: each thing once, whoever needs it."""

import collections
import dataclasses
import pathlib
import pkgutil
import re
import sys

import pytest

import moejax
from moejax.comparison import run as comparison_run
from moejax.config import (
  AdamW,
  Data,
  Evaluation,
  Experiment,
  Losses,
  Measurement,
  Mesh,
  Model,
  MoE,
  Pair,
  Suite,
  Training,
)
from moejax.data.corpus import build_corpus
from moejax.data.sources import check_sources, source_parts
from moejax.data.tokenizers import make_tokenizer
from moejax.errors import UserError
from moejax.evaluation.held_out import make_scorer
from moejax.partitioning import make_partitioner
from moejax.training import run as training_run
from moejax.training.prepare import prepare
from moejax.training.run_directory import prepare_directory
from moejax.training.state import make_train_spec
from moejax.training.step import make_train_step

ROOT = pathlib.Path(__file__).parents[2]

COUNTED = {
  make_tokenizer: lambda name: name,
  check_sources: lambda data: data.train,
  source_parts: lambda source: source,
  build_corpus: lambda text, cache, *rest: cache,
  make_partitioner: lambda mesh, rules, devices: str(mesh),
  prepare_directory: lambda directory, *rest: directory,
  prepare: lambda workspace, name, progress: name,
  make_train_spec: lambda experiment, partitioner: experiment.name,
  make_train_step: lambda spec: spec.experiment.name,
  make_scorer: lambda spec: spec.experiment.name,
  training_run.run: lambda prepared, *rest: prepared.spec.experiment.name,
}
"""The functions that open, check, make and compile, and of what each call is."""


def replace_everywhere(monkeypatch, function, replacement) -> None:
  """Replaces a function in every file of ours that has it."""
  for name, module in list(sys.modules.items()):
    if name.startswith("moejax.") and vars(module).get(function.__name__) is function:
      monkeypatch.setattr(module, function.__name__, replacement)


@pytest.fixture
def calls(monkeypatch) -> dict[str, collections.Counter]:
  """Counts calls of the functions above."""
  counted = {function.__name__: collections.Counter() for function in COUNTED}

  def counting(function):
    def call(*arguments, **options):
      counted[function.__name__][COUNTED[function](*arguments, **options)] += 1
      return function(*arguments, **options)

    return call

  for function in COUNTED:
    replace_everywhere(monkeypatch, function, counting(function))
  return counted


@pytest.fixture
def dense(tmp_path) -> Experiment:
  for i in range(30):
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / f"{i}.txt").write_text(f"chapter {i}: " + "it was the best of times; " * 20)
  return Experiment(
    name="dense",
    model=Model(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, vocab_size=264),
    data=Data(sequence_length=32, train=(str(tmp_path / "text"),), validation_fraction=0.2),
    training=Training(batch_size=8, steps=6),
    optimizer=AdamW(learning_rate=1e-2),
    evaluation=Evaluation(batch_size=8, max_tokens=500),
    mesh=Mesh(data=1),
  )


def suite_of(dense: Experiment) -> Suite:
  """The dense experiment and two candidates, one of them on a mesh of its own."""
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=16, group_size=32)
  sparse = dataclasses.replace(
    dense,
    name="sparse",
    model=dataclasses.replace(dense.model, moe=moe),
    training=dataclasses.replace(dense.training, losses=Losses(load_balance=0.01)),
  )
  sharded = dataclasses.replace(sparse, name="sharded", mesh=Mesh(data=1, expert=2))
  return Suite(
    name="tiny",
    pairs=(Pair(dense=dense, candidates=(sparse, sharded)),),
    measurement=Measurement(warmup_steps=1, rounds=1, steps_per_round=2),
  )


def once(*names):
  return dict.fromkeys(names, 1)


def test_training_opens_makes_and_compiles_everything_once(dense, calls, tmp_path):
  directory, (text,) = tmp_path / "run", dense.data.train
  assert moejax.train(dense, directory).steps == 6
  of_experiment = dict.fromkeys(("prepare", "make_train_spec", "make_train_step", "make_scorer", "run"), once("dense"))
  assert calls == of_experiment | {
    "make_tokenizer": once("bytes"),
    "check_sources": once((text,)),
    "source_parts": once(text),
    "build_corpus": once(directory / "corpus"),
    "make_partitioner": once(str(dense.mesh)),
    "prepare_directory": once(directory),
  }


MISTAKES = {
  "tokenizer": ({"data.tokenizer": "gone.json"}, "data.tokenizer='gone.json' cannot be read"),
  "source": ({"data.train": ("gone.txt",)}, "data.train: 'gone.txt' does not exist"),
  "vocabulary": ({"model.vocab_size": 256}, "model.vocab_size=256 is less than the 259 tokens"),
  "mesh": ({"mesh.data": 16, "training.batch_size": 16, "evaluation.batch_size": 16}, "needs 16 devices"),
  "batch": ({"mesh.data": None, "training.batch_size": 12}, "is not divisible by the 8 shards"),
}


@pytest.mark.parametrize(("fields", "said"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_quick_to_check_is_refused_before_anything_is_read_or_compiled(
  dense, monkeypatch, tmp_path, fields, said
):
  for function in (build_corpus, make_train_spec):
    replace_everywhere(monkeypatch, function, lambda *arguments, of=function: pytest.fail(f"{of.__name__} is called"))
  wrong = moejax.replace(dense, **fields)
  suite = dataclasses.replace(suite_of(wrong), pairs=(Pair(dense=wrong, candidates=suite_of(wrong).members[1:2]),))
  for run in (lambda: moejax.train(wrong, tmp_path / "run"), lambda: moejax.compare(suite, tmp_path / "comparison")):
    with pytest.raises(UserError, match=re.escape(said)):
      run()
  written = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "text"]
  assert not written


def test_a_directory_in_the_text_is_refused_and_left_as_it_is(dense, tmp_path):
  (text,) = dense.data.train
  before = sorted(tmp_path.rglob("*"))
  for run in (lambda: moejax.train(dense, f"{text}/run"), lambda: moejax.compare(suite_of(dense), f"{text}/run")):
    with pytest.raises(UserError, match=r"directory .*/text/run is inside the source '.*/text', so its files"):
      run()
  assert sorted(tmp_path.rglob("*")) == before


def test_the_documented_way_of_a_step_is_the_one_that_training_takes(dense, monkeypatch, tmp_path):
  page = (ROOT / "docs" / "architecture.md").read_text().partition("## A training step")[2].partition("\n## ")[0]
  names = re.findall(r"`(moejax\.[\w.]+\.[a-z]\w*)`", page)
  way = [pkgutil.resolve_name(name) for name in names if not name.startswith(("moejax.api", "moejax.comparison"))]
  assert len(way) >= 7
  taken = []

  def noting(function):
    def call(*arguments, **options):
      taken.append(function)
      return function(*arguments, **options)

    return call

  for function in way:
    replace_everywhere(monkeypatch, function, noting(function))
  moejax.train(dense, tmp_path / "run")
  assert [function.__name__ for function in dict.fromkeys(taken)] == [function.__name__ for function in way]


@pytest.mark.slow
def test_a_comparison_opens_its_text_once_and_compiles_each_member_once(dense, calls, monkeypatch, tmp_path):
  measure = comparison_run.measure

  def equal_times(*arguments):
    """What was measured, but for the step times, of which those of a busy machine may exceed the whole budget."""
    return {
      name: [dataclasses.replace(turn, step_times_s=(1.0,) * len(turn.step_times_s)) for turn in turns]
      for name, turns in measure(*arguments).items()
    }

  monkeypatch.setattr(comparison_run, "measure", equal_times)
  whole = suite_of(dense)
  suite = dataclasses.replace(whole, pairs=(Pair(dense=dense, candidates=whole.members[2:]),))
  directory, (text,) = tmp_path / "comparison", dense.data.train
  members = moejax.compare(suite, directory).members
  assert [member.steps for member in members] == [6, 6]
  names = [member.name for member in members]
  assert names == ["dense", "sharded"]
  of_members = dict.fromkeys(("prepare", "make_train_spec", "make_train_step", "make_scorer", "run"), once(*names))
  assert calls == of_members | {
    "make_tokenizer": once("bytes"),
    "check_sources": once((text,)),
    "source_parts": once(text),
    "build_corpus": once(directory / "corpus"),
    "make_partitioner": once(str(dense.mesh), str(suite.members[-1].mesh)),
    "prepare_directory": once(directory, *(directory / "runs" / name for name in names)),
  }
