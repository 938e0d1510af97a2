"""Runs a comparison: measure, match, budget, train, evaluate and report. Completed stages are not repeated.

Any number of jobs can run one comparison in a shared directory. One job prepares the text and measures step times while
the others wait. Then each job trains members that no other job has claimed (`claims.py`).
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from moejax import processes
from moejax.comparison.budget import Allotment, allot
from moejax.comparison.claims import train_unclaimed
from moejax.comparison.match import Match, match
from moejax.comparison.measure import Timing, measure, total_steps
from moejax.comparison.outcome import outcome
from moejax.comparison.record import Baselines, Comparison, from_json, read_comparison
from moejax.comparison.report import write_report
from moejax.comparison.stages import read_baselines, read_measurements, read_result
from moejax.config.experiment import Suite
from moejax.data.baselines import ngram_baselines
from moejax.data.target_count import TargetCounter
from moejax.data.text import Text
from moejax.errors import users_mistake
from moejax.files import read_json, write_json
from moejax.interrupts import continuing
from moejax.lock import locked
from moejax.progress import SILENT, Progress, training_facts
from moejax.training.memory import check_together
from moejax.training.prepare import Prepared, Workspace, open_workspace, prepare
from moejax.training.provenance import provenance
from moejax.training.run import Evaluators, MakeEvaluators, run
from moejax.training.run_directory import check_run, claim_comparison, open_run
from moejax.training.state import State

EVALUATION_S = 5.0
"""Initial estimate of the seconds for compiling and running an evaluation, until the first one has been measured."""


def compare(
  suite: Suite, text: Text, directory: pathlib.Path, make_evaluators: MakeEvaluators, progress: Progress = SILENT
) -> Comparison:
  """Runs a suite up to its report. Resumes from the last finished stage.

  Args:
    suite: the suite.
    text: the text of all members, as returned by `open_text`.
    directory: the directory of the comparison, as returned by `open_comparison`.
    make_evaluators: makes the evaluators of a member.
    progress: receives progress reports and notes.

  Raises:
    UserError: If the directory contains another suite, or the data or the devices are not suitable for the suite.
    Interrupted: After SIGINT or SIGTERM during training. The same call resumes.
  """
  with open_workspace(suite.members, text, directory, f"compare {suite.name}", progress, wait=True) as workspace:
    processes.first(lambda: claim_comparison(directory, suite))
    comparison = _Comparison(suite, workspace, make_evaluators, progress)
    with continuing(comparison.saved):
      comparison.count_ngrams()
      comparison.measure()
  with continuing(comparison.saved):
    return comparison.report(shared=comparison.train())


class _Comparison:
  """A comparison in progress. Each stage writes a file. If the file exists, it is read instead of running the stage."""

  baselines: Baselines
  timings: dict[str, Timing]
  matches: list[Match]
  allotments: list[Allotment]

  def __init__(self, suite: Suite, workspace: Workspace, make_evaluators: MakeEvaluators, progress: Progress):
    self.suite, self.workspace, self.make_evaluators, self.progress = suite, workspace, make_evaluators, progress
    self.directory = workspace.directory
    self.counter = TargetCounter(workspace.corpus)
    self._prepared: dict[str, Prepared] = {}
    self._evaluation_s = EVALUATION_S
    self._begin = time.perf_counter()

  def count_ngrams(self) -> None:
    """Computes the n-gram baselines of the text."""

    def baselines() -> dict[str, Any]:
      path = self.directory / "baselines.json"
      if read_baselines(path, self._note_damage) is None:
        self.progress.stage("baselines: unigrams and bigrams")
        write_json(path, ngram_baselines(self.workspace.corpus, self.suite.members[0].evaluation.max_tokens))
      return read_json(path)

    self.baselines = Baselines(**processes.first(baselines))

  def measure(self) -> None:
    """Measures step times, and computes matches and budgets from them."""
    path = self.directory / "measurements.json"
    if not processes.first(path.exists):
      measured = {name: dataclasses.asdict(timing) for name, timing in self._measured().items()}
      processes.first_writes(lambda: write_json(path, measured))
    names = [experiment.name for experiment in self.suite.members]
    measurements = processes.first(lambda: read_measurements(path, names))
    self.timings = {name: Timing(**timing) for name, timing in measurements.items()}
    step_times_s = {name: timing.step_time_s for name, timing in self.timings.items()}
    self.matches = match(self.suite, step_times_s)
    self.allotments = allot(self.suite, self.matches, step_times_s, self.counter)
    for matched in self.matches:
      sign = "=" if matched.within_tolerance else "has no match closer than"
      self.progress.note(f"{matched.dense} {sign} {matched.moe} (step time x {matched.step_time_ratio:.3f})")
    processes.first(self._write_so_far)

  def train(self) -> bool:
    """Trains and evaluates the members that no other job trains, and waits until all are done.

    Returns whether other jobs took part.
    """
    trained = {allotment.name: allotment for allotment in self.allotments if allotment.trained}
    return train_unclaimed(
      [*trained],
      self.directory / "runs",
      lambda name: self._is_done(trained[name]),
      lambda name: self._train(trained[name]),
      self.progress.note,
    )

  def _train(self, allotment: Allotment) -> None:
    """Trains and evaluates a member whose directory this job has locked."""
    run_directory = self.directory / "runs" / allotment.name
    self._show_left(allotment, 0)
    prepared = self._prepare(allotment.name)
    open_run(run_directory, prepared.spec.experiment, allotment.steps)

    def timed(evaluators: Evaluators) -> Evaluators:
      """The evaluators, with measurement of their time."""
      evaluation_s = dict.fromkeys(evaluators, 0.0)

      def score(name: str, state: State) -> Mapping[str, float]:
        begin = time.perf_counter()
        scores = evaluators[name](state)
        evaluation_s[name] = time.perf_counter() - begin
        self._evaluation_s = sum(evaluation_s.values())
        return scores

      return {name: functools.partial(score, name) for name in evaluators}

    run(
      prepared,
      run_directory,
      allotment.steps,
      timed(self.make_evaluators(prepared, run_directory, self.progress)),
      self.progress,
      lambda record: self._show_left(allotment, record["step"]),
      lambda text: self.progress.note(f"warning: {allotment.name}: {text}"),
    )
    self._prepared.pop(allotment.name)  # its program is not needed again

    def write() -> None:
      with self._turn():
        self._write_so_far()

    processes.first(write)

  def _note_damage(self, text: str) -> None:
    self.progress.note(f"warning: {text}")

  def saved(self) -> str | None:
    """Description of the saved state from which the comparison resumes."""
    return f"the measurements in {self.directory}" if (self.directory / "measurements.json").exists() else None

  def report(self, shared: bool) -> Comparison:
    """Returns the complete comparison. The last job writes its report.

    Args:
      shared: whether other jobs took part.
    """

    def reported() -> dict[str, Any]:
      with self._turn():
        if shared and self._is_reported():
          return read_comparison(self.directory).to_json()
        comparison = self._write()
        self.progress.note(f"report: {write_report(self.directory)}")
        return comparison.to_json()

    return from_json(processes.first(reported))

  def _turn(self) -> contextlib.AbstractContextManager[None]:
    """Waits for the lock of the directory. For process 0."""
    return locked(self.directory, f"compare {self.suite.name}", self.progress.note, wait=True)

  def _is_reported(self) -> bool:
    """Whether the report was written after all members were trained."""
    page = self.directory / "report" / "index.html"
    summaries = [self._summary(allotment) for allotment in self.allotments if allotment.trained]
    return page.exists() and page.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in summaries)

  def _write_so_far(self) -> None:
    """Writes comparison.json with the results so far. If this fails, a warning is shown: it is written again."""
    try:
      self._write()
    except OSError as error:
      if not users_mistake(error):
        raise
      self.progress.note(f"warning: {self.directory / 'comparison.json'} could not be written: {users_mistake(error)}")

  def _write(self) -> Comparison:
    summaries = {}
    held_out = {}
    for allotment in self.allotments:
      run_directory = self.directory / "runs" / allotment.name
      if result := read_result(run_directory, allotment.steps, self._note_damage):
        summaries[allotment.name], held_out[allotment.name] = result
    comparison = outcome(
      self.suite,
      self.timings,
      self.matches,
      self.allotments,
      summaries,
      held_out,
      self.baselines,
      provenance() | {"corpus": self.workspace.corpus.summary()},
    )
    write_json(self.directory / "comparison.json", comparison.to_json())
    return comparison

  def _measured(self) -> dict[str, Timing]:
    members = {name: self._prepare(name) for name in self.workspace.placed}
    check_together([member.memory for member in members.values()], next(iter(members.values())).spec.partitioner)
    total = total_steps(len(members), self.suite.measurement)
    self.progress.stage("measure step times, members in turn", total=total)

    seen_s: dict[str, float] = {}

    def observe(name: str, done: int, facts: dict[str, float]) -> None:
      seen_s[name] = facts["step_time_s"]
      if len(seen_s) == len(members):
        self._expect_left(seen_s, total - done)
      self.progress.advance(done, f"{name} {facts['step_time_s'] * 1e3:.1f} ms  {training_facts(facts['loss'])}")

    return measure(members, self.suite.measurement, observe)

  def _prepare(self, name: str) -> Prepared:
    if name not in self._prepared:
      self._prepared[name] = prepare(self.workspace, name, self.progress)
    return self._prepared[name]

  def _show_left(self, current: Allotment, step: int) -> None:
    """Reports the estimated time left for the whole comparison while `current` trains."""
    left_s, passed = 0.0, True
    for allotment in self.allotments:
      passed = passed and allotment is not current
      if allotment.trained and not passed:
        left = 1.0 - (step / allotment.steps if allotment is current else 0.0)
        left_s += left * allotment.steps * self.timings[allotment.name].step_time_s + self._evaluation_s
    self.progress.whole(time.perf_counter() - self._begin, left_s)

  def _expect_left(self, step_times_s: Mapping[str, float], steps_to_measure: int) -> None:
    """Reports the estimated time left for the whole comparison while step times are measured."""
    left_s = steps_to_measure * sum(step_times_s.values()) / len(step_times_s)
    for pair in self.suite.pairs:
      trained = 1 + (len(pair.candidates) if self.suite.train == "all" else 1)
      left_s += trained * (self.counter.steps(pair.dense) * step_times_s[pair.dense.name] + self._evaluation_s)
    self.progress.whole(time.perf_counter() - self._begin, left_s)

  def _is_done(self, allotment: Allotment) -> bool:
    """Whether this member has been trained for its whole budget.

    Raises:
      UserError: If its directory contains another experiment, or its experiment.json is damaged.
    """
    directory = self.directory / "runs" / allotment.name
    experiment = self.workspace.placed[allotment.name].experiment
    if not check_run(directory, experiment, allotment.steps):
      return False  # it has none yet, or has lost it, and then it is evaluated again
    return read_result(directory, allotment.steps, self._note_damage) is not None

  def _summary(self, allotment: Allotment) -> pathlib.Path:
    return self.directory / "runs" / allotment.name / "summary.json"
