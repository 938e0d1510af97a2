"""The comparison itself: measure, match, allot, train, evaluate, report; whatever is done is not done again."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from moejax.comparison.budget import Allotment, allot
from moejax.comparison.match import Match, match
from moejax.comparison.measure import Timing, measure, total_steps
from moejax.comparison.outcome import outcome
from moejax.comparison.report import write_report
from moejax.config.chips import without_mfu
from moejax.config.experiment import Experiment, Suite
from moejax.config.plain import to_plain
from moejax.data.baselines import ngram_baselines
from moejax.data.corpus import Corpus, build_corpus
from moejax.data.target_count import TargetCounter
from moejax.evaluation.held_out import HeldOut
from moejax.evaluation.run import MakeEvaluator, make_evaluators
from moejax.files import write_json
from moejax.interrupts import continuing
from moejax.progress import SILENT, Progress, training_facts
from moejax.training.claimed_text import claim_text
from moejax.training.clock import DROPPED
from moejax.training.exclusive import exclusive
from moejax.training.loop import Run, train
from moejax.training.memory import check_together
from moejax.training.metrics import Record
from moejax.training.prepare import Prepared, on_devices, prepare
from moejax.training.provenance import provenance
from moejax.training.run_directory import COMPARISON, claim_json
from moejax.training.state import State

EVALUATION_S = 5.0
"""First guess of the seconds that compiling and running one evaluation takes; the first one corrects it."""


def compare(
  suite: Suite, directory: pathlib.Path, progress: Progress = SILENT, ask: MakeEvaluator | None = None
) -> dict[str, Any]:
  """Runs a suite to its report, from wherever an earlier run of it stopped, and returns comparison.json's content.

  Args:
    suite: what is compared.
    directory: where everything of it lies.
    progress: is told what runs and what the user should know.
    ask: makes what asks the suite's benchmarks; None where it has none.

  Raises:
    UserError: the directory holds another suite or cannot be written, or the suite does not fit data or devices.
    Interrupted: SIGINT or SIGTERM came during training; the same call continues.
  """
  for experiment in suite.members:
    _, partitioner = on_devices(experiment)
  claim_json(directory, COMPARISON, to_plain(suite))
  for name, caution in ((e.name, caution) for e in suite.members for caution in e.cautions):
    progress.note(f"caution: {name}: {caution}")
  if no_mfu := without_mfu(partitioner.device.device_kind):
    progress.note(no_mfu)
  comparison = _Comparison(suite, directory, progress, ask)
  with exclusive(directory, f"compare {suite.name}", progress.note), continuing(comparison.saved):
    comparison.build_corpus()
    comparison.measure()
    for allotment in comparison.allotments:
      if allotment.trained:
        comparison.train(allotment)
    result = comparison.write()
    progress.note(f"report: {write_report(directory)}")
  return result


class _Comparison:
  """A comparison under way. Each stage leaves a file, and a stage whose file is there is read, not run."""

  corpus: Corpus
  counter: TargetCounter
  baselines: dict[str, float]
  timings: dict[str, Timing]
  matches: list[Match]
  allotments: list[Allotment]

  def __init__(self, suite: Suite, directory: pathlib.Path, progress: Progress, ask: MakeEvaluator | None):
    self.suite, self.directory, self.progress, self.ask = suite, directory, progress, ask
    self.experiments = {experiment.name: experiment for experiment in suite.members}
    self._prepared: dict[str, Prepared] = {}
    self._evaluation_s = EVALUATION_S
    self._begin = time.perf_counter()

  def build_corpus(self) -> None:
    """The tokenized text, and the n-gram baselines."""
    first = self.suite.members[0]
    self.progress.stage("text: reading and tokenizing", total=1.0)
    self.corpus = build_corpus(
      first.data,
      self.directory / "corpus",
      lambda what, part: self.progress.advance(part, what),
      lambda text: self.progress.note(f"warning: {text}"),
    )
    claim_text(self.directory, self.corpus)
    self.counter = TargetCounter(self.corpus)
    path = self.directory / "baselines.json"
    if not path.exists():
      self.progress.stage("baselines: unigrams and bigrams")
      write_json(path, ngram_baselines(self.corpus, first.evaluation.max_tokens))
    self.baselines = json.loads(path.read_text())

  def measure(self) -> None:
    """Step times, and from them matches and budgets."""
    path = self.directory / "measurements.json"
    if not path.exists():
      write_json(path, {name: dataclasses.asdict(timing) for name, timing in self._measured().items()})
    self.timings = {name: Timing(**timing) for name, timing in json.loads(path.read_text()).items()}
    step_times_s = {name: timing.step_time_s for name, timing in self.timings.items()}
    self.matches = match(self.suite, step_times_s)
    self.allotments = allot(self.suite, self.matches, step_times_s, self.counter)
    for matched in self.matches:
      sign = "=" if matched.within_tolerance else "no match nearer than"
      self.progress.note(f"{matched.dense} {sign} {matched.moe} (step time x {matched.step_time_ratio:.3f})")
    self.write()

  def train(self, allotment: Allotment) -> None:
    """Trains and evaluates one member, or does nothing where that is done."""
    run_directory = self.directory / "runs" / allotment.name
    if _is_done(run_directory, allotment):
      return
    self._show_left(allotment, 0)
    experiment = self.experiments[allotment.name]
    prepared = self._prepare(experiment)

    def observe(record: Record) -> None:
      self.progress.advance(
        record["step"], training_facts(record["loss"], record["tokens_per_s"], record.get("mfu"), record.get(DROPPED))
      )
      self._show_left(allotment, record["step"])

    evaluators = make_evaluators(prepared.spec, self.corpus, run_directory, self.progress, self.ask)
    evaluation_s = dict.fromkeys(evaluators, 0.0)
    self.progress.stage(f"train {allotment.name}", total=allotment.steps, line_every=experiment.training.log_every)

    def timed(name: str, state: State) -> Mapping[str, float]:
      begin = time.perf_counter()
      scores = evaluators[name](state)
      evaluation_s[name] = time.perf_counter() - begin
      self._evaluation_s = sum(evaluation_s.values())
      return scores

    with exclusive(run_directory, f"train {allotment.name}", self.progress.note):
      train(
        Run(
          spec=prepared.spec,
          step=prepared.step,
          batches=prepared.batches,
          steps=allotment.steps,
          directory=run_directory,
          evaluators={name: functools.partial(timed, name) for name in evaluators},
          observe=observe,
          warn=lambda text: self.progress.note(f"warning: {allotment.name}: {text}"),
        )
      )
    self._prepared.pop(allotment.name)  # its program is not needed again
    self.write()

  def saved(self) -> str | None:
    """From what the same comparison continues."""
    return f"the measurements in {self.directory}" if (self.directory / "measurements.json").exists() else None

  def write(self) -> dict[str, Any]:
    """comparison.json, as complete as the comparison is."""
    summaries = {}
    held_out = {}
    for allotment in self.allotments:
      run_directory = self.directory / "runs" / allotment.name
      if _is_done(run_directory, allotment):
        summaries[allotment.name] = json.loads((run_directory / "summary.json").read_text())
        held_out[allotment.name] = HeldOut.load(run_directory / "held_out.npz")
    content = outcome(self.suite, self.timings, self.matches, self.allotments, summaries, held_out)
    content |= {
      "baselines": self.baselines,
      "provenance": provenance() | {"corpus": self.corpus.summary()},
    }
    write_json(self.directory / "comparison.json", content)
    return content

  def _measured(self) -> dict[str, Timing]:
    members = {name: self._prepare(experiment) for name, experiment in self.experiments.items()}
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

  def _prepare(self, experiment: Experiment) -> Prepared:
    if experiment.name not in self._prepared:
      self.progress.stage(f"compile {experiment.name}")
      self._prepared[experiment.name] = prepare(experiment, self.corpus)
    return self._prepared[experiment.name]

  def _show_left(self, current: Allotment, step: int) -> None:
    """The time left for the whole comparison while `current` trains."""
    left_s, passed = 0.0, True
    for allotment in self.allotments:
      passed = passed and allotment is not current
      if allotment.trained and not passed:
        left = 1.0 - (step / allotment.steps if allotment is current else 0.0)
        left_s += left * allotment.steps * self.timings[allotment.name].step_time_s + self._evaluation_s
    self.progress.whole(time.perf_counter() - self._begin, left_s)

  def _expect_left(self, step_times_s: Mapping[str, float], steps_to_measure: int) -> None:
    """The same while step times are being measured, from what they seem to be."""
    left_s = steps_to_measure * sum(step_times_s.values()) / len(step_times_s)
    for pair in self.suite.pairs:
      trained = 1 + (len(pair.candidates) if self.suite.train == "all" else 1)
      left_s += trained * (self.counter.steps(pair.dense) * step_times_s[pair.dense.name] + self._evaluation_s)
    self.progress.whole(time.perf_counter() - self._begin, left_s)


def _is_done(run_directory: pathlib.Path, allotment: Allotment) -> bool:
  """Whether this member was trained to the end of this allotment."""
  path = run_directory / "summary.json"
  return path.exists() and json.loads(path.read_text())["steps"] == allotment.steps
