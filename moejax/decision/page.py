"""Formats a decision for the terminal and as a self-contained HTML page."""

from collections.abc import Iterable, Sequence
from urllib.parse import quote

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.comparison import page_tables
from moejax.comparison.page import FONT, TEMPLATES
from moejax.comparison.palette import DARK, LIGHT
from moejax.comparison.plots.drawing import library, theme
from moejax.config.parameters import parameter_counts
from moejax.decision.answer import headline, sentences
from moejax.decision.candidates import Candidate
from moejax.decision.decide import Decision
from moejax.decision.figures import decision_figures
from moejax.terminal import Fitting

LAW_HEADS = ("law", "weight", "MoE better", "gap, nats", "outside its range")
CANDIDATE_HEADS = ("candidate", "total", "active", "step, s", "by", "GiB a device", "chosen as")
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


def law_errors(decision: Decision) -> list[str]:
  """The standard deviation of the error of each law, where it comes from, and how large it is for the MoE."""
  sparse = decision.sparse.timed
  tokens = decision.budget.seconds / sparse.seconds_per_token
  return [
    f"{one.law.name}: {one.law.error:.3g} nats ({one.law.error_source}); for the best MoE, "
    f"{one.law.spread(sparse.shape, tokens):.3g} nats"
    for one in decision.laws
  ]


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


def as_html(decision: Decision) -> str:
  """A page without external files, with the style and the library of the report of a comparison."""
  figures = decision_figures(decision)
  return TEMPLATES.get_template("decision.html").render(
    title=headline(decision),
    sentences=sentences(decision),
    figures=figures,
    drawn={figure.name: {"spec": figure.spec, "choices": []} for figure in figures},
    config=theme(FONT),
    colors=(LIGHT, DARK),
    library=library(),
    laws=_page_table("laws", "By law", LAW_HEADS, law_rows(decision)),
    sources=law_sources(decision),
    errors=law_errors(decision),
    candidates=_page_table("candidates", "Candidates", CANDIDATE_HEADS, candidate_rows(decision)),
    serving=_page_table("serving", "Serving (roofline)", SERVING_HEADS, serving_rows(decision)),
    notes=[*decision.notes, _basis(decision)],
    live=True,  # no files lie beside it
    quote=quote,
  )


def _page_table(name: str, title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> page_tables.Table:
  cells = tuple(tuple(map(page_tables.Cell, row)) for row in rows)
  return page_tables.Table(name, title, tuple(heads), cells, words=True)
