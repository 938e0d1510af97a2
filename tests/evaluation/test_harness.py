"""Benchmarks of a trained run: local data, what is kept, the harness's results, and mistakes."""
# ruff: noqa: E402  # what is not installed is skipped before it is imported

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
from harness_fixtures import SPARSE, write_benchmarks
from training_fixtures import spec_of

from moejax import cli
from moejax.config import Checkpoints
from moejax.data.tokenizers import ByteTokenizer
from moejax.display import Display
from moejax.errors import UserError
from moejax.evaluation import harness
from moejax.evaluation.harness import Request, TaskEvaluators, evaluate_run
from moejax.evaluation.tasks import headlines, requested_benchmarks
from moejax.training.checkpoint import Checkpointer
from moejax.training.run_directory import claim

pytestmark = pytest.mark.slow  # a minute, and the extra `eval` takes another to install

SOME = ("arc_easy", "triviaqa", "webqs", "wikitext", "mmlu_anatomy")


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch):
  monkeypatch.setenv("DISABLE_MULTIPROC", "1")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A sparse byte model, saved after step 2, that was asked one example of each task on its way."""
  directory = tmp_path_factory.mktemp("run")
  claim(directory, dataclasses.replace(SPARSE, evaluation=dataclasses.replace(SPARSE.evaluation, task_limit=1)), 2)
  checkpointer = Checkpointer(directory / "checkpoints", SPARSE.training.checkpoints)
  checkpointer.save(spec_of(SPARSE).init_state(0), 2, {})
  checkpointer.close()
  return directory


class Watching(Display):
  """Counts what is computed."""

  def __init__(self):
    super().__init__("test", Console(quiet=True))
    self.computed = 0

  def advance(self, completed, facts=""):
    super().advance(completed, facts)
    self.computed += not facts and completed > 0


def ask(run, data, *tasks, display=None, **fields):
  request = Request(tasks=tasks, data=data, **{"allow_cut_prompts": True} | fields)
  results = evaluate_run(run, SPARSE, request, display or Watching())
  return results, headlines(results, requested_benchmarks(results))


def test_each_kind_of_request_is_answered_and_the_results_are_the_harnesss(run, data):
  results, scores = ask(run, data, *SOME)
  assert results == json.loads((run / "results.json").read_text())
  assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config"} <= set(results)
  assert [results["n-shot"][name] for name in SOME] == [0, 1, 1, 0, 0]
  assert {name: n["effective"] for name, n in results["n-samples"].items()} == {
    "arc_easy": 6, "triviaqa": 4, "webqs": 2, "wikitext": 2, "mmlu_anatomy": 3,
  }  # fmt: skip
  assert results["config"]["step"] == 2 and results["config"]["experiment"] == "byte_moe"
  assert 0 <= scores["arc_easy"].value <= 1 and scores["arc_easy"].stderr >= 0
  # A model that has learnt nothing spreads its belief over 264 tokens, and a word has about 5 of them.
  assert 264**3 < scores["wikitext"].value < 264**8


def test_what_is_answered_is_not_computed_again_and_a_stopped_evaluation_goes_on(run, data, tmp_path):
  one, two = Watching(), Watching()
  answers = run / "evaluation" / "answers_2.jsonl"
  answers.unlink(missing_ok=True)
  results, _ = ask(run, data, "arc_easy", "wikitext", display=one)
  lines = answers.read_text().splitlines(keepends=True)
  assert one.computed == len(lines) == 6 * 4 + 2
  # As a kill in the middle of the tenth answer leaves it.
  answers.write_text("".join(lines[:9]) + lines[9][:20])
  again, _ = ask(run, data, "arc_easy", "wikitext", display=two)
  assert two.computed == len(lines) - 9
  assert again["results"] == results["results"]


def test_examples_and_shots_are_as_asked(run, data):
  results, _ = ask(run, data, "arc_easy", "webqs", limit=1, few_shot=0)
  assert results["n-shot"] == {"arc_easy": 0, "webqs": 0}
  assert [n["effective"] for n in results["n-samples"].values()] == [1, 1]


@pytest.mark.parametrize("limit, examples", [(["--limit", "2"], 2), ([], 6)])
def test_the_command_prints_a_line_for_each_benchmark(run, data, capsys, limit, examples):
  words = ["evaluate", str(run), "--tasks", "arc_easy", "webqs", "--data", str(data), *limit]
  fields = ["--mesh.data", "2", "--evaluation.batch-size", "8"]
  with pytest.raises(SystemExit) as stopped:
    cli.main([*words, *fields])
  assert stopped.value.code == 2
  assert "allow truncation with --evaluation.allow-cut-prompts True" in capsys.readouterr().err
  with pytest.raises(SystemExit) as stopped:
    cli.main([*words, *fields, "--evaluation.allow-cut-prompts", "True"])
  out = capsys.readouterr().out
  assert stopped.value.code == 0
  rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
  assert rows["arc_easy"][0] == "acc,none" and rows["arc_easy"][-3:] == [str(examples), "0", "0"]
  assert rows["webqs"][0] == "exact_match,none" and rows["webqs"][-3:] == ["2", "1", "4/4"]


def test_the_command_evaluates_the_latest_the_best_or_a_given_checkpoint(run, data, tmp_path, capsys):
  directory = tmp_path / "run"
  shutil.copytree(run, directory)
  checkpointer = Checkpointer(directory / "checkpoints", Checkpoints(every=1, keep_last=3))
  for step in (4, 6):
    checkpointer.save(spec_of(SPARSE).init_state(step), step, {})
  checkpointer.close()
  lines = [{"step": step, "held_out/bits_per_byte": score} for step, score in ((2, 3.0), (4, 1.0), (6, 2.0))]
  (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  words = ["evaluate", str(directory), "--tasks", "wikitext", "--data", str(data), "--mesh.data", "1"]

  def evaluated(*options):
    with pytest.raises(SystemExit) as stopped:
      cli.main([*words, *options])
    return stopped.value.code, capsys.readouterr().err.splitlines()[-1:]

  scores = {}
  for options, step in (((), 6), (("--checkpoint", "latest"), 6), (("--checkpoint", "best"), 4),
                        (("--checkpoint", "2"), 2)):  # fmt: skip
    assert evaluated(*options)[0] == 0
    results = json.loads((directory / "results.json").read_text())
    assert results["config"]["step"] == step
    scores.setdefault(step, set()).add(results["results"]["wikitext"]["bits_per_byte,none"])
  assert all(len(of_step) == 1 for of_step in scores.values()) and len(set.union(*scores.values())) == 3
  for wrong, complaint in (("3", "no checkpoint of step 3; its checkpoints are 2, 4, 6"), ("first", "is not latest,")):
    code, (line,) = evaluated("--checkpoint", wrong)
    assert code == 2 and complaint in line
  (directory / "metrics.jsonl").unlink()
  code, (line,) = evaluated("--checkpoint", "best")
  assert code == 2 and "was evaluated (its checkpoints: 2, 4, 6)" in line


def test_what_does_not_fit_is_counted_by_task_whether_computed_or_known(run, data):
  results, _ = ask(run, data, "arc_easy", "webqs", "lambada_openai", "wikitext")
  known, _ = ask(run, data, "arc_easy", "webqs", "lambada_openai", "wikitext")
  assert (
    known["cut"]
    == results["cut"]
    == {
      "arc_easy": {"requests": 24, "cut": 0},
      "webqs": {"requests": 4, "cut": 4},  # with an example, which alone has 40 bytes
      "lambada_openai": {"requests": 3, "cut": 1},
      "wikitext": {"requests": 2, "cut": 0},  # scored in windows
    }
  )


@pytest.mark.parametrize("fields, fits", [({}, False), ({"few_shot": 0}, True), ({"allow_cut_prompts": True}, True)])
def test_a_benchmark_whose_few_shot_prompts_do_not_fit_is_refused_before_anything_is_asked(run, data, fields, fits):
  display = Watching()
  if fits:
    ask(run, data, "webqs", "arc_easy", **{"allow_cut_prompts": False} | fields)
    return
  with pytest.raises(UserError, match=r"webqs uses 1 examples .* 4 of the first 4 .* data\.sequence_length=64"):
    ask(run, data, "arc_easy", "webqs", allow_cut_prompts=False, display=display)
  assert not display.computed


def test_a_training_run_is_refused_before_it_begins_where_its_prompts_cannot_fit(data, tmp_path):
  evaluation = dataclasses.replace(SPARSE.evaluation, tasks=("webqs",), task_data=str(data))
  with pytest.raises(UserError, match=r"allow truncation with --evaluation\.allow-cut-prompts True"):
    TaskEvaluators()(spec_of(dataclasses.replace(SPARSE, evaluation=evaluation)), ByteTokenizer(), tmp_path, Watching())


def test_samples_are_written_with_prompts_and_answers_and_options_of_generation_replace_a_tasks_own(run, data, capsys):
  words = ["evaluate", str(run), "--tasks", "triviaqa", "arc_easy", "--data", str(data), "--mesh.data", "1"]
  options = ["--gen-kwargs", "max_gen_toks=3,num_beams=1", "--log-samples", "--evaluation.allow-cut-prompts", "True"]
  with pytest.raises(SystemExit) as stopped:
    cli.main([*words, *options])
  assert stopped.value.code == 0, capsys.readouterr().err
  folder = run / "evaluation" / "samples"
  samples = [json.loads(line) for line in (folder / "triviaqa.jsonl").read_text().splitlines()]
  assert len(samples) == 4 and len((folder / "arc_easy.jsonl").read_text().splitlines()) == 6
  assert all("Question:" in sample["arguments"][0][0] for sample in samples)
  # A byte model: at most three bytes.
  assert all(len(sample["resps"][0][0].encode(errors="ignore")) <= 9 for sample in samples)
  assert json.loads((run / "results.json").read_text())["config"]["gen_kwargs"]["max_gen_toks"] == 3


@pytest.mark.parametrize(
  "task, options, complaint",
  [
    ("triviaqa", "max_gen_toks", "'max_gen_toks' is not KEY=VALUE"),
    ("triviaqa", "num_beams=4", "the task triviaqa generates with num_beams=4"),
    ("arc_easy", "max_gen_toks=3", "would have no effect: no task generates"),
  ],
)
def test_options_of_generation_that_cannot_be_followed_are_one_line(run, data, capsys, task, options, complaint):
  words = ["evaluate", str(run), "--tasks", task, "--data", str(data), "--gen-kwargs", options]
  with pytest.raises(SystemExit) as stopped:
    cli.main([*words, "--mesh.data", "1"])
  assert stopped.value.code == 2 and complaint in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_names_no_benchmark_is_not_asked_all(run, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(["evaluate", str(run)])
  assert stopped.value.code == 2 and "give --tasks with a suite (core_en)" in capsys.readouterr().err


def test_standard_errors_without_a_formula_take_seconds(run, data):
  results, _ = ask(run, data, "lambada_openai")
  assert results["config"]["bootstrap_iters"] == 1000
  assert results["results"]["lambada_openai"]["perplexity_stderr,none"] > 0


def test_fewer_than_no_examples_are_refused():
  with pytest.raises(UserError, match="few_shot=-1 must be 0 or above"):
    Request(tasks=("arc_easy",), few_shot=-1)


def test_an_evaluator_of_the_loop_returns_the_headlines_of_the_state_it_is_given(data, monkeypatch, tmp_path):
  evaluation = dataclasses.replace(SPARSE.evaluation, tasks=("arc_easy",), task_data=str(data), task_limit=4)
  spec = spec_of(dataclasses.replace(SPARSE, evaluation=evaluation))
  evaluators, loaded = TaskEvaluators(), []
  load = harness.load_tasks
  monkeypatch.setattr(harness, "load_tasks", lambda request, *rest: loaded.append(request) or load(request, *rest))
  evaluator = evaluators(spec, ByteTokenizer(), tmp_path, Watching())
  states = [spec.init_state(seed) for seed in (0, 1)]
  states[1] = dataclasses.replace(states[1], step=states[1].step + 7)
  scores = [evaluator(state) for state in states]
  assert evaluator(states[0]) == scores[0]
  (tmp_path / "other").mkdir()  # of another run of the same command, which has the same tasks
  assert evaluators(spec, ByteTokenizer(), tmp_path / "other", Watching())(states[1]) == scores[1]
  assert len(loaded) == 1
  assert set(scores[0]) == {"arc_easy/acc", "arc_easy/acc_stderr", "average/accuracy", "average/accuracy_stderr"}
  assert json.loads((tmp_path / "results.json").read_text())["config"]["step"] == 0
  assert sorted(path.name for path in (tmp_path / "evaluation").glob("*.jsonl")) == [
    "answers_0.jsonl",
    "answers_7.jsonl",
  ]
