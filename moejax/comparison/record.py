"""Reads and checks comparison.json, the file with every number of a comparison."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

from moejax.comparison.quantities import Number
from moejax.errors import UserError
from moejax.files import finite, read_json

KINDS = ("dense", "moe")
AGAIN = "run `moejax compare` again to rewrite it"
TASKS, GOODPUT = "tasks/", "goodput/"
"""Prefixes of the keys of benchmark scores and of goodput."""
INFERENCE = "inference"
"""Key of a member in comparison.json with its inference cost, if it was measured."""

CANDIDATE, DENSE, NO_DIFFERENCE = "candidate better", "dense better", "no difference found"
NOT_ESTABLISHED, NOT_COMPARABLE = "not established", "not comparable"
"""Outcomes."""
ESTABLISHED, VIOLATED = "established", "violated"
"""Values of `equal_time`, besides NOT_ESTABLISHED."""

Interval = tuple[float | None, float | None] | None
"""Lower and upper end. An end is None if it is not finite."""

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
  """A short run of a member with one learning rate."""

  learning_rate: Number
  loss: Number = None
  """Mean training loss over the last tenth of the steps. None if the run diverged."""
  steps: Number = None
  train_time_s: Number = None
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Further keys of a file."""

  def to_json(self) -> dict[str, Any]:
    return _flat(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
  """One model of a comparison, as in comparison.json: its shape, step time, budget and results."""

  name: str
  kind: str
  """dense or moe."""
  pair: str
  """Name of the dense member of the pair."""
  matched: bool
  """Whether it is the dense member of its pair or the candidate with the closest step time."""
  parameters_total: Number = None
  parameters_active: Number = None
  parameters_embedding: Number = None
  model_flops_per_token: Number = None
  tokens_per_step: Number = None
  step_time_s: Number = None
  step_time_interval_s: Interval = None
  step_time_spread: Number = None
  tokens_per_s: Number = None
  mfu: Number = None
  dropped_fraction: Number = None
  load_max_over_mean: Number = None
  """Load of the most loaded expert divided by the mean load, as of the dropped fraction while step times were measured
  before training."""
  dropped_fraction_trained: Number = None
  load_max_over_mean_trained: Number = None
  """The same over the last tenth of training."""
  budget_s: Number = None
  steps: Number = None
  tokens: Number = None
  bits_per_byte: Number = None
  bits_per_byte_stderr: Number = None
  accuracy: Number = None
  accuracy_stderr: Number = None
  tasks: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  """Benchmark scores by key, such as tasks/arc_easy/acc."""
  goodput: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  """goodput/fraction, and lost seconds by cause, such as goodput/save_s."""
  seed: Number = None
  """Seed of the first run."""
  runs: tuple[str, ...] = ()
  """Names of the runs with a result, which are folders in `runs/`. Results are means over them."""
  bits_per_byte_by_run: tuple[Number, ...] = ()
  train_time_s: Number = None
  compile_time_s: Number = None
  num_layers: Number = None
  d_model: Number = None
  num_experts: Number = None
  experts_per_token: Number = None
  capacity_factor: Number = None
  dispatch: str | None = None
  router: str | None = None
  feed_forward: str | None = None
  optimizer: str | None = None
  learning_rate: Number = None
  """The peak learning rate with which it was trained."""
  learning_rate_trials: tuple[Tried, ...] = ()
  """The learning rates among which it was chosen, if the suite has a sweep."""
  sparse_every: Number = None
  depths: str | None = None
  depths_share: Number = None
  start: str | None = None
  """How an upcycled candidate starts, in words. None: from random parameters."""
  parent: str | None = None
  """Name of the run that it starts from, with the first seed."""
  parent_counts: bool | None = None
  """Whether the training of the parent counts as that of the candidate."""
  parent_time_s: Number = None
  parent_tokens: Number = None
  parent_flops: Number = None
  """Training time, tokens and model FLOPs of the parent, as means over seeds."""
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Other keys of the file, such as those of a later version."""

  def number(self, key: str) -> Number:
    """The field or the benchmark score with this name, or None."""
    return self.tasks.get(key) if key.startswith(TASKS) else getattr(self, key, None)

  @property
  def run_names(self) -> tuple[str, ...]:
    """The names of its runs, one for each seed. The first, which may not have a result yet, is that of the member."""
    return tuple(dict.fromkeys((self.name, *self.runs)))

  @property
  def train_flops(self) -> float:
    """Model FLOPs of its own training."""
    return (self.tokens or 0.0) * (self.model_flops_per_token or 0.0)

  def counted(self, of: str) -> float:
    """The training time (time_s), tokens or model FLOPs (flops) of its parent, as far as they count."""
    return (getattr(self, f"parent_{of}") or 0.0) if self.parent_counts else 0.0

  def to_json(self) -> dict[str, Any]:
    """The object of the member in comparison.json."""
    return _flat(self) | {"learning_rate_trials": [tried.to_json() for tried in self.learning_rate_trials]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Basis:
  """A candidate minus its dense model at equal time, tokens or FLOPs, by their finished runs and loss curves."""

  equal: str
  """time, tokens (and active parameters) or flops."""
  at: Number = None
  """The common seconds, tokens or FLOPs."""
  bits_per_byte_difference: Number = None
  bits_per_byte_difference_interval: Interval = None
  outcome: str | None = None
  """As of `Against`, or not comparable."""
  factor: Number = None
  """Time, tokens or FLOPs of the dense model divided by those of the candidate, at equal loss."""
  factor_interval: Interval = None
  note: str | None = None
  """The dense model of equal active parameters, if it is not that of the pair, or why there is none."""
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shorter:
  """A candidate against its dense model after a fraction of the training budget, from branches of the same runs."""

  budget: Number
  """The fraction."""
  budget_s: Number = None
  bits_per_byte: Number = None
  bits_per_byte_dense: Number = None
  bits_per_byte_difference: Number = None
  bits_per_byte_difference_interval: Interval = None
  whole_run_ratio: Number = None
  outcome: str | None = None
  """As of `Against`."""
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Against:
  """A candidate against its dense model. Differences are candidate minus dense."""

  moe: str | None
  """Name of the candidate, or None before it is matched."""
  step_time_ratio: Number = None
  """Step time of the candidate divided by that of the dense model."""
  step_time_ratio_interval: Interval = None
  """All intervals are at 95 %."""
  within_tolerance: bool | None = None
  """Whether the step time ratio is within the tolerance."""
  whole_run_ratio: Number = None
  """Training time of the candidate, with that of a parent that counts, divided by that of the dense model, as measured
  over whole runs."""
  equal_time: str | None = None
  """established: the interval of the step time ratio and the whole-run ratio are within the tolerance. violated: the
  interval or the whole-run ratio is outside. not established: otherwise."""
  outcome: str | None = None
  """candidate better, dense better, no difference found, or not established."""
  notes: tuple[str, ...] = ()
  """What limits the outcome, in words."""
  bits_per_byte_difference: Number = None
  bits_per_byte_difference_stderr: Number = None
  bits_per_byte_difference_interval: Interval = None
  """It holds for all candidates of the pair together."""
  bits_per_byte_detectable: Number = None
  """The difference that would have been found with a probability of 80 %."""
  accuracy_difference: Number = None
  accuracy_difference_stderr: Number = None
  accuracy_difference_interval: Interval = None
  parameters_active_ratio: Number = None
  start: str | None = None
  """As of `Member`."""
  bases: tuple[Basis, ...] = ()
  """The same comparison at equal time, tokens and FLOPs."""
  shorter_budgets: tuple[Shorter, ...] = ()
  """The same comparison after shorter budgets."""
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Further keys of a file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchedPair(Against):
  """A dense member and the candidate with the closest step time."""

  dense: str
  best: str | None = None
  """Name of the best candidate of those with equal step time."""
  verdict: str | None = None
  """The outcome in words, with its certainty."""
  candidates: tuple[Against, ...] = ()
  """All candidates, including the closest. The outcome of the pair is about all of them."""
  documents: Number = None
  """Number of held-out documents."""
  documents_effective: Number = None
  """Number of documents of equal size that would be as informative."""

  def to_json(self) -> dict[str, Any]:
    """The object of the pair in comparison.json."""
    return _with_lists(self) | {"candidates": [_with_lists(candidate) for candidate in self.candidates]}

  def against(self, name: str) -> Against | None:
    """The candidate with this name."""
    return next((candidate for candidate in self.candidates if candidate.moe == name), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baselines:
  """Scores of n-gram models of the training text on the held-out text."""

  unigram_bits_per_byte: Number = None
  unigram_bits_per_byte_stderr: Number = None
  bigram_bits_per_byte: Number = None
  bigram_bits_per_byte_stderr: Number = None
  unigram_accuracy: Number = None
  unigram_accuracy_stderr: Number = None
  bigram_accuracy: Number = None
  bigram_accuracy_stderr: Number = None
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Further keys of a file."""

  def to_json(self) -> dict[str, Any]:
    """The object of the baselines in comparison.json."""
    return _flat(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """The content of comparison.json: every number of the report."""

  suite: str
  tolerance: float = 0.05
  complete: bool = False
  """Whether all members that the suite trains have been trained."""
  members: tuple[Member, ...]
  """All members. Each dense member is followed by its candidates."""
  pairs: tuple[MatchedPair, ...]
  finding: str | None = None
  """The outcome as one sentence."""
  bits_per_byte_seed_stddev: Number = None
  """Standard deviation of the bits per byte of one run between seeds, pooled over members with several runs."""
  seed_degrees_of_freedom: Number = None
  """Degrees of freedom of this standard deviation. 0: no member has several runs."""
  learning_rates: str | None = None
  """How the learning rates of the members were chosen, as a sentence."""
  baselines: Baselines = Baselines()
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Further keys of a file."""

  def to_json(self) -> dict[str, Any]:
    """The content of the file as JSON values."""
    whole: dict[str, Any] = _flat(self) | {
      "members": [member.to_json() for member in self.members],
      "pairs": [pair.to_json() for pair in self.pairs],
      "baselines": self.baselines.to_json(),
      "provenance": dict(self.provenance),
    }
    return finite(whole)


def read_comparison(directory: Path) -> Comparison:
  """Reads DIR/comparison.json.

  Raises:
    UserError: If the file is missing, is not JSON, or lacks values that a report needs.
  """
  path = Path(directory) / "comparison.json"
  if not path.is_file():
    raise UserError(f"{path} does not exist; give a directory written by `moejax compare`")
  try:
    content = read_json(path)
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); {AGAIN}") from error
  return from_json(content, str(path))


def from_json(content: Any, source: str = "the comparison") -> Comparison:
  """Converts the result of `to_json` to a comparison.

  Raises:
    UserError: If a value that identifies members or pairs is missing, or a value is not a number.
  """
  content = _object(content, source, ("suite", "members", "pairs"))
  members = tuple(_member(member, f"{source}: members[{i}]") for i, member in _listed(content, "members", source))
  pairs = tuple(_pair(pair, f"{source}: pairs[{i}]") for i, pair in _listed(content, "pairs", source))
  names = [member.name for member in members]
  named = [member.pair for member in members] + [name for pair in pairs for name in (pair.dense, pair.moe)]
  for name in named:
    if name is not None and name not in names:
      raise UserError(f"{source}: a pair names {name!r}, but the members are {', '.join(names)}; {AGAIN}")
  given = {name: value for name, value in content.items() if value is not None}
  _check_numbers(given, source, ("tolerance",))
  _object(given.get("provenance", {}), f"{source}: provenance", ())
  baselines = _record(Baselines, given.get("baselines", {}), f"{source}: baselines")
  return _record(Comparison, given | {"members": members, "pairs": pairs, "baselines": baselines}, source)


def known(value: Any) -> TypeGuard[float]:
  """Whether `value` is a finite number."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def missing(comparison: Comparison, metrics: Mapping[str, Sequence]) -> list[str]:
  """Describes the parts that are missing in an incomplete comparison."""
  members, pairs = comparison.members, comparison.pairs
  lacking = {
    "step time of": [member.name for member in members if member.step_time_s is None],
    "training result of": [member.name for member in members if member.bits_per_byte is None],
    "metrics of": [member.name for member in members if not metrics.get(member.name)],
    "difference within the pair of": [
      pair.dense for pair in pairs if pair.moe is None or pair.bits_per_byte_difference is None
    ],
    "baseline": [
      name
      for name in numbers(Baselines)
      if not name.endswith("_stderr") and getattr(comparison.baselines, name) is None
    ],
  }
  return [f"{what} {', '.join(names)}" for what, names in lacking.items() if names]


def pair_members(comparison: Comparison, dense: str) -> list[Member]:
  """The members of a pair: the dense member, the match, and the other candidates."""
  members = [member for member in comparison.members if member.pair == dense]
  return sorted(members, key=lambda member: (member.kind != "dense", not member.matched))


def equal_names(comparison: Comparison) -> set[str]:
  """The candidates that are established to have equal time."""
  return {name for name, against in candidates(comparison).items() if against.equal_time == ESTABLISHED}


def candidates(comparison: Comparison) -> dict[str, Against]:
  """All candidates by name."""
  return {against.moe: against for pair in comparison.pairs for against in pair.candidates if against.moe is not None}


def dense_names(comparison: Comparison) -> list[str]:
  """Names of the dense members, which identify pairs, in the order of the file."""
  return list(dict.fromkeys(member.pair for member in comparison.members))


def task_keys(comparison: Comparison) -> list[str]:
  """Keys of the benchmark scores of the members, such as tasks/arc_easy/acc, in the order of the file."""
  keys = dict.fromkeys(key for member in comparison.members for key in member.tasks)
  return [key for key in keys if not key.endswith("_stderr")]


def numbers(kind: Any) -> list[str]:
  """The fields of a record that hold a number or None."""
  return [field.name for field in dataclasses.fields(kind) if field.type == Number]


def _member(value: Any, source: str) -> Member:
  value = _object(value, source, ("name", "kind", "pair"))
  _check_texts(value, source, "name", "pair")
  if value["kind"] not in KINDS:
    raise UserError(f"{source}: kind={value['kind']!r} is not one of {', '.join(KINDS)}; {AGAIN}")
  tasks, goodput = (
    {key: number for key, number in value.items() if key.startswith(prefix)} for prefix in (TASKS, GOODPUT)
  )
  _check_numbers(tasks | goodput, source, tasks | goodput)
  matched = bool(value.get("matched", value["kind"] == "dense"))
  others = {key: other for key, other in value.items() if key not in tasks | goodput}
  others |= _records("learning_rate_trials", Tried, others, source, ("learning_rate",))
  return _record(Member, others | {"matched": matched, "tasks": tasks, "goodput": goodput}, source)


def _pair(value: Any, source: str) -> MatchedPair:
  value = _object(value, source, ("dense", "moe"))
  _check_texts(value, source, "dense")
  of_pair = value | _lists(value, source)
  if "candidates" in value:
    parts = [(item, f"{source}: candidates[{i}]") for i, item in _listed(value, "candidates", source)]
    of_pair["candidates"] = tuple(_against(item, at) for item, at in parts)
  return _record(MatchedPair, of_pair, source)


def _against(value: Any, source: str) -> Against:
  value = _object(value, source, ("moe",))
  return _record(Against, value | _lists(value, source), source)


def _lists(value: dict[str, Any], source: str) -> dict[str, Any]:
  bases = _records("bases", Basis, value, source, ("equal",))
  return bases | _records("shorter_budgets", Shorter, value, source, ("budget",))


def _records(
  key: str, kind: Callable[..., Record], value: dict[str, Any], source: str, names: tuple[str, ...]
) -> dict[str, tuple[Record, ...]]:
  """The list `key` of an object as records, or nothing if the object does not have it. `names` must be present."""
  if key not in value:
    return {}
  parts = [(item, f"{source}: {key}[{i}]") for i, item in _listed(value, key, source)]
  return {key: tuple(_record(kind, _object(item, at, names), at) for item, at in parts)}


def _record(kind: Callable[..., Record], value: Any, source: str) -> Record:
  """Makes a record. Keys that are not fields are stored in `more`."""
  value = _object(value, source, ())
  _check_numbers(value, source, numbers(kind))
  for name in [field.name for field in dataclasses.fields(cast(Any, kind)) if field.type == Interval]:
    if value.get(name) is not None:
      _check_interval(value[name], f"{source}: {name}")
  fields = {field.name for field in dataclasses.fields(cast(Any, kind))} - {"more"}
  own, more = ({key: item for key, item in value.items() if (key in fields) is mine} for mine in (True, False))
  return kind(**own, more=more)


def _flat(record: Any) -> dict[str, Any]:
  """The fields of a record by name. Mappings are replaced by their items."""
  flat: dict[str, Any] = {}
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    flat |= value if field.name in ("tasks", "goodput", "more") else {field.name: value}
  return flat


def _with_lists(against: Against) -> dict[str, Any]:
  lists = {"bases": against.bases, "shorter_budgets": against.shorter_budgets}
  return _flat(against) | {name: [_flat(each) for each in found] for name, found in lists.items()}


def _object(value: Any, source: str, names: tuple[str, ...]) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise UserError(f"{source} is {type(value).__name__}, not an object; {AGAIN}")
  lacking = [name for name in names if name not in value]
  if lacking:
    raise UserError(f"{source} lacks {', '.join(lacking)}; {AGAIN}")
  return value


def _listed(content: dict[str, Any], name: str, source: str) -> Iterator[tuple[int, Any]]:
  if not isinstance(content[name], list):
    raise UserError(f"{source}: {name} is not a list; {AGAIN}")
  return enumerate(content[name])


def _check_texts(values: dict[str, Any], source: str, *names: str) -> None:
  for name in names:
    if not isinstance(values[name], str):
      raise UserError(f"{source}: {name}={values[name]!r} is not text; {AGAIN}")


def _check_interval(value: Any, source: str) -> None:
  if not isinstance(value, list | tuple) or len(value) != 2:
    raise UserError(f"{source}={value!r} is not a pair of numbers; {AGAIN}")
  _check_numbers(dict(zip(("low", "high"), value, strict=True)), source, ("low", "high"))


def _check_numbers(values: dict[str, Any], source: str, names: Iterable[str]) -> None:
  for name in names:
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
      raise UserError(f"{source}: {name}={value!r} is not a number; {AGAIN}")
