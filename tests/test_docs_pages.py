"""README.md and docs/: their Python runs, their commands parse, and the fields that they name exist."""

import pathlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from unittest import mock

import extending_files
import pytest

import moejax
from moejax import lookup
from moejax.command_line import make_parser
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.overrides import override, override_pair, print_field_help
from moejax.partitioning import make_partitioner
from moejax.planning.meshes import on_topology
from moejax.planning.topology import parse_topology
from moejax.training.state import make_train_spec
from moejax.training.step import abstract_inputs, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
  """Document and content of every fenced block in a language."""
  found = []
  for path in DOCUMENTS:
    found += [(path.name, block) for block in re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)]
  return found


def commands() -> list[str]:
  """Every command of a fenced or indented block, without what is to be filled in or follows it as a comment."""
  lines = [line for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
  lines += [
    line.strip() for path in DOCUMENTS for line in path.read_text().splitlines() if line.startswith("    moejax ")
  ]
  found = [part.partition(" #")[0].strip().removesuffix(" ...") for line in lines for part in line.split("&&")]
  return list(dict.fromkeys(line for line in found if re.match(r"(\w+=\S+ )*moejax ", line) and "[" not in line))


@pytest.fixture(scope="module")
def my_moe(tmp_path_factory) -> Iterator[Experiment]:
  """The experiment of docs/extending.md, which has classes and so fields of its own; its files are in the current
  folder."""
  with extending_files.written(tmp_path_factory.mktemp("mine")):
    yield lookup.find_experiment("mine.py:my_moe")


def test_every_python_snippet_runs_and_its_experiments_place_every_tensor(monkeypatch, my_moe):
  for name in ("train", "compare", "evaluate", "generate", "plan", "match", "decide"):  # which take minutes
    monkeypatch.setattr(moejax, name, mock.create_autospec(getattr(moejax, name)))
  made = []
  documents: dict[str, dict] = {}
  for document, block in blocks("python"):
    if block in extending_files.FILES.values():
      continue  # tests/test_extending.py runs them
    names = documents.setdefault(document, {})
    before = set(names)
    exec(compile(block, document, "exec"), names)
    written = re.findall(r"^def (\w+)\(\)", block, re.M)
    made += [names[name]() for name in written] + [
      v for n, v in names.items() if n not in before and isinstance(v, Experiment)
    ]
  assert len(made) >= 3
  for experiment in made:
    spec = make_train_spec(experiment, make_partitioner(experiment.mesh, experiment.rules))
    make_train_step(spec).lower(*abstract_inputs(spec))


@pytest.mark.parametrize("command", commands())
def test_every_command_parses_and_sets_fields_that_exist(command, my_moe):
  arguments = [word for word in shlex.split(command) if "=" not in word.partition("-")[0]][1:]
  known, overrides = make_parser(arguments[0]).parse_known_args(arguments)
  without_fields = (
    "data",
    "tokenizer",
    "report",
    "watch",
    "wandb",
    "list",
    "calibrate",
    "export",
    "fit",
    "check-claim",
  )
  if known.command in without_fields:
    assert not overrides
  elif known.command == "decide":
    assert {lookup.find_experiment(name).model.moe is None for name in known.names} == {True, False} and not overrides
  elif known.command == "match":
    of_both = override_pair(lookup.find_experiment(known.dense), lookup.find_experiment(known.name), overrides)
    for experiment in of_both:
      on_topology(experiment, parse_topology(known.topology, known.slices))
  elif known.command in ("evaluate", "generate", "sparsity", "prune", "import", "upcycle") or known.name.startswith(
    "/tmp/"
  ):
    override(lookup.find_experiment("quick_small_8e"), overrides)
  elif ".py" in known.name or known.name.endswith(".json"):
    override(my_moe, overrides)
  elif known.command == "plan" and ":" not in known.name:  # the mesh tiles the devices, and the chip has the dtypes
    on_topology(override(lookup.find_experiment(known.name), overrides), parse_topology(known.topology, known.slices))
  else:
    override(lookup.find(known.name), overrides)


def test_every_field_that_is_named_exists(capsys, my_moe):
  for experiment in (lookup.find_experiment("quick_small_8e"), my_moe):
    print_field_help(experiment, f"moejax train {experiment.name}")
  known = set(re.findall(r"--[a-z][\w.-]+", capsys.readouterr().out))
  for path in DOCUMENTS:
    named = {
      option.replace("--dense.", "--") for option in re.findall(r"--[a-z][\w-]*(?:\.[a-z0-9][\w-]*)+", path.read_text())
    }
    assert not named - known, path.name


def test_every_file_and_every_name_of_ours_that_is_named_exists():
  def exists(name: str) -> bool:
    try:
      pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
      return False
    return True

  names, files = set(), set()
  for path in DOCUMENTS:
    names |= set(re.findall(r"`(moejax(?:\.\w+)+)(?:\(.*?)?`", path.read_text()))
    files |= set(re.findall(r"`((?:\w+/)*\w+\.py)(?:`|:)", path.read_text()))
  assert len(names) > 5 and not [name for name in names if not exists(name)]
  files -= {"path/to/mine.py", *extending_files.FILES}
  places = [ROOT, *(path.parent for path in (ROOT / "moejax").rglob("*.py"))]
  assert len(files) > 5 and not [file for file in files if not any((place / file).is_file() for place in places)]


def test_what_docs_sharding_says_is_refused_is_refused():
  with pytest.raises(UserError, match="rules map both 'batch' and 'vocab' to mesh axis 'expert'"):
    override(lookup.find_experiment("quick_small_8e"), ["--rules.vocab", "model", "expert", "--rules.embed", "data"])


def test_every_fault_names_a_test_that_exists():
  lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
  rows = [line for line in lines if line.startswith("| ") and not line.startswith("| Fault ")]
  assert len(rows) >= 12
  for row in rows:
    file, *names = re.findall(r"`([^`]+)`", row.rpartition(" | ")[2])
    content = (ROOT / file).read_text()
    assert file.startswith("tests/") and all(f"def {name}(" in content for name in names), row
