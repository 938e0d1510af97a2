"""A whole comparison of a tiny suite on real text: every stage, its files, and going on after a stop."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moejax.comparison import run
from moejax.comparison.measurements import Measurements, Program, Session, Turn
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
from moejax.config.plain import to_plain
from moejax.data.text import open_text
from moejax.display import Display
from moejax.errors import UserError
from moejax.evaluation.evaluators import make_evaluators
from moejax.interrupts import Interrupted

ROOT = Path(__file__).parents[2]

# A user's environment: without the simulated devices, quick compilation and cache that conftest.py sets for tests.
TESTS_OWN = ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION", "JAX_COMPILATION_CACHE_DIR")
USERS = {name: value for name, value in os.environ.items() if name not in TESTS_OWN}


def tiny_suite(text: Path) -> Suite:
  """One dense model and two candidates: some 40 steps each."""
  dense = Experiment(
    name="dense",
    model=Model(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, vocab_size=264),
    data=Data(sequence_length=32, train=(str(text),), validation_fraction=0.2),
    training=Training(batch_size=8, steps=40, log_every=5),
    optimizer=AdamW(learning_rate=1e-2),
    evaluation=Evaluation(batch_size=8, max_tokens=4000),
    mesh=Mesh(data=1),
  )

  def sparse(num_experts: int) -> Experiment:
    moe = MoE(num_experts=num_experts, experts_per_token=2, d_ff=16, group_size=32)
    return dataclasses.replace(
      dense,
      name=f"moe_{num_experts}e",
      model=dataclasses.replace(dense.model, moe=moe),
      training=dataclasses.replace(dense.training, steps=None, losses=Losses(load_balance=0.01)),
    )

  return Suite(
    name="tiny",
    pairs=(Pair(dense=dense, candidates=(sparse(4), sparse(8))),),
    tolerance=0.9,
    measurement=Measurement(warmup_steps=2, rounds=2, steps_per_round=3),
  )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(40):
    (folder / f"{i:02d}.txt").write_text(
      f"chapter {i}\n" + "it was the best of times, it was the worst of times; " * 20
    )
  return folder


def compare(suite: Suite, directory: Path, display: Display, ask=None) -> dict:
  """As `moejax.compare`, with benchmarks of the test's own."""
  evaluators = functools.partial(make_evaluators, tasks=ask)
  return run.compare(suite, open_text(suite.members[0].data), directory, evaluators, display).to_json()


def trained_steps(directory: Path) -> list[int]:
  """Steps that metrics.jsonl has a loss of, in the order of its lines."""
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def quiet() -> Display:
  return Display("test", Console(quiet=True))


class Watching(Display):
  """Notes every stage and where it began; sends Ctrl-C to this process at a step of a stage."""

  def __init__(self, stop_at: tuple[str, int] | None = None):
    super().__init__("test", Console(quiet=True))
    self.stages, self.first, self.stop_at = [], {}, stop_at

  def stage(self, name, total=None, line_every=None):
    self.stages.append(name)
    super().stage(name, total, line_every)

  def advance(self, completed, facts=""):
    self.first.setdefault(self._stage.name, completed)
    super().advance(completed, facts)
    if (self._stage.name, completed) == self.stop_at:
      os.kill(os.getpid(), signal.SIGINT)


@dataclasses.dataclass
class Resumed:
  """A comparison that was stopped while it trained its second member, and went on."""

  directory: Path
  measured: bytes
  """measurements.json when it was stopped."""
  dense_done: int
  """When the first member's summary had been written, in ns."""
  display: Watching
  """Of the second call."""
  asked: list[tuple]
  """What the benchmarks were asked for, by both calls."""
  result: dict


@pytest.fixture(scope="module")
def resumed(text, tmp_path_factory) -> Resumed:
  directory, asked = tmp_path_factory.mktemp("resumed"), []

  def ask(spec, tokenizer, directory, display):
    """Stands for the benchmarks, which are tested in tests/evaluation."""

    def score(state):
      asked.append((spec.experiment.name, directory, tokenizer.vocab_size, int(state.step)))
      return {"sciq/acc": 0.25, "sciq/acc_stderr": 0.125}

    return score

  with pytest.raises(Interrupted):
    compare(tiny_suite(text), directory, Watching(stop_at=("train moe_4e", 5)), ask)
  measured = (directory / "measurements.json").read_bytes()
  dense_done = (directory / "runs" / "dense" / "summary.json").stat().st_mtime_ns
  display = Watching()
  return Resumed(directory, measured, dense_done, display, asked, compare(tiny_suite(text), directory, display, ask))


@pytest.mark.slow
def test_a_suite_is_measured_matched_trained_evaluated_and_reported(resumed):
  result, directory, asked = resumed.result, resumed.directory, resumed.asked
  assert asked == [(m["name"], directory / "runs" / m["name"], 259, m["steps"]) for m in result["members"]]
  assert {(m["tasks/sciq/acc"], m["tasks/sciq/acc_stderr"]) for m in result["members"]} == {(0.25, 0.125)}
  assert result == json.loads((directory / "comparison.json").read_text())
  assert result["complete"] and [member["name"] for member in result["members"]] == ["dense", "moe_4e", "moe_8e"]
  dense, *candidates = result["members"]
  assert (dense["steps"], dense["kind"], dense["pair"]) == (40, "dense", "dense")
  assert dense["budget_s"] == pytest.approx(40 * dense["step_time_s"])
  for member in candidates:
    assert member["budget_s"] == dense["budget_s"]
    assert member["steps"] == int(dense["budget_s"] / member["step_time_s"])
    assert member["parameters_active"] < member["parameters_total"]
  for member in result["members"]:
    # Candidates get as many steps as their measured step time allows, and on a busy machine that may be very few.
    most = result["baselines"]["unigram_bits_per_byte"] if member is dense else math.inf
    assert 0 < member["bits_per_byte"] < most
    assert member["bits_per_byte_stderr"] > 0 and 0 < member["accuracy"] < 1
    steps = trained_steps(directory / "runs" / member["name"])
    assert steps[-1] == member["steps"]
    summary = json.loads((directory / "runs" / member["name"] / "summary.json").read_text())
    assert member["tokens"] == summary["tokens"] == member["tokens_per_step"] * member["steps"]
    assert 0 < member["tokens"] < member["steps"] * 8 * 32
    assert (member["dropped_fraction"] is None) == (member is dense)
  (pair,) = result["pairs"]
  # As `match` has it, nearest by factor: of 0.94 and 1.063 the second is nearer.
  factors = {member["name"]: member["step_time_s"] / dense["step_time_s"] for member in candidates}
  nearest = min(factors, key=lambda name: max(factors[name], 1 / factors[name]))
  assert pair["moe"] == nearest
  assert pair["bits_per_byte_difference"] == pytest.approx(
    next(m for m in candidates if m["name"] == pair["moe"])["bits_per_byte"] - dense["bits_per_byte"], abs=1e-6
  )
  assert result["finding"] and (directory / "report" / "index.html").read_text().count("moe_8e") > 2
  assert result["provenance"]["corpus"]["train_documents"] > 20


@pytest.mark.slow
def test_a_suite_that_trains_matched_members_alone_is_complete_without_the_others(text, tmp_path):
  suite = dataclasses.replace(tiny_suite(text), train="matched")
  step_times_s = {"dense": 1.0, "moe_4e": 2.0, "moe_8e": 4.0}
  turns = {name: [Turn((seconds,))] * 2 for name, seconds in step_times_s.items()}
  programs = {name: Program(compile_time_s=1.0, peak_flops=None) for name in turns}
  measured = Measurements(programs, (Session("before training", 1e9, turns),))
  (tmp_path / "measurements.json").write_text(json.dumps(measured.to_json()))
  result = compare(suite, tmp_path, quiet())
  assert result["complete"]
  dense, matched, other = result["members"]
  assert [member["steps"] for member in result["members"]] == [40, 20, 10]
  assert [member["matched"] for member in result["members"]] == [True, True, False]
  assert dense["bits_per_byte"] and matched["bits_per_byte"] and other["bits_per_byte"] is None
  assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["dense", "moe_4e"]
  (pair,) = result["pairs"]
  assert pair["moe"] == "moe_4e" and pair["bits_per_byte_difference"] is not None
  assert "Not trained in this comparison: moe_8e." in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.slow
def test_a_stopped_comparison_repeats_nothing_that_was_done(resumed):
  directory, display = resumed.directory, resumed.display
  assert resumed.result["complete"]
  before, after = (
    json.loads(text)["sessions"] for text in (resumed.measured, (directory / "measurements.json").read_text())
  )
  assert [session["moment"] for session in before] == ["before training", "after dense"]
  assert after[:2] == before and [session["moment"] for session in after[2:]] == ["after moe_4e", "after moe_8e"]
  assert (directory / "runs" / "dense" / "summary.json").stat().st_mtime_ns == resumed.dense_done
  assert "train dense" not in display.stages
  measured = [name for name in display.stages if name.startswith("measure")]
  assert measured == [f"measure step times again after {name}" for name in ("moe_4e", "moe_8e")]
  assert display.first["train moe_4e"] > 5


def test_a_directory_of_another_suite_is_refused(text, tmp_path):
  suite = tiny_suite(text)
  (tmp_path / "suite.json").write_text(json.dumps(to_plain(dataclasses.replace(suite, tolerance=0.5))))
  with pytest.raises(ValueError, match=r"tolerance is 0\.5 there and 0\.9 here"):
    compare(suite, tmp_path, quiet())


@pytest.mark.nightly
def test_the_quickstart_beats_counting_bigrams_and_pairs_both_scales(tmp_path):
  """The README's first command, whole."""
  command = [sys.executable, "-m", "moejax", "compare", "quickstart", "--workdir", tmp_path]
  done = subprocess.run(command, cwd=ROOT, env=USERS, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "comparison.json").read_text())
  assert result["complete"] and len(result["pairs"]) == 2 and len(result["members"]) == 5
  for member in result["members"]:
    assert member["bits_per_byte"] < result["baselines"]["bigram_bits_per_byte"] - 0.5
    assert member["accuracy"] > result["baselines"]["bigram_accuracy"] + 0.1
  assert result["finding"] in done.stdout.replace("\n", " ") or result["finding"][:40] in done.stdout


DAMAGES = {
  "truncated": lambda content: content[: len(content) // 2],
  "empty": lambda content: b"",
  "binary": lambda content: b"\x80\x00PK\xff" * 40,
  "text": lambda content: b"my notes\n",
  "null": lambda content: b"null\n",
  "list": lambda content: b"[[1, 2], {}]\n",
  "object": lambda content: b'{"steps": "many", "dense": {"step_time_s": "fast"}, "sha256": 7, "held_out": null}\n',
}
ALIKE = ("empty", "binary", "text", "list")
"""What readers refuse as they refuse a truncated file (tests/test_files.py, test_stages.py), or a null."""


def numbers(result: dict) -> dict:
  """What of a comparison must not change. Time that is lost changes, as a damaged summary is evaluated again."""
  kept = {name: result[name] for name in ("pairs", "baselines", "finding", "complete")}
  members = [{k: v for k, v in member.items() if not k.startswith("goodput/")} for member in result["members"]]
  return kept | {"members": members}


OF_CURVES = ("candidates", "bases", "notes", "verdict", "outcome")
"""Of a pair, what is read from the loss curves, or may rest on them."""


def without_curves(found: dict) -> dict:
  """What does not depend on metrics.jsonl, which cannot be made again."""
  pairs = [{key: value for key, value in pair.items() if key not in OF_CURVES} for pair in found["pairs"]]
  members = [{key: value for key, value in m.items() if not key.endswith("_trained")} for m in found["members"]]
  return found | {"pairs": pairs, "members": members, "finding": None}


@pytest.mark.parametrize(
  "damage", [pytest.param(name, marks=pytest.mark.nightly if name in ALIKE else pytest.mark.slow) for name in DAMAGES]
)
def test_a_damaged_file_is_made_again_or_named_and_changes_no_number(resumed, text, tmp_path, damage):
  """Of a whole comparison: those that may be named each alone, and the rest at once. Corpora and checkpoints have
  tests of their own."""
  directory = tmp_path / "copy"
  shutil.copytree(resumed.directory, directory)

  def ask(spec, tokenizer, directory, display):
    return lambda state: {"sciq/acc": 0.25, "sciq/acc_stderr": 0.125}

  folders = (directory, directory / "runs" / "dense")
  files = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
  may_be_named = {"measurements.json", "text.json", "suite.json", "experiment.json"}
  alone = [path for path in files if path.name in may_be_named]
  assert len(files) >= 9
  named = []
  metrics = [path for path in files if path.name == "metrics.jsonl"]
  for paths in (*([path] for path in alone), [path for path in files if path not in (*alone, *metrics)], metrics):
    kept = without_curves if paths == metrics else dict
    before = [path.read_bytes() for path in paths]
    for path, content in zip(paths, before, strict=True):
      path.write_bytes(DAMAGES[damage](content))
    try:
      found = numbers(compare(tiny_suite(text), directory, quiet(), ask))
      assert kept(found) == kept(numbers(resumed.result)), paths
    except UserError as error:
      assert "\n" not in str(error) and paths == [path for path in alone if str(path) in str(error)]
      named.append(paths[0].name)
    for path, content in zip(paths, before, strict=True):
      path.write_bytes(content)
  assert set(named) == may_be_named
