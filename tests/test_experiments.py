"""Every experiment in full, against the text in tests/golden/: what `moejax show NAME --json` prints.

`python tests/test_experiments.py` writes that text anew.
"""

import json
import pathlib
from dataclasses import replace
from typing import Any

import pytest

from moejax.config import Experiment, Suite
from moejax.config.parameters import parameter_counts
from moejax.describe import facts, suite_facts
from moejax.experiments import EXPERIMENTS

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


PUBLISHED = {
  # Total and active parameters in billions, what counts, and by how much ours may differ.
  "dense_6b4": (6.4, 6.4, "total", 0.01),  # arXiv 2405.15052
  "dense_12b6": (12.6, 12.6, "total", 0.01),
  "dense_29b6": (29.6, 29.6, "total", 0.01),
  "mixtral_8x7b": (46.7, 12.9, "total", 0.005),  # arXiv 2401.04088
  "mistral_7b": (7.24, 7.24, "total", 0.005),  # arXiv 2310.06825
  "qwen3_30b_a3b": (30.532122624, 3.353032704, "total", 1e-9),  # what transformers counts
  "qwen3_235b_a22b": (235.09363456, 22.19076352, "total", 1e-9),
  "switch_base": (22.1, 0.67, "total", 0.01),  # axlearn's envy.py, with its tied vocabulary of 32,768
  "switch_large": (78.4, 2.28, "total", 0.01),
  "switch_xxl": (396.0, 22.0, "total", 0.01),
  "ds_dense_1b": (1.017, 1.017, "non_embedding", 0.005),  # arXiv 2404.05567, table 1
  "ds_dense_3b": (2.705, 2.705, "non_embedding", 0.005),
  "ds_dense_6b": (6.186, 6.186, "non_embedding", 0.005),
  "ds_moe_1b": (1.067, 1.067, "non_embedding", 0.05),  # 2 to 5 % that the paper does not account for
  "ds_moe_3b": (2.846, 2.846, "non_embedding", 0.05),
  "ds_moe_6b": (6.343, 6.343, "non_embedding", 0.05),
  "ds_smoe_1b": (1.042, None, "non_embedding", 0.05),
  "ds_smoe_5b": (4.911, None, "non_embedding", 0.05),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_parameters(name):
  total, active, kind, tolerance = PUBLISHED[name]
  made = EXPERIMENTS[name]()
  assert isinstance(made, Experiment)
  counted = parameter_counts(made.model)
  assert counted.counted(kind) / 1e9 == pytest.approx(total, rel=tolerance)
  if active is not None:
    of_token = counted.active if kind == "total" else counted.active_non_embedding
    assert of_token / 1e9 == pytest.approx(active, rel=tolerance)


@pytest.mark.parametrize(
  "name",
  ["moe_1b6_256e", "moe_6b4_16e", "moe_6b4_64e", "moe_12b6_16e", "moe_12b6_64e", "moe_29b6_16e", "moe_29b6_64e"],
)
def test_without_experts_a_scale_is_its_dense_base(name):
  made = EXPERIMENTS[name]()
  assert isinstance(made, Experiment)
  base = {"1b6": 1.6, "6b4": 6.4, "12b6": 12.6, "29b6": 29.6}[name.split("_")[1]]
  assert parameter_counts(replace(made.model, moe=None)).total / 1e9 == pytest.approx(base, rel=0.01)


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
