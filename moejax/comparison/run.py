"""Runs a comparison: measure, match, budget, tune, train, evaluate and report. Completed stages are not repeated.

Any number of jobs can run one comparison in a shared directory. One job prepares the text and measures step times while
the others wait. Then each job trains members that no other job has claimed (`claims.py`).
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moejax import processes
from moejax.comparison import learning_rates, quantities
from moejax.comparison.against import Results
from moejax.comparison.budget import Allotment, allot
from moejax.comparison.claims import train_unclaimed
from moejax.comparison.inference_cost import measure_inference, with_inference
from moejax.comparison.judgement import equal_time
from moejax.comparison.learning_rates import Trial
from moejax.comparison.match import Match, match
from moejax.comparison.measure import measure
from moejax.comparison.measurements import (
  Measurements,
  Program,
  Session,
  Turns,
  measurements_from_json,
  step_time_ratio,
)
from moejax.comparison.outcome import outcome
from moejax.comparison.record import (
  ESTABLISHED,
  VIOLATED,
  Baselines,
  Comparison,
  Tried,
  from_json,
  read_comparison,
)
from moejax.comparison.report import write_report
from moejax.comparison.runs import Run, make_runs
from moejax.comparison.stages import Result, read_baselines, read_measurements, read_result
from moejax.comparison.upcycled_start import start_from_parent
from moejax.config.experiment import Experiment, Suite
from moejax.config.learning_rates import LearningRateSweep
from moejax.data.baselines import ngram_baselines
from moejax.data.target_count import TargetCounter
from moejax.data.text import Text
from moejax.errors import users_mistake
from moejax.files import read_json, write_json
from moejax.interrupts import continuing
from moejax.lock import locked
from moejax.progress import SILENT, Progress, training_facts
from moejax.training.clock import total_peak_flops
from moejax.training.memory import check_together
from moejax.training.prepare import Prepared, Workspace, open_workspace, prepare, with_seeds
from moejax.training.provenance import provenance
from moejax.training.run import Evaluators, MakeEvaluators, run
from moejax.training.run_directory import check_run, claim_comparison, open_run, prepare_directory
from moejax.training.state import State

BEFORE = "before training"
"""The moment of the first session of measurements."""
AFTER_RUN = 4
"""After each run, its pair is measured for the minimum number of rounds divided by this."""

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
    comparison.tune()
    shared = comparison.train()
    measure_inference(suite, workspace.corpus, directory, progress)
    return comparison.report(shared)


class _Comparison:
  """A comparison in progress. Each stage writes a file. If the file exists, it is read instead of running the stage."""

  baselines: Baselines
  measurements: Measurements
  step_times_s: dict[str, float]
  matches: list[Match]
  allotments: list[Allotment]

  def __init__(self, suite: Suite, workspace: Workspace, make_evaluators: MakeEvaluators, progress: Progress):
    self.suite, self.workspace, self.make_evaluators, self.progress = suite, workspace, make_evaluators, progress
    self.directory = workspace.directory
    self.counter = TargetCounter(workspace.corpus)
    self._prepared: dict[str, Prepared] = {}
    self._runs: dict[str, Run] = {}
    self._tried: dict[str, tuple[Tried, ...]] = {}
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
    path = self._measurements
    if not processes.first(path.exists):
      measured = self._measured().to_json()
      processes.first_writes(lambda: write_json(path, measured))
    found = processes.first(lambda: read_measurements(path, self.suite).to_json())
    self.measurements = measurements_from_json(found, self._names)
    self.step_times_s = {name: self.measurements.timing(name).step_time_s for pair in self._names for name in pair}
    self.matches = match(self.suite, self.step_times_s)
    self.allotments = allot(self.suite, self.matches, self.step_times_s, self.counter)
    self._runs = make_runs(self.suite, self.allotments, self._placed)
    for matched in self.matches:
      ratio = self.measurements.ratio(matched.dense, matched.moe)
      signs = {ESTABLISHED: "=", VIOLATED: "has no match closer than"}
      sign = signs.get(equal_time(ratio, None, self.suite.tolerance), "is not known to equal")
      times = f"x {quantities.ratio(ratio.value)}, {quantities.interval(ratio.interval)}"
      self.progress.note(f"{matched.dense} {sign} {matched.moe} (step time {times})")
    processes.first(self._write_so_far)

  def train(self) -> bool:
    """Trains and evaluates the runs that no other job trains, and waits until all are done.

    Returns whether other jobs took part.
    """
    return train_unclaimed(
      [*self._runs],
      self.directory / "runs",
      lambda name: self._is_done(self._runs[name]),
      lambda name: self._train(self._runs[name]),
      self.progress.note,
      lambda name: self._is_ready(self._runs[name]),
    )

  def tune(self) -> None:
    """Chooses the learning rate of each member that is trained, if the suite has a sweep."""
    sweep = self.suite.learning_rates
    if not isinstance(sweep, LearningRateSweep):
      return
    folder = self.directory / learning_rates.FOLDER
    trials = {
      allotment.name: learning_rates.trials(self._placed(allotment.name), sweep, allotment.steps)
      for allotment in self.allotments
      if allotment.trained and allotment.name not in self.suite.upcycled
    }
    by_folder = {trial.folder: trial for of_member in trials.values() for trial in of_member}

    def read(trial: Trial) -> Tried | None:
      return learning_rates.read_tried(trial, folder / trial.folder)

    train_unclaimed(
      [*by_folder],
      folder,
      lambda name: read(by_folder[name]) is not None,
      lambda name: self._try(by_folder[name], folder / name),
      self.progress.note,
    )
    for name, of_member in trials.items():
      self._tried[name] = tuple(Tried(**each) for each in processes.first(lambda: _plain(map(read, of_member))))  # noqa: B023
      rate = learning_rates.chosen(name, self._tried[name])
      self.progress.note(f"{name}: learning rate {quantities.count(rate)}")
    self._runs = make_runs(self.suite, self.allotments, self._placed)
    processes.first(self._write_so_far)

  def _try(self, trial: Trial, directory: pathlib.Path) -> None:
    """Trains a trial whose directory this job has locked."""
    name = trial.experiment.name
    prepared = with_seeds(self._prepare(name), trial.experiment)
    self.progress.note(f"{name}: trial of learning rate {quantities.count(trial.learning_rate)}, {trial.steps} steps")

    def warn(text: str) -> None:
      self.progress.note(f"warning: {name}: {text}")

    learning_rates.try_rate(
      trial, directory, lambda: run(prepared, directory, trial.steps, {}, self.progress, lambda record: None, warn)
    )

  def _placed(self, name: str) -> Experiment:
    """A member on the available devices, with its chosen learning rate."""
    experiment = self.workspace.placed[name].experiment
    tried = self._tried.get(name)
    return learning_rates.with_rate(experiment, learning_rates.chosen(name, tried)) if tried else experiment

  def _train(self, of: Run) -> None:
    """Trains and evaluates a run whose directory this job has locked, and measures its pair again. Then trains its
    branches."""
    self._show_left(of, 0)
    if not processes.first(lambda: self._has_result(of.experiment, of.allotment.steps)):
      runs = self.directory / "runs"
      copies = {each.begin: runs / each.experiment.name for each in of.branches(self.suite) if each.begin}
      self._run(of, of.experiment, of.allotment.steps, lambda step: self._show_left(of, step), copies)
    for each in of.branches(self.suite):
      if not processes.first(lambda: self._has_result(each.experiment, each.steps)):  # noqa: B023
        self._run(of, each.experiment, each.steps)
    self._finish_run(of)

  def _run(
    self,
    of: Run,
    experiment: Experiment,
    steps: int,
    observe: Callable[[int], None] = lambda step: None,
    copies: Mapping[int, pathlib.Path] | None = None,
  ) -> None:
    """Trains and evaluates a run, or its branch `experiment`."""
    runs = self.directory / "runs"
    run_directory = runs / experiment.name
    begin = of.parent.batches(experiment.training.batch_size) if of.parent else 0
    prepared = with_seeds(self._prepare(of.allotment.name), experiment, begin)
    open_run(run_directory, experiment, steps)
    for there in (copies or {}).values():
      prepare_directory(there)

    def warn(text: str) -> None:
      self.progress.note(f"warning: {experiment.name}: {text}")

    if of.parent:
      start_from_parent(prepared, run_directory, of.parent, runs, warn)

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
      steps,
      timed(self.make_evaluators(prepared, run_directory, self.progress)),
      self.progress,
      lambda record: observe(record["step"]),
      warn,
      copies,
    )

  def _finish_run(self, of: Run) -> None:
    """Measures the pair of a run again, and writes the results so far."""
    moment = f"after {of.name}"
    # A run whose results were lost is only evaluated again.
    measured = processes.first(lambda: any(s.moment == moment for s in self._read_measurements().sessions))
    turns = None if measured else self._measured_again(of)

    def write() -> None:
      with self._turn():
        if turns is not None:
          session = Session(moment, time.time(), turns)
          write_json(self._measurements, self._read_measurements().after(session).to_json())
        self._write_so_far()

    processes.first(write)

  def _note_damage(self, text: str) -> None:
    self.progress.note(f"warning: {text}")

  def saved(self) -> str | None:
    """Description of the saved state from which the comparison resumes."""
    return f"the measurements in {self.directory}" if self._measurements.exists() else None

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
    summaries = [self.directory / "runs" / name / "summary.json" for name in self._runs]
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
    self.measurements = self._read_measurements()
    comparison = outcome(
      self.suite,
      self.measurements,
      self.matches,
      self.allotments,
      self._results(),
      self._shorter_results(),
      self._tried,
      self.baselines,
      provenance() | {"corpus": self.workspace.corpus.summary()},
    )
    comparison = with_inference(comparison, self.directory)
    write_json(self.directory / "comparison.json", comparison.to_json())
    return comparison

  def _results(self) -> Results:
    """Results of the finished runs of each member."""
    results: dict[str, list[Result]] = {}
    for name, of in self._runs.items():
      if result := read_result(self.directory / "runs" / name, of.allotment.steps, self._note_damage):
        results.setdefault(of.allotment.name, []).append(result)
    return results

  def _shorter_results(self) -> dict[float, Results]:
    """Results of the finished branches of each member, by the fraction of the budget."""
    results: dict[float, dict[str, list[Result]]] = {fraction: {} for fraction in self.suite.shorter_budgets}
    for of in self._runs.values():
      for each in of.branches(self.suite):
        directory = self.directory / "runs" / each.experiment.name
        if result := read_result(directory, each.steps, self._note_damage):
          results[each.fraction].setdefault(of.allotment.name, []).append(result)
    return dict(results)

  def _read_measurements(self) -> Measurements:
    return read_measurements(self._measurements, self.suite)

  @property
  def _measurements(self) -> pathlib.Path:
    return self.directory / "measurements.json"

  @property
  def _names(self) -> list[list[str]]:
    """The names of the members of each pair."""
    return [[member.name for member in pair.members] for pair in self.suite.pairs]

  def _measured(self) -> Measurements:
    """Measures all members before training, each pair until its ratios are known well enough."""
    pairs = [{name: self._prepare(name) for name in names} for names in self._names]
    members = {name: member for pair in pairs for name, member in pair.items()}
    check_together([member.memory for member in members.values()], next(iter(members.values())).spec.partitioner)
    measurement = self.suite.measurement
    least, most = measurement.rounds, measurement.round_limit
    self.progress.stage(f"measure step times, members in turn, for {least} to {most} rounds", total=most)
    seen_s: dict[str, float] = {}

    def observe(name: str, done: int, facts: dict[str, float]) -> None:
      seen_s[name] = facts["step_time_s"]
      if len(seen_s) == len(members):
        self._expect_left(seen_s, max(0, least - done) * measurement.steps_per_round)
      self.progress.advance(done, f"{name} {facts['step_time_s'] * 1e3:.1f} ms  {training_facts(facts['loss'])}")

    turns = measure(pairs, measurement, self._is_narrow, observe)
    programs = {name: Program(member.compile_time_s, total_peak_flops(member.spec)) for name, member in members.items()}
    return Measurements(programs, (Session(BEFORE, time.time(), turns),))

  def _is_narrow(self, turns: Turns, names: Sequence[str]) -> bool:
    """Whether the intervals of all step time ratios of a pair are narrower than the tolerance."""
    ratios = [step_time_ratio([turns], names[0], name) for name in names[1:]]
    return all(ratio.high / ratio.low - 1.0 <= self.suite.tolerance for ratio in ratios)

  def _measured_again(self, of: Run) -> Turns:
    """Measures the members of the pair of a run that are trained, for a few rounds."""
    trained = [each.name for each in self.allotments if each.trained and each.pair == of.pair.dense.name]
    pair = {name: self._prepare(name) for name in trained}
    rounds = max(1, self.suite.measurement.rounds // AFTER_RUN)
    measurement = dataclasses.replace(self.suite.measurement, rounds=rounds, max_rounds=rounds)
    self.progress.stage(f"measure step times again after {of.name}", total=rounds)
    turns = measure([pair], measurement, lambda turns, names: True, lambda name, done, _: self.progress.advance(done))
    later = list(self._runs).index(of.name) + 1
    still = {each.allotment.name for each in list(self._runs.values())[later:] if each.pair is of.pair}
    if not still:
      for name in trained:
        self._prepared.pop(name)  # their programs are not needed again
    return turns

  def _prepare(self, name: str) -> Prepared:
    if name not in self._prepared:
      self._prepared[name] = prepare(self.workspace, name, self.progress)
    return self._prepared[name]

  def _show_left(self, current: Run, step: int) -> None:
    """Reports the estimated time left for the whole comparison while `current` trains."""
    left_s, passed = 0.0, True
    for of in self._runs.values():
      passed = passed and of is not current
      if not passed:
        left = 1.0 - (step / of.allotment.steps if of is current else 0.0)
        left_s += left * of.allotment.steps * self.step_times_s[of.allotment.name] + self._evaluation_s
    self.progress.whole(time.perf_counter() - self._begin, left_s)

  def _expect_left(self, step_times_s: Mapping[str, float], rounds_of_steps: int) -> None:
    """Reports the estimated time left for the whole comparison while step times are measured."""
    left_s = rounds_of_steps * sum(step_times_s.values())
    for pair in self.suite.pairs:
      trained = 1 + (len(pair.candidates) if self.suite.train == "all" else 1)
      budget_s = self.counter.steps(pair.dense) * step_times_s[pair.dense.name]
      left_s += trained * (pair.seeds * (budget_s + self._evaluation_s) + self.suite.learning_rates.cost * budget_s)
    self.progress.whole(time.perf_counter() - self._begin, left_s)

  def _is_ready(self, of: Run) -> bool:
    """Whether the parent of a run has been trained, if it has one."""
    return of.parent is None or self._has_result(of.parent.experiment, of.parent.steps)

  def _is_done(self, of: Run) -> bool:
    """Whether this run has been trained for its whole budget.

    Raises:
      UserError: If its directory contains another experiment, or its experiment.json is damaged.
    """
    parts = [(of.experiment, of.allotment.steps), *((b.experiment, b.steps) for b in of.branches(self.suite))]
    return all(self._has_result(experiment, steps) for experiment, steps in parts)

  def _has_result(self, experiment: Experiment, steps: int) -> bool:
    """Whether a run has been trained for its whole budget. For process 0."""
    directory = self.directory / "runs" / experiment.name
    if not check_run(directory, experiment, steps):
      return False  # it has none yet, or has lost it, and then it is evaluated again
    return read_result(directory, steps, self._note_damage) is not None


def _plain(found: Iterable[Tried | None]) -> list[dict[str, Any]]:
  return [each.to_json() for each in found if each is not None]
