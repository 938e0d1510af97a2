"""The files of docs/extending.md, as a user has them: they train, resume, plan, evaluate, generate and are compared."""

import json
import pathlib
import subprocess
import sys

import extending_files
import pytest

import moejax
from moejax import cli, lookup
from moejax.comparison.pod_match import experiment_file
from moejax.config import Evaluation, Experiment, Measurement, Mesh, Suite
from moejax.config.plain import from_plain, to_plain
from moejax.errors import UserError
from moejax.models.attentions import ATTENTIONS
from moejax.models.feed_forward import FEED_FORWARDS
from moejax.models.moe.dispatch import DISPATCHES
from moejax.models.moe.router import ROUTERS
from moejax.training.optimizers import OPTIMIZERS

TABLES = (ROUTERS, DISPATCHES, FEED_FORWARDS, ATTENTIONS, OPTIMIZERS)
KINDS = {"relu", "best_first", "low_rank", "Sgd"}
ALONE = ("relu_router.py:relu_moe", "best_first.py:best_first_moe", "low_rank.py:low_rank_small",
         "mean_attention.py:mean_small", "sgd.py:sgd_small",
         "sharded.py:sharded_moe")  # fmt: skip
"""The experiment of each file but the last, which has all of them."""


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
  """The current folder has the files; what they add to the tables goes when the tests are done."""
  before = [dict(table) for table in TABLES]
  with extending_files.written(tmp_path_factory.mktemp("mine")):
    texts = pathlib.Path("texts")
    texts.mkdir()
    for i in range(24):
      (texts / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(n * i) for n in range(40)))
    yield
  for table, content in zip(TABLES, before, strict=True):
    table.clear()
    table.update(content)


def found(name: str, data: int = 1) -> Experiment:
  """An experiment of the page, small, on two devices or on twice `data`."""
  made = moejax.find(name)
  assert isinstance(made, Experiment)
  return moejax.replace(made, **small(2), **{"mesh.data": data, "mesh.expert": 2})


def small(layers: int) -> dict:
  return {
    "model.num_layers": layers, "data.train": ("texts",), "data.validation_fraction": 0.3, "data.sequence_length": 32,
    "training.batch_size": 8, "training.steps": 4, "training.checkpoints.every": 2, "training.log_every": 1,
    "evaluation": Evaluation(batch_size=8, max_tokens=512),
  }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """mine.py:my_capacity_moe after two steps and, resumed, two more."""
  directory = tmp_path_factory.mktemp("runs") / "run"
  mine = found("mine.py:my_capacity_moe")
  assert moejax.train(moejax.replace(mine, **{"training.steps": 2}), directory).steps == 2
  # What does not decide the result may change when it resumes.
  mine = moejax.replace(mine, mesh=Mesh(data=2, expert=2), rules=(*mine.rules, ("embed", ())),
                        **{"model.remat": "layer_inputs", "data.prefetch": 2, "training.log_every": 2},
                        matchable=("model.num_layers",))  # fmt: skip
  assert moejax.train(mine, directory).steps == 4
  return directory


@pytest.mark.slow
def test_a_run_names_the_kinds_and_counts_what_they_choose_and_drop(run):
  stored = json.loads((run / "experiment.json").read_text())
  model, optimizer = stored["model"], stored["optimizer"]
  kinds = (model["moe"]["router"], model["moe"]["dispatch"], model["feed_forward"], optimizer, optimizer["schedule"])
  assert [value["kind"] for value in kinds] == ["relu", "best_first", "low_rank", "Sgd", "InverseRoot"]
  records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  steps = [record for record in records if "loss" in record]
  assert [record["step"] for record in steps] == [1, 2, 4]
  (choices,), (dropped,) = (
    {record[f"router/{name}/layer_01"] > 0 for record in steps} for name in ("choices_per_token", "dropped_fraction")
  )
  assert choices and dropped


@pytest.mark.slow
def test_a_run_generates_and_is_scored(run):
  assert len(moejax.generate(run, ["def "], max_tokens=4)) == 1
  assert json.loads((run / "summary.json").read_text())["held_out/bits_per_byte"] > 0


@pytest.mark.slow
def test_it_is_planned_and_a_loop_of_unknown_length_is_refused(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert moejax.plan(found("mine.py:my_capacity_moe", data=4), "cpu:8").fits
  with pytest.raises(UserError, match=r"has a loop whose length depends on the data .*dispatch einsum"):
    moejax.plan(found("relu_router.py:relu_moe", data=4), "cpu:8")


@pytest.mark.parametrize(
  "name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ALONE[:-1]),
           pytest.param(ALONE[-1], marks=pytest.mark.slow)]
)  # fmt: skip
def test_each_file_alone_trains_and_generates(name, tmp_path):
  assert moejax.train(moejax.replace(found(name), **{"training.steps": 2}), tmp_path / "run").steps == 2
  assert len(moejax.generate(tmp_path / "run", ["def "], max_tokens=4)) == 1


@pytest.mark.slow
def test_a_comparison_of_them_names_them_in_its_report(tmp_path):
  suite = moejax.find("mine.py:mine")
  assert isinstance(suite, Suite)
  measurement = Measurement(warmup_steps=1, rounds=1, steps_per_round=2)
  suite = moejax.replace(suite, **small(2), measurement=measurement, **{"mesh.data": 2})
  moejax.compare(suite, tmp_path / "comparison")
  page = (tmp_path / "comparison" / "report" / "index.html").read_text()
  for name in ("router relu", "dispatch best_first", "feed-forward low_rank", "optimizer Sgd"):
    assert name in page, name


@pytest.mark.parametrize("name", [*ALONE, "mine.py:my_moe"])
def test_values_come_back_from_json(name):
  plain = json.loads(json.dumps(to_plain(moejax.find(name))))
  assert to_plain(from_plain(Experiment, plain)) == plain


@pytest.mark.slow
def test_another_process_reads_a_run_once_its_file_is_named(run):
  """A run directory alone imports nothing."""
  show = [sys.executable, "-m", "moejax", "show", str(run / "experiment.json")]
  refused = subprocess.run(show, capture_output=True, text=True)
  assert refused.returncode == 2 and "--import FILE.py" in refused.stderr and refused.stderr.count("\n") == 1
  shown = subprocess.run([*show, "--import", "mine.py"], capture_output=True, text=True, check=True).stdout
  assert "--model.moe.dispatch.kind best_first" in shown and "--model.feed-forward.rank 16" in shown


def test_a_kind_of_ones_own_is_an_option_of_any_experiment(capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(["show", "quick_small_8e", "--import", "relu_router.py", "--model.moe.router", "relu",
              "--model.moe.router.scale", "2", "--model.moe.dispatch.priority", "choice"])  # fmt: skip
  assert stopped.value.code == 0 and "--model.moe.router.kind relu" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("table", "name", "message"),
  [
    (ROUTERS, "ReluRouter", r"router ReluRouter has no function; add one, as in .*\.ROUTERS\[ReluRouter\]"),
    (DISPATCHES, "BestFirstDispatch", r"dispatch BestFirstDispatch has no function; add one, as in .*\.DISPATCHES\["),
    (OPTIMIZERS, "Sgd", r"optimizer Sgd has no function; add one, as in .*\.OPTIMIZERS\[Sgd\]"),
  ],
)
def test_a_kind_without_a_function_is_refused(table, name, message, monkeypatch, tmp_path):
  mine = found("mine.py:my_capacity_moe")
  for kind in [kind for kind in table if kind.__name__ == name]:
    monkeypatch.delitem(table, kind)
  with pytest.raises(UserError, match=message):
    moejax.train(mine, tmp_path / "run")
  with pytest.raises(UserError, match=message):
    moejax.plan(mine, "cpu:8")
  assert not (tmp_path / "run").exists()  # it is refused before the text is read


def test_a_router_whose_routing_is_another_than_its_facts_say_is_refused(monkeypatch, tmp_path):
  mine = found("mine.py:my_capacity_moe")
  monkeypatch.setattr(type(mine.model.moe.router), "every_expert", False)
  with pytest.raises(UserError, match=r"router ReluRouter of .* has every_expert=False, but its routing has .*=True"):
    moejax.train(mine, tmp_path / "run")


def test_the_file_that_match_writes_imports_the_files_of_its_kinds(tmp_path):
  mine = found("mine.py:my_capacity_moe")
  (tmp_path / "matched.py").write_text(experiment_file(mine))
  assert to_plain(moejax.find(tmp_path / "matched.py:matched")) == to_plain(mine)


def test_files_define_what_the_page_says():
  assert {kind.kind for table in TABLES for kind in table} >= KINDS
  assert lookup.find("mine.py:mine").pairs[0].dense.name == "my_dense"
