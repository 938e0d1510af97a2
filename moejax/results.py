"""The results that the functions of `moejax.api` return."""

import dataclasses
import pathlib
from typing import Any

from rich.table import Table
from rich.text import Text

from moejax.notebook import html_table
from moejax.terminal import Fitting


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained run."""

  directory: pathlib.Path
  """The run directory, with the checkpoints, metrics.jsonl and summary.json."""
  summary: dict[str, Any] = dataclasses.field(repr=False)
  """The content of summary.json."""

  @property
  def bits_per_byte(self) -> float:
    """Bits per byte on held-out text."""
    return self.summary["held_out/bits_per_byte"]

  @property
  def steps(self) -> int:
    return self.summary["steps"]

  def __repr__(self) -> str:
    numbers = f"steps={self.steps}, bits_per_byte={self.bits_per_byte:.4f}"
    return f"Trained({self.summary['name']!r}, {numbers}, directory={str(self.directory)!r})"

  def __rich__(self) -> Fitting:
    """The numbers of summary.json, one per line."""
    table = Table(box=None, show_header=False, pad_edge=False, title=Text(self.summary["name"]), title_justify="left")
    table.add_column(justify="right", style="dim")
    table.add_column()
    for name, value in self.summary.items():
      if isinstance(value, int | float):
        table.add_row(Text(name), f"{value:,}" if isinstance(value, int) else f"{value:,.5g}")
    return Fitting(table)

  def _repr_html_(self) -> str:
    rows = [(name, value) for name, value in self.summary.items() if isinstance(value, int | float)]
    return html_table(self.summary["name"], [*rows, ("directory", self.directory)])


@dataclasses.dataclass(frozen=True)
class Compared:
  """A completed comparison."""

  directory: pathlib.Path
  """The comparison directory, with comparison.json, the report and one run directory per member."""
  comparison: Any = dataclasses.field(repr=False)
  """All numbers of the report, as a `moejax.comparison.record.Comparison`. `to_json` returns the content of
  comparison.json."""

  @property
  def finding(self) -> str:
    """The outcome as one sentence."""
    return self.comparison.finding

  @property
  def members(self) -> tuple[Any, ...]:
    """Configuration and results of each model, as `moejax.comparison.record.Member`."""
    return self.comparison.members

  @property
  def pairs(self) -> tuple[Any, ...]:
    """The dense members with their matches, as `moejax.comparison.record.MatchedPair`."""
    return self.comparison.pairs

  @property
  def report(self) -> pathlib.Path:
    """Path of the HTML report."""
    return self.directory / "report" / "index.html"

  def __repr__(self) -> str:
    return f"Compared({self.comparison.suite!r}, finding={self.finding!r}, report={str(self.report)!r})"

  def _repr_html_(self) -> str:
    rows = [(f"{pair.dense} and {pair.moe}", pair.verdict) for pair in self.pairs]
    return html_table(self.comparison.suite, [("finding", self.finding), *rows, ("report", self.report)])


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """Benchmark scores of a trained run."""

  directory: pathlib.Path
  """The run directory, with results.json."""
  scores: dict[str, Any]
  """The main score of each benchmark, as a `moejax.evaluation.tasks.Score`."""
  results: dict[str, Any] = dataclasses.field(repr=False)
  """The content of results.json, in the format of lm-evaluation-harness."""

  def _repr_html_(self) -> str:
    rows = [(f"{name}, {score.metric}", score.value) for name, score in self.scores.items()]
    return html_table(f"benchmarks of {self.directory}", rows)
