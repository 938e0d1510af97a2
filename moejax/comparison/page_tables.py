"""Tables of the report: members and baselines, router metrics, provenance, and all numbers.

L stacked layers  Z = points of a curve
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moejax.comparison import curves, quantities
from moejax.comparison.markup import Markup, element, join
from moejax.comparison.plots.speed_accuracy import Measure
from moejax.comparison.quantities import MISSING, Number
from moejax.comparison.record import GOODPUT, Baselines, Comparison, Member, equal_names, known

HEADS = (
  "Member", "Total parameters", "Active parameters", "Step time", "Tokens/s", "MFU", "Budget", "Steps",
  "Tokens", "Bits per byte", "Accuracy %",
)  # fmt: skip


def members_table(comparison: Comparison, colors: Mapping[str, str]) -> Markup:
  """One row per member, in the order of the file, followed by the baselines."""
  equal = equal_names(comparison)
  rows = [_member_row(member, colors[member.name], role(member, equal)) for member in comparison.members]
  head = element("thead", element("tr", *(element("th", text, scope="col") for text in HEADS)))
  body = element("tbody", *rows)
  baselines = element("tbody", *_baseline_rows(comparison.baselines), class_="baselines")
  table = element("table", head, body, baselines, class_="members narrow sortable")
  return _scroll("Members and baselines", table)


def benchmarks_table(comparison: Comparison, colors: Mapping[str, str], measures: Sequence[Measure]) -> Markup:
  """One row per member and one column per benchmark, followed by their average."""
  equal = equal_names(comparison)
  heads = ("Member", *(measure.label.partition(" (axis")[0] for measure in measures))
  rows = [
    element(
      "tr",
      _name(member, colors[member.name], role(member, equal)),
      *(_score(member, measure) for measure in measures),
    )
    for member in comparison.members
  ]
  head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
  return _scroll("Benchmarks", element("table", head, element("tbody", *rows), class_="members narrow sortable"))


def goodput_table(comparison: Comparison, colors: Mapping[str, str]) -> Markup:
  """One row per trained member: goodput, and lost time by cause."""
  fraction, equal = f"{GOODPUT}fraction", equal_names(comparison)
  members = [member for member in comparison.members if member.goodput]
  causes = [key for key in dict.fromkeys(key for member in members for key in member.goodput) if key != fraction]
  heads = ("Member", "Goodput", *(f"Lost: {key.removeprefix(GOODPUT).removesuffix('_s')}" for key in causes))
  rows = [
    element(
      "tr",
      _name(member, colors[member.name], role(member, equal)),
      _number(member.goodput.get(fraction), quantities.percent(member.goodput.get(fraction))),
      *(_number(lost, quantities.duration(lost) if lost else "0 s") for lost in lost_s),
    )
    for member in members
    for lost_s in [[member.goodput.get(key, 0.0) for key in causes]]
  ]
  head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
  return _scroll("Goodput", element("table", head, element("tbody", *rows), class_="members narrow sortable"))


def _score(member: Member, measure: Measure) -> Markup:
  value, stderr = member.number(measure.key), member.number(f"{measure.key}_stderr")
  in_percent = measure.scale != 1.0
  return _number(
    value, quantities.with_stderr(value, stderr, scale=measure.scale) if in_percent else quantities.count(value)
  )


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
  others = {"feed-forward": member.feed_forward, "optimizer": member.optimizer}
  parts += [f"{name} {kind}" for name, kind in others.items() if kind not in (None, *USUAL)]
  return "; ".join(parts)


USUAL = ("mlp", "AdamW")
"""Kinds that the report does not mention."""


def role(member: Member, equal: set[str]) -> str:
  if member.kind == "dense":
    return "dense"
  if not member.matched:
    return "MoE, other candidate"
  return "MoE, matched" if member.name in equal else "MoE, closest but not equal"


def router_table(name: str, metrics: curves.Metrics) -> Markup | None:
  """The final router metrics of one member, or None if none were logged."""
  columns = {
    "Largest / mean load": ("router/load_max_over_mean", lambda value: f"{value:.2f}"),
    "Dropped": ("router/dropped_fraction", lambda value: quantities.percent(value, 2)),
    "Entropy (nats)": ("router/entropy", lambda value: f"{value:.3f}"),
  }
  ends: dict[str, dict[int, str]] = {}
  for head, (key, text) in columns.items():
    _, layers, values_ZL = curves.per_layer(metrics, key)
    if layers:
      ends[head] = {layer: text(end) for layer, end in zip(layers, curves.last_tenth(values_ZL), strict=True)}
  if not ends:
    return None
  layers = sorted(set().union(*ends.values()))
  head = element("tr", element("th", "Layer", scope="col"), *(element("th", text, scope="col") for text in ends))
  rows = [
    element(
      "tr",
      element("th", f"layer {layer}", scope="row"),
      *(element("td", column.get(layer, MISSING)) for column in ends.values()),
    )
    for layer in layers
  ]
  return _scroll(
    f"Routers of {name}", element("table", element("thead", head), element("tbody", *rows), class_="narrow")
  )


def provenance_table(provenance: Mapping[str, Any]) -> Markup:
  """Nested values as rows with dotted names."""
  rows = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in _flatten(provenance)]
  return _scroll("Provenance", element("table", element("tbody", *rows), class_="words"))


def numbers_table(comparison: Comparison) -> Markup:
  """All values of all members, without rounding."""
  members = [member.to_json() for member in comparison.members]
  keys = [key for key in dict.fromkeys(key for member in members for key in member) if key != "name"]
  head = element(
    "tr", element("th", "Key", scope="col"), *(element("th", member["name"], scope="col") for member in members)
  )
  rows = [
    element("tr", element("th", key, scope="row"), *(element("td", _raw(member.get(key))) for member in members))
    for key in keys
  ]
  table = element("table", element("thead", head), element("tbody", *rows), class_="numbers")
  return _scroll("Every number of every member", table)


def _member_row(member: Member, color: str, part: str) -> Markup:
  step_time: Markup = join(quantities.duration(member.step_time_s))
  if known(member.step_time_s) and known(member.step_time_spread):
    step_time = join(step_time, element("span", f"± {quantities.percent(member.step_time_spread)}", class_="under"))
  mfu: Markup = join("unknown peak" if member.mfu is None else quantities.percent(member.mfu))
  if member.dropped_fraction:
    mfu = join(mfu, element("span", f"{quantities.percent(member.dropped_fraction)} dropped", class_="under"))
  return element(
    "tr",
    _name(member, color, "; ".join(text for text in (part, shape(member)) if text)),
    _number(member.parameters_total, quantities.count(member.parameters_total)),
    _number(member.parameters_active, quantities.count(member.parameters_active)),
    _number(member.step_time_s, step_time),
    _number(member.tokens_per_s, quantities.count(member.tokens_per_s)),
    _number(
      member.mfu,
      mfu if member.step_time_s is not None else MISSING,
      class_="wrap" if member.mfu is None else None,
    ),
    _number(member.budget_s, quantities.duration(member.budget_s)),
    _number(member.steps, quantities.whole(member.steps)),
    _number(member.tokens, quantities.count(member.tokens)),
    _number(member.bits_per_byte, quantities.with_stderr(member.bits_per_byte, member.bits_per_byte_stderr)),
    _number(member.accuracy, quantities.with_stderr(member.accuracy, member.accuracy_stderr, scale=100.0)),
  )


def _name(member: Member, color: str, words: str) -> Markup:
  hollow = " hollow" if not member.matched else ""
  swatch = element("span", class_=f"swatch{hollow}", style=f"background:{color};border-color:{color}")
  return element("th", swatch, member.name, element("small", words), scope="row")


def _baseline_rows(baselines: Baselines) -> Iterator[Markup]:
  for name in ("unigram", "bigram"):
    bits, accuracy = getattr(baselines, f"{name}_bits_per_byte"), getattr(baselines, f"{name}_accuracy")
    yield element(
      "tr",
      element("th", f"{name} baseline", element("small", f"token {name} counts of the training text"), scope="row"),
      *(element("td") for _ in HEADS[1:-2]),
      element("td", quantities.with_stderr(bits, None)),
      element("td", quantities.with_stderr(accuracy, None, scale=100.0)),
    )


def _number(value: Number, text: object, **attributes: str | None) -> Markup:
  return element("td", text, data_value=repr(value) if known(value) else "", **attributes)


def _scroll(label: str, table: Markup) -> Markup:
  """A frame in which a wide table scrolls. It is focusable, so that the keyboard can scroll it."""
  return element("div", table, class_="scroll", role="region", aria_label=label, tabindex="0")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", _raw(value)


def _raw(value: Any) -> str:
  if value is None:
    return MISSING
  if isinstance(value, list):
    return ", ".join(_raw(item) for item in value)
  return value if isinstance(value, str) else json.dumps(value)
