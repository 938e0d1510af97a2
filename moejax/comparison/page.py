"""Makes the report: a page that holds its styles, scripts, figures and data, and loads nothing."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import markupsafe

from moejax.comparison import basis, curves, page_tables, palette, quantities, record, statement
from moejax.comparison.configurations import configuration_table, differences
from moejax.comparison.findings import CERTAINTY
from moejax.comparison.page_tables import Table
from moejax.comparison.plots.drawing import theme
from moejax.comparison.plots.figure import Figure
from moejax.comparison.plots.speed_accuracy import task_measures
from moejax.comparison.record import Comparison

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)


@dataclasses.dataclass(frozen=True)
class Figures:
  """The figures of a report by section."""

  pairs: tuple[Figure, ...] = ()
  speed: tuple[Figure, ...] = ()
  losses: tuple[Figure, ...] = ()
  loads: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
  """By run."""
  routers: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
  """By run."""
  times: tuple[Figure, ...] = ()

  def all(self) -> Iterable[Figure]:
    return (*self.pairs, *self.speed, *self.losses, *self.loads.values(), *self.routers.values(), *self.times)


def page(
  comparison: Comparison,
  metrics: Mapping[str, curves.Metrics],
  configurations: Mapping[str, Mapping[str, str]],
  figures: Figures,
  library: str,
  live: bool = False,
) -> str:
  """The whole document.

  Args:
    comparison: the content of comparison.json.
    metrics: the records of metrics.jsonl by run.
    configurations: the fields of experiment.json by member.
    figures: the figures.
    library: the script that draws them.
    live: whether the page is served, so that it can reload itself and has no directory beside it.
  """
  lacking = [] if comparison.complete else record.missing(comparison, metrics)
  tables = _tables(comparison, metrics, configurations)
  tolerance = quantities.percent(comparison.tolerance, 0)
  return TEMPLATES.get_template("report.html").render(
    comparison=comparison,
    colors=[palette.variables(comparison), palette.variables(comparison, dark=True)],
    member_colors=palette.member_colors(comparison),
    lacking=lacking,
    rests_on=basis.rests_on(comparison, metrics),
    would_change=basis.would_change(comparison, metrics),
    next_steps=basis.next_steps(comparison, metrics, lacking),
    cards=[(pair, statement.equal_time(pair, tolerance), statement.facts(pair)) for pair in comparison.pairs],
    tolerance=tolerance,
    figures=figures,
    drawn={figure.name: _drawn(figure) for figure in figures.all()},
    config=theme(FONT),
    library=library,
    untrained=[member.name for member in comparison.members if member.bits_per_byte is None],
    warnings=[f"{name}: {text}" for name, rows in metrics.items() for row in rows for text in row.get("warnings", ())],
    certainty=CERTAINTY,
    several_runs=[member.name for member in comparison.members if len(member.runs) > 1],
    logged=[(name, quote(name)) for name, rows in metrics.items() if rows],
    data=json.dumps(comparison.to_json(), indent=2),
    live=live,
    quote=quote,
    **tables,
  )


def waiting_page(directory: str, reason: str) -> str:
  """The page that is served until there are results. It reloads itself."""
  return TEMPLATES.get_template("waiting.html").render(directory=directory, reason=reason)


def _tables(
  comparison: Comparison, metrics: Mapping[str, curves.Metrics], configurations: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
  measures = task_measures(comparison)
  numbers = {member.name: member.to_json() for member in comparison.members}
  pairs = {f"{pair.dense} and {pair.moe}": pair.to_json() for pair in comparison.pairs}
  return {
    "members": page_tables.members_table(comparison),
    "numbers": page_tables.numbers_table("numbers", "Every number of every member", numbers),
    "pair_numbers": page_tables.numbers_table("pairs", "Every number of every pair", pairs),
    "learning_rates": page_tables.learning_rates_table(comparison),
    "candidates": statement.candidates_table(comparison),
    "fairness": statement.fairness_table(comparison),
    "shorter_budgets": statement.shorter_budgets_table(comparison),
    "benchmarks": page_tables.benchmarks_table(comparison, measures) if measures else None,
    "inference": page_tables.inference_table(comparison),
    "goodput": page_tables.goodput_table(comparison) if any(m.goodput for m in comparison.members) else None,
    "routers": {run: _router_table(run, metrics) for member in comparison.members for run in member.run_names},
    "differences": differences(comparison, configurations),
    "configurations": configuration_table(configurations) if configurations else None,
    "provenance": page_tables.provenance_table(comparison.provenance),
  }


def _router_table(name: str, metrics: Mapping[str, curves.Metrics]) -> Table | None:
  return page_tables.router_table(name, metrics[name])


def _drawn(figure: Figure) -> dict[str, Any]:
  """What the page's script needs to draw a figure."""
  return {
    "spec": figure.spec,
    "choices": [
      {
        "label": choice.label,
        "options": [{"label": o.label, "patch": o.patch, "file": o.file, "alt": o.alt} for o in choice.options],
      }
      for choice in figure.choices
    ],
  }


def _coded(text: str) -> markupsafe.Markup:
  """Escapes `text` and marks what stands between backticks as code."""
  parts = [markupsafe.escape(part) for part in text.split("`")]
  return markupsafe.Markup("").join(
    markupsafe.Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
  )


TEMPLATES.filters["coded"] = _coded
