"""The time of whole runs by cause: useful steps, waiting for input, stalls, evaluation, saving and so on."""

from typing import Any

from moejax.comparison.palette import LAYERS
from moejax.comparison.plots.figure import NUMBER, WIDTH, Choice, Figure, Option, Spec, rounded, told
from moejax.comparison.quantities import duration, percent
from moejax.comparison.record import GOODPUT, Comparison, Member, known
from moejax.training.goodput import WITHIN_STEPS

STEPS, PARENT = "useful steps", "parent of an upcycled candidate"
CAUSES = {
  "input_s": ("waiting for input", LAYERS[5]),
  "stalled_s": ("stalls", LAYERS[4]),
  "skipped_s": ("skipped steps", LAYERS[3]),
  "repeated_s": ("repeated steps", LAYERS[0]),
  "evaluation_s": ("evaluation", LAYERS[1]),
  "save_s": ("saving", LAYERS[2]),
  "restore_s": ("restoring", "var(--muted)"),
}
"""Name and color of the causes of lost time, in the order of a bar."""


def time_by_cause(comparison: Comparison) -> Figure | None:
  """A bar for each trained member, the mean over its runs. None if no member has the time of its runs."""
  rows = [row for member in comparison.members for row in _rows(member)]
  if not rows:
    return None
  names = list(dict.fromkeys(row["member"] for row in rows))
  useful = {row["member"]: row for row in rows if row["cause"] == STEPS}
  listed = "; ".join(
    f"{name} {duration(sum(row['seconds'] for row in rows if row['member'] == name))}, of which "
    f"{percent(useful[name]['share'])} are useful steps"
    for name in names
  )
  shown = [cause for cause in _colors() if any(row["cause"] == cause for row in rows)]
  titles = {"seconds": "time of a run (s)", "share": "share of the time of a run"}
  options = tuple(
    Option(field, {"encoding": {"x": {"field": field, "axis": {"title": title}}}}, f"time_by_cause_{field}")
    for field, title in titles.items()
  )
  return Figure(
    name="time_by_cause",
    title="Time of whole runs by cause",
    alt=f"Time of whole runs: {listed}.",
    caption="Means over the seeds of a member. Members are compared by the time of all steps, with input, stalls and "
    "skipped steps; evaluation, saving, restoring and repeated steps are not part of it.",
    spec=_spec(rows, names, shown),
    choices=(Choice("Show", options),),
  )


def _rows(member: Member) -> list[dict[str, Any]]:
  """The seconds of each cause."""
  if not known(member.train_time_s) or not member.goodput:
    return []
  lost_s = {cause: member.goodput.get(f"{GOODPUT}{cause}") or 0.0 for cause in _lost(member)}
  useful_s = max(0.0, member.train_time_s - sum(lost_s.get(cause, 0.0) for cause in WITHIN_STEPS))
  seconds = {STEPS: useful_s, **{_name(cause): value for cause, value in lost_s.items()}}
  seconds[PARENT] = member.counted("time_s")
  whole_s = sum(seconds.values())
  return [
    {"member": member.name, "cause": cause, "order": order, "seconds": rounded(seconds[cause]),
     "share": rounded(seconds[cause] / whole_s)}
    for order, cause in enumerate(_colors()) if seconds.get(cause) or cause == STEPS
  ]  # fmt: skip


def _lost(member: Member) -> list[str]:
  """The causes of a member, without the fraction of useful time."""
  return [cause for key in member.goodput if (cause := key.removeprefix(GOODPUT)) in CAUSES]


def _name(cause: str) -> str:
  return CAUSES[cause][0]


def _colors() -> dict[str, str]:
  """Color by name of the cause, in the order of a bar."""
  return {PARENT: "var(--accent)", STEPS: "var(--axis)"} | dict(CAUSES.values())


def _spec(rows: list[dict[str, Any]], names: list[str], shown: list[str]) -> Spec:
  colors = _colors()
  return {
    "width": WIDTH,
    "height": max(80, 30 * len(names)),
    "data": {"values": rows},
    "mark": {"type": "bar"},
    "encoding": {
      "x": {"field": "seconds", "type": "quantitative", "axis": {"title": "time of a run (s)", "labelExpr": NUMBER}},
      "y": {"field": "member", "type": "nominal", "sort": names, "axis": {"title": None}},
      "order": {"field": "order", "type": "quantitative"},
      "color": {
        "field": "cause", "type": "nominal", "legend": {"title": None},
        "scale": {"domain": shown, "range": [colors[cause] for cause in shown]},
      },
      "tooltip": [
        told("member", "member"), told("cause", "cause"), told("seconds", "seconds", ",.3~f"),
        told("share", "share", ".1%"),
      ],
    },
  }  # fmt: skip
