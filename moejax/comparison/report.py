"""Writes the report of a comparison directory: report/index.html and its figures as PNG."""

from pathlib import Path

from moejax.comparison import record
from moejax.comparison.page import page
from moejax.comparison.plots.expert_load import expert_load
from moejax.comparison.plots.loss_curves import loss_curves
from moejax.comparison.plots.routing import routing
from moejax.comparison.plots.speed_accuracy import speed_accuracy, task_measures
from moejax.files import write_whole


def write_report(directory: Path) -> Path:
  """Writes DIR/report/ from DIR/comparison.json and DIR/runs/. Returns the path of its index.html.

  The report of an incomplete comparison lists the parts that are missing.

  Raises:
    UserError: If comparison.json is missing, is not JSON, or lacks values that a report needs.
  """
  directory = Path(directory)
  comparison = record.read_comparison(directory)
  names = [member.name for member in comparison.members]
  metrics = {name: record.read_metrics(directory / "runs" / name / "metrics.jsonl") for name in names}
  speed = speed_accuracy(comparison)
  benchmarks = speed_accuracy(comparison, task_measures(comparison))
  losses = loss_curves(comparison, metrics)
  loads, routers = expert_load(comparison, metrics), routing(comparison, metrics)
  report = directory / "report"
  report.mkdir(exist_ok=True)
  for plot in (*speed, *benchmarks, *losses, *loads.values(), *routers.values()):
    write_whole(report / f"{plot.name}.png", plot.png)
  # The page is written last, so that its figures exist.
  html = page(comparison, metrics, speed, losses, loads, routers, benchmarks)
  write_whole(report / "index.html", html)
  return report / "index.html"
