"""Every experiment in full, against the text in tests/golden/: what `moejax show NAME --json` prints.

`python tests/test_experiments.py` writes that text anew.
"""

import json
import pathlib
from typing import Any

import pytest

from experiments import EXPERIMENTS
from moejax.config import Experiment, Suite
from moejax.describe import facts, suite_facts

GOLDEN = pathlib.Path(__file__).parent / "golden"

CHANGED = """\
{name} is no longer what tests/golden/{name}.json says:
  {differences}
If that is meant, `python tests/test_experiments.py` writes the golden files anew. Read their diff before you commit it:
a changed default or a shared function may have changed experiments that you were not thinking of, and results that were
measured with the old ones no longer belong to them."""


def resolved(name: str) -> dict[str, Any]:
  """Counts, budget and every field, as JSON has them."""
  made = EXPERIMENTS[name]()
  return json.loads(json.dumps(facts(made) if isinstance(made, Experiment) else suite_facts(made)))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """Lines that say what differs, and where."""
  if isinstance(old, dict) and isinstance(new, dict):
    names = sorted({*old, *new})
    return [line for name in names for line in differences(old.get(name), new.get(name), f"{path}.{name}".strip("."))]
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    return [line for i in range(len(old)) for line in differences(old[i], new[i], f"{path}.{i}")]
  return [] if old == new else [f"{path}: {old!r} is now {new!r}"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_what_its_golden_file_says(name):
  path = GOLDEN / f"{name}.json"
  assert path.exists(), f"{path.name} is missing; `python tests/test_experiments.py` writes it"
  changed = differences(json.loads(path.read_text()), resolved(name))
  assert not changed, CHANGED.format(name=name, differences="\n  ".join(changed))


def test_no_golden_file_is_left_of_an_experiment_that_is_gone():
  assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_the_name_that_it_is_listed_under_and_a_first_line_for_the_list(name):
  assert EXPERIMENTS[name]().name == name
  assert (EXPERIMENTS[name].__doc__ or "").strip()


def test_a_name_means_one_experiment_wherever_it_stands():
  found: dict[str, Experiment | Suite] = {name: make() for name, make in EXPERIMENTS.items()}
  members = [member for made in found.values() if isinstance(made, Suite) for member in made.members]
  for member in members:
    assert found.setdefault(member.name, member) == member


def test_a_difference_is_told_with_its_path_and_both_values():
  old = {"config": {"model": {"d_ff": 8, "moe": None}, "rules": [["embed", ["data"]]]}, "gone": 1}
  new = {"config": {"model": {"d_ff": 9, "moe": {"every": 1}}, "rules": [["embed", []]]}}
  assert differences(old, new) == [
    "config.model.d_ff: 8 is now 9",
    "config.model.moe: None is now {'every': 1}",
    "config.rules.0.1: ['data'] is now []",
    "gone: 1 is now None",
  ]


def write() -> None:
  """Writes the golden files anew and removes those of experiments that are gone."""
  GOLDEN.mkdir(exist_ok=True)
  for path in GOLDEN.iterdir():
    if path.stem not in EXPERIMENTS:
      path.unlink()
  for name in EXPERIMENTS:
    (GOLDEN / f"{name}.json").write_text(json.dumps(resolved(name), indent=2) + "\n")


if __name__ == "__main__":
  write()
