"""From a name to an experiment, with a list of our own."""

import dataclasses
import json
import sys

import pytest

from moejax import lookup
from moejax.config.plain import to_plain
from moejax.errors import UserError
from moejax.experiments.quickstart import quick_small
from moejax.lookup import find, find_experiment, find_suite, listed
from moejax.training.run_directory import claim, claim_comparison


@pytest.fixture(autouse=True)
def our_list(monkeypatch, tiny_dense, tiny_suite):
  def suite():
    """A comparison.

    More of it.
    """
    return tiny_suite

  monkeypatch.setattr(lookup, "EXPERIMENTS", {"suite": suite, "dense": lambda: tiny_dense})


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a user's file and returns its name; the file is in the current folder."""
  monkeypatch.chdir(tmp_path)

  def write_file(text: str, name: str = "own.py") -> str:
    (tmp_path / name).write_text(text)
    return name

  return write_file


def test_a_listed_name_is_made_anew_by_its_function(tiny_dense, tiny_suite):
  assert find("dense") == tiny_dense
  assert find("suite") == tiny_suite


def test_a_member_of_a_listed_suite_is_found_by_its_own_name(tiny_moe):
  assert find("sparse") == find_experiment("sparse") == tiny_moe


@pytest.mark.parametrize(
  ("name", "hint"),
  [
    ("sparce", "did you mean sparse?"),
    ("suit", "did you mean suite?"),
    ("Dense", "did you mean dense or suite?"),
    ("xyz", "`moejax list` shows all"),
  ],
)
def test_an_unknown_name_is_told_the_nearest(name, hint):
  with pytest.raises(UserError) as error:
    find(name)
  assert str(error.value) == f"no experiment is named {name!r}; {hint}"


def test_a_suite_where_an_experiment_is_needed_names_the_command_and_the_members():
  with pytest.raises(
    UserError,
    match=r"^'suite' is a suite; use `moejax compare suite`, or one of its members: dense, sparse, wide$",
  ):
    find_experiment("suite")


def test_an_experiment_where_a_suite_is_needed_names_the_command_and_the_suites():
  with pytest.raises(
    UserError, match=r"^'dense' is a single experiment; use `moejax train dense`, or one of the suites: suite$"
  ):
    find_suite("dense")


def test_the_list_has_each_name_once_with_its_first_line_and_then_the_members_that_have_no_name_in_it(
  tiny_dense, tiny_moe, tiny_suite
):
  rows = listed()
  assert rows[:3] == [
    ("suite", tiny_suite, "A comparison."),
    ("dense", tiny_dense, ""),
    ("sparse", tiny_moe, "member of suite"),
  ]
  assert [name for name, _, _ in rows] == ["suite", "dense", "sparse", "wide"]


def test_a_users_own_file_gives_experiments_and_suites(mine, tiny_dense, tiny_suite):
  assert find(f"{mine}:dense") == find_experiment(f"{mine}:dense") == tiny_dense
  assert find_suite(f"{mine}:suite") == tiny_suite


@pytest.mark.parametrize(
  ("text", "function", "message"),
  [
    ("def mine(): ...", "mime", "own.py has no function 'mime'; it has mine"),
    ("def one(): ...\ndef two(): ...\ndef _three(): ...", "xyz", "own.py has no function 'xyz'; it has one, two"),
    ("from dataclasses import replace\nx = 1", "replacement", "own.py has no function 'replacement'; it has none"),
    ("x = 1\ndef mine(): ...", "x", "own.py has no function 'x'; it has mine"),
    ("def mine(): return 3", "mine", "own.py:mine returned int; it must return an Experiment or a Suite"),
    (
      "from moejax.config import Budget\ndef mine(): return Budget(tokens_per_parameter=0)",
      "mine",
      "own.py:2: budget.tokens_per_parameter=0 must be above 0",
    ),
  ],
  ids=["nearly", "not at all", "imports do not count", "no function", "no experiment", "not valid"],
)
def test_a_file_that_gives_no_experiment_is_told_what_it_has(write, text, function, message):
  with pytest.raises(UserError) as error:
    find(f"{write(text)}:{function}")
  assert str(error.value) == message


def test_a_file_that_is_not_there(write):
  with pytest.raises(
    UserError,
    match=r"^other\.py does not exist; give the path of a Python file$",
  ):
    find("other.py:mine")


def test_a_file_without_a_function(write):
  with pytest.raises(
    UserError, match=r"^own\.py does not name a function; add a function of the file, as in own\.py:my_experiment$"
  ):
    find(write("def mine(): ..."))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def mine(): return 1 / 0", "own.py:1: ZeroDivisionError: division by zero"),
    ("x = 1\ndef mine(:", "own.py:2: SyntaxError: invalid syntax"),
    ("\nimport no_such_module", "own.py:2: ModuleNotFoundError: No module named 'no_such_module'"),
    ("\n\nundefined", "own.py:3: NameError: name 'undefined' is not defined"),
    ("def mine(x): ...", "own.py: TypeError: mine() missing 1 required positional argument: 'x'"),
    ("import sys\nsys.exit(3)", "own.py:2: SystemExit: 3"),
    ("def mine():\n  import neighbor\n  neighbor.fail()", "neighbor.py:2: KeyError: 'gone'"),
    ("import json\ndef mine(): json.loads('{')", "own.py:2: JSONDecodeError: Expecting property name enclosed in"),
    ("def mine():\n  assert False", "own.py:2: AssertionError"),
    ("def mine(): raise ValueError('two\\nlines')", "own.py:1: ValueError: two lines"),
    ("\0", "own.py: "),
  ],
)
def test_an_exception_of_the_users_file_is_one_line_with_the_place_where_it_was_raised(write, text, message):
  write("def fail():\n  {}['gone']", "neighbor.py")
  before = [*sys.path]
  with pytest.raises(UserError) as caught:
    find(f"{write(text)}:mine")
  assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
  assert sys.path == before


def test_a_users_file_imports_its_neighbors_from_any_folder(write, tmp_path, monkeypatch):
  write("from moejax.experiments.quickstart import quick_small as basic", "basis.py")
  write("def mine():\n  from basis import basic\n  return basic()")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  assert find("../own.py:mine") == quick_small()


def test_a_file_that_a_run_or_a_comparison_wrote_is_a_name(tiny_moe, tiny_suite, tmp_path):
  claim(tmp_path / "run", tiny_moe, 100)
  claim_comparison(tmp_path / "comparison", tiny_suite)
  longer = dataclasses.replace(tiny_moe, training=dataclasses.replace(tiny_moe.training, steps=100))
  assert find_experiment(str(tmp_path / "run" / "experiment.json")) == longer
  assert find_suite(str(tmp_path / "comparison" / "suite.json")) == tiny_suite
  for name, file in (("run", "experiment.json"), ("comparison", "suite.json")):
    with pytest.raises(UserError, match=rf"is a directory; to use its configuration, give .*{name}/{file}$"):
      find(str(tmp_path / name))


OWN_KIND = """
from __future__ import annotations

import dataclasses

from moejax.config import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halved(Schedule, kind="halved_{name}"):
  at: float = 0.5

  def after_warmup(self, progress):
    return 1.0 if progress < self.at else 0.5


def own():
  from moejax.experiments.quickstart import quick_small

  base = quick_small()
  return dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, schedule=Halved(at=0.25)))
"""


def test_a_file_may_define_kinds_with_annotations_that_are_not_evaluated(write):
  name = write(OWN_KIND.format(name="by_name"))
  assert find(f"{name}:own").optimizer.schedule.fraction(50, 100) == 0.5


def test_what_a_run_wrote_is_read_once_the_file_of_its_kinds_is_imported_and_not_before(write, tmp_path):
  write(OWN_KIND.format(name="by_import"))
  stored = to_plain(quick_small())
  stored["optimizer"]["schedule"] = {"kind": "halved_by_import", "warmup_fraction": 0.02, "at": 0.25}
  (tmp_path / "experiment.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match=r"schedule\.kind is 'halved_by_import', not one of .* `--import FILE\.py`"):
    find("experiment.json")
  lookup.import_file("own.py")
  assert find("experiment.json").optimizer.schedule.at == 0.25
