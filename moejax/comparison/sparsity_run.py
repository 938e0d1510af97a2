"""Measures a run with fewer experts, and writes the results: what `moejax sparsity` does."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from moejax import processes
from moejax.comparison.palette import LIGHT
from moejax.comparison.plots.drawing import draw
from moejax.comparison.plots.sparsity import sparsity_plots
from moejax.config.experiment import Experiment
from moejax.evaluation.sparsity import Sweep, measure_run
from moejax.files import write_json, write_whole
from moejax.progress import SILENT, Progress

Score = Callable[[str | None], dict[str, float]]
"""Returns the benchmark scores of a mode by its name, or of all experts for None."""


def run_sparsity(
  directory: pathlib.Path,
  experiment: Experiment,
  sweep: Sweep,
  data: Sequence[str] = (),
  score: Score | None = None,
  progress: Progress = SILENT,
) -> dict[str, Any]:
  """Measures quality and speed of a DS-MoE with fewer experts. Writes sparsity.json of the run and its figures as SVG
  and PNG, and returns the content of the file.

  Args:
    directory: directory of the run.
    experiment: the experiment of the run, possibly with another mesh, rules or evaluation.
    sweep: the modes.
    data: text to score. If empty, the held-out text of the run.
    score: runs benchmarks. None runs none. They come first, so that a wrong name is found early.
    progress: receives progress reports.

  Raises:
    UserError: as `measure_run` and `score`.
  """
  scores = {mode: score(mode) for mode in sweep.names} if score else {}
  found = measure_run(directory, experiment, data, sweep, scores, progress)
  if processes.is_first():
    write_json(directory / "sparsity.json", found)
    for figure in sparsity_plots(found):
      svg, png = draw(figure.spec, figure.title, figure.statement, LIGHT)
      write_whole(directory / f"{figure.name}.svg", svg)
      write_whole(directory / f"{figure.name}.png", png)
  return found
