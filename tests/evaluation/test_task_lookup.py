"""Names of the harness's tasks, groups, tags and patterns, all resolved by the harness; what is missing is one line."""
# ruff: noqa: E402  # what is not installed is skipped before it is imported

import fnmatch
import json
import random
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
import datasets
import huggingface_hub
from harness_fixtures import write_benchmarks
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import _factory

from moejax.errors import UserError
from moejax.evaluation import task_lookup
from moejax.evaluation.task_lookup import TaskFinder, explained, harness_index

pytestmark = pytest.mark.slow  # needs the extra `eval`, which takes a minute to install


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    monkeypatch.setattr(datasets.config, name, True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = write_benchmarks(tmp_path_factory.mktemp("data"))
  rows = [{"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}, "id": str(i)} for i in range(2)]
  for split in ("train", "validation"):
    path = folder / "squadv2" / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  for subject in ("astronomy", "virology"):
    for split in ("dev", "test"):
      path = folder / "mmlu" / subject / f"{split}.jsonl"
      path.parent.mkdir(exist_ok=True)
      path.write_text((folder / "mmlu" / "anatomy" / f"{split}.jsonl").read_text())
  return folder


@pytest.fixture
def without_data(monkeypatch):
  """Tasks that have their configuration and no data."""

  class Unread(ConfigurableTask):
    def __init__(self, config):
      self._config = TaskConfig(**config)

  monkeypatch.setattr(_factory, "ConfigurableTask", Unread)


OWN_FAULTS = ("needs", "t0_eval", "flan_held_in")
"""Of what the harness 0.4.13 itself cannot load offline: a package, data, or two groups with YAML that is not valid."""


def test_every_group_and_tag_resolves_as_the_harness_resolves_it(without_data, tmp_path):
  finder = TaskFinder(tmp_path)
  index = harness_index()
  names = [name for name, entry in index.items() if entry.kind.name in ("GROUP", "TAG")]
  assert len(names) > 1000
  some = ["openllm", "pythia", "mmlu", "ai2_arc", "arc_*", "lambada*", "truthfulqa", "glue", "blimp", "agieval", "bbh"]
  for name in some + random.Random(0).sample(names, 40):
    try:
      loaded = finder.load(finder.names(name))
    except UserError as error:
      assert name not in some and any(fault in str(error) for fault in OWN_FAULTS), error
      continue
    for group in loaded["groups"].values():
      assert {task.task_name for task in group.get_all_tasks()} <= set(loaded["tasks"])
  assert len(finder.load(["openllm"])["tasks"]) == 62  # 57 subjects of MMLU among them
  assert finder.load(["openllm"])["tasks"]["mmlu_anatomy"].config.num_fewshot == 5


def test_a_task_that_two_names_stand_for_is_there_once_if_it_is_the_same(without_data, tmp_path):
  finder = TaskFinder(tmp_path)
  loaded = finder.load(["mmlu_anatomy", "mmlu_stem", "mmlu"])
  assert len(loaded["tasks"]) == 57 and {"mmlu", "mmlu_stem", "mmlu_other"} <= set(loaded["groups"])
  with pytest.raises(
    UserError, match=r"arc_challenge is defined differently by arc_challenge and by openllm.*num_fewshot"
  ):
    finder.load(["arc_challenge", "openllm"])


def test_patterns_and_tags_stand_for_all_that_they_match(tmp_path):
  finder = TaskFinder(tmp_path)
  assert finder.names("ai2_arc") == ["arc_challenge", "arc_easy"]
  assert finder.names("mmlu_high_school_b*") == fnmatch.filter(finder.all_tasks, "mmlu_high_school_b*") != []
  with pytest.raises(UserError, match=r"no task, group or tag arc_eazy; similar names are arc_easy"):
    finder.names("arc_eazy")
  with pytest.raises(UserError, match=r"no task, group or tag nothing_\*"):
    finder.names("nothing_*")


def test_tasks_of_a_folder_of_ones_own_are_added_and_replace_those_of_the_same_name(data, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"q": "one?", "a": "yes"}\n')
  task = {
    "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test",
    "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
  }  # fmt: skip
  folder = tmp_path / "own"
  folder.mkdir()
  (folder / "a.yaml").write_text(json.dumps(task | {"task": "my_task", "tag": "mine"}))
  (folder / "b.yaml").write_text(json.dumps(task | {"task": "arc_easy", "tag": "mine"}))
  (folder / "c.yaml").write_text(json.dumps({"group": "my_group", "task": ["my_task", "arc_easy"]}))
  finder = TaskFinder(tmp_path / "cache", include_path=folder)
  assert finder.names("mine") == ["arc_easy", "my_task"]
  loaded = finder.load(["my_group"])
  assert {name: task.eval_docs[0]["a"] for name, task in loaded["tasks"].items()} == {
    "my_task": "yes",
    "arc_easy": "yes",
  }
  assert list(finder.load([str(folder / "a.yaml")])["tasks"]) == [finder.name_of(str(folder / "a.yaml"))] == ["my_task"]
  with pytest.raises(UserError, match=r"include_path='.*none' is not a folder"):
    TaskFinder(tmp_path, include_path=tmp_path / "none")


def test_data_of_a_folder_is_read_by_tasks_of_yaml_and_of_python(data, tmp_path):
  finder = TaskFinder(tmp_path, data)
  loaded = finder.load(["gsm8k_cot", "mmlu_anatomy", "squadv2"])["tasks"]
  assert loaded["gsm8k_cot"].eval_docs[0]["question"] == "One and one?"
  assert set(loaded["mmlu_anatomy"].dataset) == {"dev", "test"}
  assert [doc["title"] for doc in loaded["squadv2"].eval_docs] == ["t", "t"]
  assert datasets.load_dataset is not None and "moejax" not in datasets.load_dataset.__module__


@pytest.mark.parametrize("name", ["piqa", "mmlu"])
def test_a_task_without_data_in_the_folder_is_named(data, tmp_path, name):
  with pytest.raises(UserError, match=rf"has no data for the task {name}\w*: it needs SPLIT\.jsonl in one of {name}"):
    TaskFinder(tmp_path, data).load([name])


def test_a_missing_package_is_one_line_with_what_installs_it(tmp_path):
  for module, wanted in (
    ("langdetect", "pip install 'lm-eval[ifeval]'"), ("sympy.parsing", "pip install 'lm-eval[math]'"),
    ("sklearn", "pip install scikit-learn"), ("transformers", "pip install transformers"),
  ):  # fmt: skip
    text = explained("a_task", ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert text.startswith(f"the task a_task needs {module.partition('.')[0]}, ") and f"`{wanted}`" in text


@pytest.mark.parametrize(
  "error, offline",
  [
    (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), True),
    (
      FileNotFoundError(
        "Couldn't find any file at /c/d/a/b. Couldn't find 'a/b' on the Hub either: LocalEntryNotFoundError: ..."
      ),
      True,
    ),
    (FileNotFoundError("Unable to find '/data/rows.jsonl'"), False),
    (ValueError("a column is missing\nand more"), False),
  ],
)
def test_a_hub_out_of_reach_is_told_from_other_faults(error, offline):
  text = explained("a_task", error)
  assert ("the task a_task needs a/b from https" in text) == offline
  assert offline or text.startswith(f"lm-evaluation-harness fails at a_task with {type(error).__name__}: ")
  assert "\n" not in text


def test_a_metric_that_must_be_fetched_is_not_taken_for_data():
  text = explained("squadv2", FileNotFoundError("Module 'squad_v2' doesn't exist on the Hugging Face Hub either."))
  assert "needs a file, such as a metric, from https" in text and "--data" not in text


def test_without_a_network_the_dataset_is_named_soon(monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

  def nowhere(*arguments, **options):
    raise socket.gaierror("there is no network")

  monkeypatch.setattr(socket, "getaddrinfo", nowhere)
  start = time.monotonic()
  with pytest.raises(UserError, match=r"piqa needs [\w/-]+ from https://huggingface\.co, which is .* --data DIR"):
    TaskFinder(tmp_path).load(["piqa"])
  assert time.monotonic() - start < 10


def test_the_index_is_read_from_the_cache_and_anew_where_that_is_damaged(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  first = {"a": task_lookup.Entry("a", task_lookup.Kind.TASK, task_lookup.TASKS / "a.yaml", tags={"x"})}
  monkeypatch.setattr(task_lookup.TaskIndex, "build", lambda paths: first)
  assert harness_index() == first
  monkeypatch.setattr(task_lookup.TaskIndex, "build", lambda paths: {})
  assert harness_index() == first
  (cached,) = (tmp_path / "moejax" / "tasks").iterdir()
  whole = cached.read_text()
  edited = ("[", "[1]", "{}", "[" * 10_000, whole.replace("TASK", "GROUP"), whole.replace('"a.yaml"', "7"))
  for content in (*edited, whole[:-1], whole + "}", whole.replace("a.yaml", "b.yaml")):
    cached.write_text(content)
    assert harness_index() == {}
