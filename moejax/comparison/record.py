"""What a comparison leaves on disk, read and checked: comparison.json and each member's metrics.jsonl."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.errors import UserError

KINDS = ("dense", "moe")
AGAIN = "run `moejax compare` again to rewrite it"

MEMBER_NUMBERS = (
  "parameters_total", "parameters_active", "parameters_embedding", "model_flops_per_token", "tokens_per_step",
  "step_time_s", "step_time_spread", "tokens_per_s", "mfu", "dropped_fraction", "budget_s", "steps", "tokens",
  "bits_per_byte", "bits_per_byte_stderr", "accuracy", "accuracy_stderr", "seed", "train_time_s", "compile_time_s",
  "num_layers", "d_model", "num_experts", "experts_per_token", "capacity_factor", "sparse_every",
)  # fmt: skip
TASKS = "tasks/"
"""What the keys of benchmark scores begin with."""
PAIR_NUMBERS = (
  "step_time_ratio", "bits_per_byte_difference", "bits_per_byte_difference_stderr", "accuracy_difference",
  "accuracy_difference_stderr",
)  # fmt: skip
BASELINE_NUMBERS = ("unigram_bits_per_byte", "bigram_bits_per_byte", "unigram_accuracy", "bigram_accuracy")


def read_comparison(directory: Path) -> dict[str, Any]:
  """DIR/comparison.json as `checked` returns it.

  Raises:
    UserError: the file is missing, is not JSON, or lacks what a report needs.
  """
  path = Path(directory) / "comparison.json"
  if not path.is_file():
    raise UserError(f"{path} does not exist; give a directory written by `moejax compare`")
  try:
    comparison = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); {AGAIN}") from error
  return checked(comparison, str(path))


def checked(comparison: Any, source: str = "the comparison") -> dict[str, Any]:
  """A copy in which every optional key is present, None where it was not.

  Raises:
    UserError: something without which members and pairs cannot be told apart is missing, or a number is none.
  """
  comparison = _keys(comparison, source, ("suite", "members", "pairs"))
  members = [
    _member(member, f"{source}: members[{i}]") for i, member in enumerate(_list(comparison, "members", source))
  ]
  pairs = [_pair(pair, f"{source}: pairs[{i}]") for i, pair in enumerate(_list(comparison, "pairs", source))]
  names = [member["name"] for member in members]
  named = [member["pair"] for member in members] + [pair[key] for pair in pairs for key in KINDS]
  for name in named:
    if name is not None and name not in names:
      raise UserError(f"{source}: a pair names {name!r}, but the members are {', '.join(names)}; {AGAIN}")
  baselines = _numbers(comparison.get("baselines") or {}, f"{source}: baselines", BASELINE_NUMBERS)
  optional: dict[str, Any] = {"tolerance": 0.05, "complete": False, "finding": None, "provenance": {}}
  given = {name: value for name, value in comparison.items() if value is not None}
  _keys(given.get("provenance", {}), f"{source}: provenance", ())
  _numbers(given, source, ("tolerance",))
  return {**optional, **given, "members": members, "pairs": pairs, "baselines": baselines}


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl in order of step; none where there is no file.

  A line that is no object with a step is passed over: a process that is killed leaves half of one. Lines of one step
  are one record, in which the later line counts: an evaluation has a line of its own, and a run that resumes from a
  checkpoint writes the steps after it again.
  """
  if not path.is_file():
    return []
  by_step: dict[float, dict[str, Any]] = {}
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    try:
      values = json.loads(line)
    except ValueError:
      continue
    if isinstance(values, dict) and known(values.get("step")):
      by_step.setdefault(values["step"], {}).update(values)
  return [by_step[step] for step in sorted(by_step)]


def known(value: Any) -> bool:
  """Whether `value` is a finite number."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def missing(comparison: Mapping[str, Any], metrics: Mapping[str, Sequence]) -> list[str]:
  """What a whole comparison has and this one has not, a phrase each."""
  members, pairs = comparison["members"], comparison["pairs"]

  def without(key: str) -> list[str]:
    return [member["name"] for member in members if member[key] is None]

  unpaired = [pair["dense"] for pair in pairs if pair["moe"] is None or pair["bits_per_byte_difference"] is None]
  lacking = {
    "step time of": without("step_time_s"),
    "training result of": without("bits_per_byte"),
    "metrics of": [member["name"] for member in members if not metrics.get(member["name"])],
    "difference within the pair of": unpaired,
    "baseline": [name for name in BASELINE_NUMBERS if comparison["baselines"][name] is None],
  }
  return [f"{what} {', '.join(names)}" for what, names in lacking.items() if names]


def pair_members(comparison: Mapping[str, Any], dense: str) -> list[dict[str, Any]]:
  """The members of one pair: the dense one, the match, then the other candidates."""
  members = [member for member in comparison["members"] if member["pair"] == dense]
  return sorted(members, key=lambda member: (member["kind"] != "dense", not member["matched"]))


def equal_names(comparison: Mapping[str, Any]) -> set[str]:
  """The matches whose step time is equal to their dense model's, within the tolerance."""
  return {pair["moe"] for pair in comparison["pairs"] if pair["within_tolerance"]}


def dense_names(comparison: Mapping[str, Any]) -> list[str]:
  """The dense members' names, by which pairs go, in the order of the file."""
  return list(dict.fromkeys(member["pair"] for member in comparison["members"]))


def task_keys(comparison: Mapping[str, Any]) -> list[str]:
  """Keys of the members' benchmark scores, as in tasks/arc_easy/acc, in the order of the file."""
  keys = dict.fromkeys(key for member in comparison["members"] for key in member)
  return [key for key in keys if key.startswith(TASKS) and not key.endswith("_stderr")]


def _member(member: Any, source: str) -> dict[str, Any]:
  member = _keys(member, source, ("name", "kind", "pair"))
  member = _numbers(member, source, (*MEMBER_NUMBERS, *(key for key in member if key.startswith(TASKS))))
  _texts(member, source, "name", "pair")
  if member["kind"] not in KINDS:
    raise UserError(f"{source}: kind={member['kind']!r} is not one of {', '.join(KINDS)}; {AGAIN}")
  return {**member, "matched": bool(member.get("matched", member["kind"] == "dense"))}


def _pair(pair: Any, source: str) -> dict[str, Any]:
  pair = _numbers(_keys(pair, source, ("dense", "moe")), source, PAIR_NUMBERS)
  _texts(pair, source, "dense")
  return {"within_tolerance": None, "verdict": None, **pair}


def _keys(value: Any, source: str, names: tuple[str, ...]) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise UserError(f"{source} is {type(value).__name__}, not an object; {AGAIN}")
  lacking = [name for name in names if name not in value]
  if lacking:
    raise UserError(f"{source} lacks {', '.join(lacking)}; {AGAIN}")
  return value


def _texts(values: dict[str, Any], source: str, *names: str) -> None:
  for name in names:
    if not isinstance(values[name], str):
      raise UserError(f"{source}: {name}={values[name]!r} is not text; {AGAIN}")


def _list(comparison: dict[str, Any], name: str, source: str) -> list:
  if not isinstance(comparison[name], list):
    raise UserError(f"{source}: {name} is not a list; {AGAIN}")
  return comparison[name]


def _numbers(value: Any, source: str, names: tuple[str, ...]) -> dict[str, Any]:
  value = {**dict.fromkeys(names), **_keys(value, source, ())}
  for name in names:
    if value[name] is not None and (isinstance(value[name], bool) or not isinstance(value[name], int | float)):
      raise UserError(f"{source}: {name}={value[name]!r} is not a number; {AGAIN}")
  return value
