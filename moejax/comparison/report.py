"""Writes the report of a comparison directory: report/index.html and its figures as SVG and PNG."""

from pathlib import Path

from moejax.comparison import curves, palette, record
from moejax.comparison.configurations import read_configurations
from moejax.comparison.page import Figures, page
from moejax.comparison.plots.differences import differences
from moejax.comparison.plots.drawing import draw, library
from moejax.comparison.plots.expert_load import expert_load
from moejax.comparison.plots.loss_curves import loss_curves
from moejax.comparison.plots.routing import routing
from moejax.comparison.plots.speed_accuracy import speed_accuracy
from moejax.comparison.plots.time_by_cause import time_by_cause
from moejax.files import write_whole


def write_report(directory: Path) -> Path:
  """Writes DIR/report/ from DIR/comparison.json and DIR/runs/. Returns the path of its index.html.

  The report of an incomplete comparison lists the parts that are missing.

  Raises:
    UserError: If comparison.json is missing, is not JSON, or lacks values that a report needs.
  """
  directory = Path(directory)
  comparison, figures, html = _made(directory, live=False)
  report = directory / "report"
  report.mkdir(exist_ok=True)
  colors = palette.variables(comparison)
  for figure in figures.all():
    for name, spec in figure.drawings().items():
      svg, png = draw(spec, figure.title, figure.statement, colors)
      write_whole(report / f"{name}.svg", svg)
      write_whole(report / f"{name}.png", png)
  # The page is written last, so that its figures exist.
  write_whole(report / "index.html", html)
  return report / "index.html"


def report_page(directory: Path, live: bool = False) -> str:
  """The page as it is now. Writes nothing.

  Args:
    directory: the directory of a comparison.
    live: whether the page is served, so that it reloads itself and links to no file beside it.

  Raises:
    UserError: As in `write_report`.
  """
  return _made(Path(directory), live)[2]


def _made(directory: Path, live: bool) -> tuple[record.Comparison, Figures, str]:
  comparison = record.read_comparison(directory)
  runs = [run for member in comparison.members for run in member.run_names]
  metrics = {run: curves.read_metrics(directory / "runs" / run / "metrics.jsonl") for run in runs}
  pairs, speed, times = differences(comparison), speed_accuracy(comparison), time_by_cause(comparison)
  figures = Figures(
    (pairs,) if pairs else (),
    (speed,) if speed else (),
    tuple(loss_curves(comparison, metrics)),
    expert_load(comparison, metrics),
    routing(comparison, metrics),
    (times,) if times else (),
  )
  configurations = read_configurations(comparison, directory)
  return comparison, figures, page(comparison, metrics, configurations, figures, library(), live)
