"""The tables of the report, as values: the page, its sorting and the CSV files are made from the same cells.

L stacked layers  Z = points of a curve
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moejax.comparison import curves, quantities
from moejax.comparison.palette import member_colors
from moejax.comparison.plots.speed_accuracy import Measure, role
from moejax.comparison.quantities import MISSING
from moejax.comparison.record import GOODPUT, INFERENCE, Baselines, Comparison, Member, equal_names, known


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell: the text that is shown, a smaller line below it, and the exact value by which it is sorted."""

  text: str
  value: Any = None
  below: str | None = None
  color: str | None = None
  """Color of the mark in front of the text."""
  hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """A table. The first cell of a row is its heading."""

  name: str
  """Identity on the page, and the name of its CSV file."""
  title: str
  heads: tuple[str, ...]
  rows: tuple[tuple[Cell, ...], ...]
  last: tuple[tuple[Cell, ...], ...] = ()
  """Rows that stay below the others when these are sorted."""
  words: bool = False
  """Whether the cells are text and not numbers."""

  def csv(self) -> str:
    """The table with its exact values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(self.heads)
    for row in (*self.rows, *self.last):
      writer.writerow([_quoted(cell.text) if cell.value is None else _quoted(cell.value) for cell in row])
    return text.getvalue()


def members_table(comparison: Comparison) -> Table:
  """One row per member, in the order of the file, followed by the baselines."""
  heads = (
    "Member", "Total parameters", "Active parameters", "Step time", "Tokens/s", "MFU", "Budget", "Steps", "Tokens",
    "Trained", "Bits per byte", "Accuracy %",
  )  # fmt: skip
  rows = tuple((name, *_numbers_of(member)) for name, member in _named(comparison))
  return Table("members", "Members and baselines", heads, rows, tuple(_baselines(comparison.baselines, len(heads))))


def benchmarks_table(comparison: Comparison, measures: Sequence[Measure]) -> Table:
  """One row per member and one column per benchmark, followed by their average."""
  heads = ("Member", *(measure.label.partition(" (axis")[0] for measure in measures))
  rows = tuple((name, *(_score(member, measure) for measure in measures)) for name, member in _named(comparison))
  return Table("benchmarks", "Benchmarks", heads, rows)


def learning_rates_table(comparison: Comparison) -> Table:
  """One row per member: its learning rate, and the training loss of each rate that was tried."""
  rows = []
  for name, member in _named(comparison):
    tried = [
      f"{quantities.count(rate.learning_rate)}: {'diverged' if rate.loss is None else f'{rate.loss:.4f}'}"
      for rate in member.learning_rate_trials
    ]
    steps = member.learning_rate_trials[0].steps if tried else None
    seconds = [rate.train_time_s for rate in member.learning_rate_trials if rate.train_time_s is not None]
    rows.append(
      (
        name, Cell(quantities.count(member.learning_rate), member.learning_rate),
        Cell(", ".join(tried) or "not tuned"), Cell(quantities.whole(steps), steps),
        Cell(quantities.duration(sum(seconds)), sum(seconds)) if tried else Cell(MISSING),
      )
    )  # fmt: skip
  heads = ("Member", "Learning rate", "Training loss by learning rate", "Steps of a trial", "Time of the trials")
  return Table("learning_rates", "Learning rates", heads, tuple(rows))


def goodput_table(comparison: Comparison) -> Table:
  """One row per trained member: goodput, and lost time by cause."""
  fraction = f"{GOODPUT}fraction"
  causes = dict.fromkeys(key for member in comparison.members for key in member.goodput if key != fraction)
  heads = ("Member", "Goodput", *(f"Lost: {key.removeprefix(GOODPUT).removesuffix('_s')}" for key in causes))
  rows = []
  for name, member in _named(comparison):
    if member.goodput:
      lost_s = [member.goodput.get(key) or 0.0 for key in causes]
      lost = [Cell(quantities.duration(seconds) if seconds else "0 s", seconds) for seconds in lost_s]
      useful = member.goodput.get(fraction)
      rows.append((name, Cell(quantities.percent(useful), useful), *lost))
  return Table("goodput", "Goodput", heads, tuple(rows))


def inference_table(comparison: Comparison) -> Table | None:
  """One row per member whose inference was measured, and one column per batch size. None if there is no such member."""
  costs = {member.name: member.more[INFERENCE] for member in comparison.members if INFERENCE in member.more}
  sizes = dict.fromkeys(size for cost in costs.values() for size in cost["tokens_per_s"])
  heads = ("Member", "Experts", "Active parameters", "Perplexity", *(f"Tokens/s, batch {size}" for size in sizes))
  rows = []
  for name, member in _named(comparison):
    if cost := costs.get(member.name):
      active, speeds = cost["parameters_active"], [cost["tokens_per_s"].get(size) for size in sizes]
      increase = Cell(f"{cost['perplexity_increase']:+.1%}", cost["perplexity_increase"])
      rows.append(
        (
          name, Cell(cost["mode"] or "as trained"), Cell(quantities.count(active), active),
          increase if cost["mode"] else Cell("as trained"), *(Cell(quantities.count(speed), speed) for speed in speeds),
        )
      )  # fmt: skip
  return Table("inference", "Inference", heads, tuple(rows)) if rows else None


def router_table(name: str, metrics: curves.Metrics) -> Table | None:
  """The final router metrics of one member, or None if none were logged."""
  columns = {
    "Largest / mean load": ("router/load_max_over_mean", lambda value: f"{value:.2f}"),
    "Dropped": ("router/dropped_fraction", lambda value: quantities.percent(value, 2)),
    "Entropy (nats)": ("router/entropy", lambda value: f"{value:.3f}"),
  }
  ends: dict[str, dict[int, Cell]] = {}
  for head, (key, text) in columns.items():
    _, layers, values_ZL = curves.per_layer(metrics, key)
    if layers:
      last = zip(layers, curves.last_tenth(values_ZL), strict=True)
      ends[head] = {layer: Cell(text(end), float(end)) for layer, end in last}
  if not ends:
    return None
  rows = [
    (Cell(f"layer {layer}", layer), *(column.get(layer, Cell(MISSING)) for column in ends.values()))
    for layer in sorted(set().union(*ends.values()))
  ]
  return Table(f"router-{name}", f"Routers of {name} over the last tenth of training", ("Layer", *ends), tuple(rows))


def provenance_table(provenance: Mapping[str, Any]) -> Table:
  """Nested values as rows with dotted names."""
  rows = tuple((Cell(name), Cell(value)) for name, value in flat(provenance))
  return Table("provenance", "Provenance", ("Key", "Value"), rows, words=True)


def numbers_table(name: str, title: str, records: Mapping[str, Mapping[str, Any]]) -> Table:
  """All values of these records without rounding: a row for each key and a column for each record."""
  flattened = {of: dict(flat(record)) for of, record in records.items()}
  keys = dict.fromkeys(key for record in flattened.values() for key in record)
  rows = tuple((Cell(key), *(Cell(record.get(key, MISSING)) for record in flattened.values())) for key in keys)
  return Table(name, title, ("Key", *records), rows, words=True)


def shape(member: Member) -> str:
  """The model in words: 4 layers, 128 wide; 8 experts, 2 per token, capacity 1.25, one layer in 2 sparse."""
  parts = []
  if known(member.num_layers) and known(member.d_model):
    parts.append(f"{member.num_layers} layers, {member.d_model:,} wide")
  if member.num_experts:
    experts = [f"{member.num_experts} experts"]
    if known(member.experts_per_token):
      experts.append(f"{member.experts_per_token} per token")
    if known(member.capacity_factor):
      experts.append(f"capacity {member.capacity_factor:g}")
    if known(member.sparse_every):
      every = member.sparse_every
      experts.append("every layer sparse" if every == 1 else f"one layer in {every} sparse")
    experts += [f"{name} {kind}" for name, kind in (("router", member.router), ("dispatch", member.dispatch)) if kind]
    parts.append(", ".join(experts))
  if known(member.depths_share):
    parts.append(f"depths {member.depths} with {member.depths_share:.3g} of the tokens")
  if member.start:
    parts.append(member.start)
  others = {"feed-forward": member.feed_forward, "optimizer": member.optimizer}
  parts += [f"{name} {kind}" for name, kind in others.items() if kind not in (None, *USUAL)]
  return "; ".join(parts)


USUAL = ("mlp", "AdamW")
"""Kinds that the report does not mention."""


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
  """Nested values as text by dotted name."""
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", _raw(value)


def _named(comparison: Comparison) -> Iterator[tuple[Cell, Member]]:
  """The heading of the row of each member, and the member."""
  equal, colors = equal_names(comparison), member_colors(comparison)
  for member in comparison.members:
    words = "; ".join(text for text in (role(member, equal), shape(member)) if text)
    yield Cell(member.name, member.name, words, colors[member.name], not member.matched), member


def _numbers_of(member: Member) -> tuple[Cell, ...]:
  spread = quantities.percent(member.step_time_spread) if known(member.step_time_spread) else None
  load = f", load {member.load_max_over_mean:.2f} x mean" if known(member.load_max_over_mean) else ""
  dropped = f"{quantities.percent(member.dropped_fraction)} dropped{load}" if known(member.dropped_fraction) else None
  return (
    Cell(quantities.count(member.parameters_total), member.parameters_total),
    Cell(quantities.count(member.parameters_active), member.parameters_active),
    Cell(quantities.duration(member.step_time_s), member.step_time_s, spread and f"± {spread}"),
    Cell(quantities.count(member.tokens_per_s), member.tokens_per_s),
    Cell(quantities.percent(member.mfu), member.mfu, dropped),
    Cell(quantities.duration(member.budget_s), member.budget_s),
    Cell(quantities.whole(member.steps), member.steps),
    Cell(quantities.count(member.tokens), member.tokens),
    Cell(quantities.duration(member.train_time_s), member.train_time_s, _of_parent(member)),
    Cell(quantities.with_stderr(member.bits_per_byte, member.bits_per_byte_stderr), member.bits_per_byte),
    Cell(quantities.with_stderr(member.accuracy, member.accuracy_stderr, scale=100.0), member.accuracy),
  )


def _of_parent(member: Member) -> str | None:
  """The training time of the parent of an upcycled candidate."""
  if not known(member.parent_time_s):
    return None
  counts = "after" if member.parent_counts else "not counted:"
  return f"{counts} {quantities.duration(member.parent_time_s)} of its parent"


def _baselines(baselines: Baselines, columns: int) -> Iterator[tuple[Cell, ...]]:
  for name in ("unigram", "bigram"):
    bits, accuracy = getattr(baselines, f"{name}_bits_per_byte"), getattr(baselines, f"{name}_accuracy")
    yield (
      Cell(f"{name} baseline", None, f"token {name} counts of the training text"),
      *[Cell("")] * (columns - 3),
      Cell(quantities.with_stderr(bits, None), bits),
      Cell(quantities.with_stderr(accuracy, None, scale=100.0), accuracy),
    )


def _score(member: Member, measure: Measure) -> Cell:
  value, stderr = member.number(measure.key), member.number(f"{measure.key}_stderr")
  if measure.scale == 1.0:
    return Cell(quantities.count(value), value)
  return Cell(quantities.with_stderr(value, stderr, scale=measure.scale), value)


def _quoted(value: Any) -> Any:
  """Text that a spreadsheet would take for a formula, with an apostrophe in front."""
  return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _raw(value: Any) -> str:
  if value is None:
    return MISSING
  if isinstance(value, list):
    return ", ".join(_raw(item) for item in value)
  return value if isinstance(value, str) else json.dumps(value)
