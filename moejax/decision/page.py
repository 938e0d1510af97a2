"""Formats a decision for the terminal and as a self-contained HTML page."""

import html
import io
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.parameters import parameter_counts
from moejax.decision.answer import headline, sentences
from moejax.decision.candidates import Candidate
from moejax.decision.decide import Decision
from moejax.terminal import Fitting

DENSE, SPARSE, MUTED = "#0b3c6b", "#ee7a1c", "#8a8a8a"

LAW_HEADS = ("law", "weight", "MoE better", "gap, nats", "outside its range")
CANDIDATE_HEADS = ("candidate", "total", "active", "step, s", "by", "GiB a device", "")
SERVING_HEADS = ("served model", "devices", "GiB", "step, ms", "device-hours per 1M tokens")


def decision_page(decision: Decision) -> RenderableType:
  """The answer, what would change it, the laws, and the candidates."""
  return Group(
    Text(headline(decision), style="bold"),
    *(Text(f"- {sentence}") for sentence in sentences(decision)),
    *(Text(f"note: {note}", style="yellow") for note in decision.notes),
    _table("by law", LAW_HEADS, law_rows(decision)),
    _table("candidates", CANDIDATE_HEADS, candidate_rows(decision)),
    _table("serving", SERVING_HEADS, serving_rows(decision)),
    Text(_basis(decision), style="dim"),
  )


def _basis(decision: Decision) -> str:
  sources = " and ".join(sorted({decision.dense.source, decision.sparse.source}))
  return (
    f"step times by {sources}; standard deviation of the logarithm of their error: {decision.clock.common:.2f} for all "
    f"models, and {decision.clock.ratio:.2f} for the ratio of MoE to dense"
  )


def law_rows(decision: Decision) -> list[list[str]]:
  """Cells of the table of laws."""
  return [
    [
      one.law.name, f"{one.weight:.2f}", f"{one.probability:.2f}", f"{one.gap:+.3f}",
      ", ".join(f"{name} x{factor:.2g}" for name, factor in one.outside.items()) or "-",
    ]
    for one in decision.laws
  ]  # fmt: skip


def law_sources(decision: Decision) -> list[str]:
  """Source and caution of each law."""
  return ["; ".join(filter(None, (f"{one.law.name}: {one.law.source}", one.law.caution))) for one in decision.laws]


def candidate_rows(decision: Decision) -> list[list[str]]:
  """Cells of the table of candidates, the smallest first."""

  def mark(one: Candidate) -> str:
    names = {decision.dense.name: "best dense", decision.sparse.name: "best MoE"}
    equal = "reaches the loss of the MoE" if decision.equal and one.name == decision.equal.name else ""
    return ", ".join(filter(None, [names.get(one.name, ""), equal]))

  def row(one: Candidate) -> list[str]:
    counted = parameter_counts(one.experiment.model)
    return [
      one.name, f"{counted.total:.3g}", f"{counted.active:.3g}", f"{one.step_time_s:.4g}", one.source,
      f"{one.memory_bytes / 2**30:.1f}", mark(one),
    ]  # fmt: skip

  return [row(one) for one in sorted(decision.candidates, key=lambda one: (not one.is_dense, one.timed.shape.active))]


def serving_rows(decision: Decision) -> list[list[str]]:
  """Cells of the table of serving costs."""
  return [
    [name, str(one.devices), f"{one.memory_bytes / 2**30:,.0f}", f"{one.step_time_s * 1e3:.3g}",
     f"{one.device_seconds_per_token * 1e6 / 3600:.3g}"]
    for name, one in decision.serving.items()
  ]  # fmt: skip


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Fitting:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
  for number, head in enumerate(heads):
    table.add_column(head, justify="right" if 0 < number < len(heads) - 1 else "left")
  for row in rows:
    table.add_row(*map(Text, row))
  return Fitting(table)


def plot_decision(decision: Decision, format: str = "svg") -> bytes:
  """The probability and the gap of the losses for other budgets, the best dense model and the best MoE of each."""
  figure = Figure(figsize=(10, 4), layout="constrained")
  left, right = figure.subplots(1, 2)
  days = [row["days"] for row in decision.curve]
  left.plot(days, [row["probability"] for row in decision.curve], color=SPARSE)
  left.axhline(0.5, color=MUTED, linewidth=0.8)
  left.set(ylim=(0, 1), ylabel="probability that the MoE is better")
  low, middle, high = zip(*(row["gap_nats"] for row in decision.curve), strict=True)
  right.fill_between(days, low, high, color=SPARSE, alpha=0.2, linewidth=0, label="80 % interval")
  right.plot(days, middle, color=SPARSE, label="median")
  right.axhline(0, color=MUTED, linewidth=0.8)
  right.set(ylabel="loss of the dense model minus MoE, nats")
  right.legend(frameon=False)
  for axes in (left, right):
    axes.axvline(decision.budget.days, color=DENSE, linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="days of training (dashed: the budget)")
    axes.grid(alpha=0.25)
  buffer = io.BytesIO()
  figure.savefig(buffer, format=format, dpi=144, metadata={"Date": None} if format == "svg" else None)
  return buffer.getvalue()


STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.3; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; background: #fff; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; } th, td { padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
thead th { border-bottom: 2px solid; }
tbody td { border-top: 1px solid color-mix(in srgb, currentcolor 25%, transparent); }
.note { font-size: .92rem; }
"""


def as_html(decision: Decision) -> str:
  """A page without external files."""
  title = html.escape(headline(decision))
  figure = plot_decision(decision).decode()
  return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1>
<ul>{_items(sentences(decision))}</ul>
<figure role="img" aria-label="Probability and gap of losses by budget">{figure[figure.index("<svg") :]}</figure>
{_html_table("By law", LAW_HEADS, law_rows(decision))}
<ul class="note">{_items(law_sources(decision))}</ul>
{_html_table("Candidates", CANDIDATE_HEADS, candidate_rows(decision))}
{_html_table("Serving (roofline)", SERVING_HEADS, serving_rows(decision))}
<h2>Notes</h2><ul class="note">{_items([*decision.notes, _basis(decision)])}</ul>
</main></body></html>
"""


def _items(texts: Iterable[str]) -> str:
  return "".join(f"<li>{html.escape(text)}</li>" for text in texts)


def _html_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in heads)
  body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
  return (
    f"<div class='scroll' tabindex='0'><table><caption>{title}</caption><thead><tr>{head}</tr></thead>"
    f"<tbody>{body}</tbody></table></div>"
  )
