"""The training loop: next batch, training step, metrics of the previous step, evaluation, checkpoint, stop."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from moejax import processes
from moejax.config.optimizer import Optimizer
from moejax.config.stored import EARLIER
from moejax.errors import Failure, users_mistake
from moejax.files import write_json
from moejax.interrupts import Deferral, continuing, deferral
from moejax.partitioning import LocalRows, local_rows, to_devices
from moejax.training.checkpoint import Checkpointer
from moejax.training.clock import Clock, fetch_work
from moejax.training.goodput import Goodput
from moejax.training.health import Health
from moejax.training.loss import Metrics
from moejax.training.metrics import MetricsWriter, Record, flatten
from moejax.training.not_finite import ESSENTIAL, explain, not_finite
from moejax.training.optimizers import learning_rate
from moejax.training.process_sync import ProcessSync
from moejax.training.provenance import provenance
from moejax.training.run_directory import check_run, claim, copy_start
from moejax.training.skips import SKIPPED, Skips
from moejax.training.state import State, TrainSpec
from moejax.training.step import TrainStep


class Batches(Protocol):
  """An infinite iterator of batches whose position can be saved."""

  def __next__(self) -> dict[str, np.ndarray]: ...
  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any]) -> None: ...


Evaluator = Callable[[State], Mapping[str, float]]
Observer = Callable[[Record], None]


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that the training loop needs."""

  spec: TrainSpec
  step: TrainStep
  """The compiled step."""
  batches: Callable[[], Batches]
  """Opens the input of this process at the first batch."""
  steps: int
  """Number of steps of the run."""
  directory: pathlib.Path
  evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
  """Evaluators that run every `evaluation.every` steps and after the last step, by the prefix of their metrics."""
  observe: Observer = lambda record: None
  """Called with the record of each step, to display it."""
  warn: Callable[[str], None] = lambda text: None
  """Called with each warning."""
  copies: Mapping[int, pathlib.Path] = dataclasses.field(default_factory=dict)
  """Directories of other runs, which begin with the checkpoint of these steps of this run."""


def train(run: Run) -> dict[str, Any]:
  """Trains from the latest checkpoint, if there is one, to the last step. Returns the content of summary.json.

  Raises:
    UserError: If the directory contains another experiment, a longer run, or only damaged checkpoints.
    FloatingPointError: If more consecutive steps are skipped than training.anomalies allows, or the parameters become
      NaN or infinite.
    Failure: If the last step cannot be saved.
    Interrupted: After SIGINT or SIGTERM. All completed steps are saved.
  """
  begin, experiment = time.perf_counter(), run.spec.experiment
  # 1. Claim the directory.
  check_run(run.directory, experiment, run.steps)
  checkpointer = Checkpointer(run.directory / "checkpoints", experiment.training.checkpoints, run.warn)
  # 2. Restore the latest checkpoint that is not damaged, or initialize the state from the seed.
  found = checkpointer.restore_newest(run.spec.abstract_state, run.warn)
  earlier = processes.first(lambda: claim(run.directory, experiment, run.steps))
  batches, done, progress = run.batches(), 0, dict[str, Any]()
  if found:
    done, state, progress = found
    # 3. Restore the position of the input. An imported model, at step 0, has none.
    if done:
      batches.set_state(progress["data"])
    if earlier and earlier[-1]["last_step"] == done < run.steps:
      run.warn(_new_schedule(experiment.optimizer, done, earlier[-1]["steps"], run.steps))
  else:
    state = run.spec.init_state(experiment.training.seed)
  with continuing(lambda: _saved(run, checkpointer)), deferral() as stop:
    # 4. Remove the metrics of later steps.
    training = _Training(run, state, batches, done, progress, checkpointer, stop)
    training.goodput.add("restore_s", time.perf_counter() - begin)
    try:
      results = training.finish()
    finally:
      stop.hold()  # finish saving
      checkpointer.close()
      training.writer.close()
  results |= {EARLIER: earlier} if earlier else {}
  processes.first_writes(lambda: write_json(run.directory / "summary.json", results))
  return results


def _saved(run: Run, checkpointer: Checkpointer) -> str | None:
  step = checkpointer.whole()
  return None if step is None else f"step {step} of {run.steps} in {run.directory}"


class _Training:
  """A run in progress: the state, the position of the input, and statistics of the steps so far."""

  def __init__(
    self,
    run: Run,
    state: State,
    batches: Batches,
    done: int,
    progress: dict[str, Any],
    checkpointer: Checkpointer,
    stop: Deferral,
  ):
    """`progress` is the progress in the checkpoint of step `done`, or empty without a checkpoint."""
    self.run, self.state, self.batches, self.step, self.checkpointer, self.stop = (
      run, state, batches, done, checkpointer, stop
    )  # fmt: skip
    self.experiment = run.spec.experiment
    self.clock = Clock(run.spec, progress.get("train_time_s", 0.0), progress.get("tokens", 0))
    self.skips = Skips(self.experiment.training.anomalies, run.steps, progress.get("skipped_steps", 0))
    self.goodput = Goodput(progress.get("lost_s", {}))
    self.batch = progress.get("batch", done)
    """Index of the next batch, starting at 0."""
    self.writer = MetricsWriter(run.directory, done, run.warn)
    checkpointer.compare(self.writer.scores)
    self.goodput.add("repeated_s", self.writer.repeated_s)
    self.health = self._new_health()
    self.waiting: tuple[int, int, Any] | None = None
    """Step, batch and metrics of the last step until they are reported."""
    self.last_save = time.monotonic()
    self.rows, self.sync = rows_of_process(run.spec), ProcessSync(run.spec.partitioner.mesh)

  def finish(self) -> dict[str, Any]:
    """Trains to the last step and returns the content of summary.json."""
    run, results = self.run, dict[str, float]()
    self.clock.restart()
    if _is_evaluated(self.step, run) and not self.writer.evaluated:  # stopped before its evaluation
      results = self._evaluate()
    self._copy()  # the process may have been killed before it
    while self.step < run.steps:
      self._train_step()
      stopping = self.sync.should_stop(self.stop)
      evaluate = _is_evaluated(self.step, run)
      if stopping or evaluate or self._is_save_due():
        self._report_waiting()
        if self._rewound():
          continue
        processes.report_step(None)
        self._save()
        self._copy()
        if stopping or evaluate:
          if processes.count() > 1:  # process 0 completes the checkpoint, and all exit codes must tell of it
            self.checkpointer.finished()
          self.stop.release()
        if evaluate:
          results = self._evaluate()
        self.clock.restart()
    if self.checkpointer.finished() != run.steps:  # saving has failed, so try once more
      self._save()
      _check_saved(run, self.checkpointer)
    if not results:  # the process was killed between the last evaluation and the summary
      results = self._evaluate()
    return {
      "name": self.experiment.name,
      "steps": run.steps,
      "tokens": self.clock.tokens,
      "train_time_s": self.clock.total_s,
      "tokens_per_s": self.clock.tokens / self.clock.total_s,
      "seed": self.experiment.training.seed,
      "skipped_steps": self.skips.total,
      "goodput": self.goodput.summary(self.clock.total_s),
      **results,
      "provenance": provenance(),
    }

  def _train_step(self) -> None:
    """Dispatches the next step, and then reports the previous one, so that the device does not wait for the host."""
    processes.report_step(self.step + 1)
    self.sync.send(self.stop)
    # If the last step has ended, the devices are idle until the input is there.
    idle, begin = self.waiting is None or self.waiting[2]["loss"].is_ready(), time.perf_counter()
    batch = to_devices(next(self.batches), self.run.spec.partitioner.batch, self.rows)
    if idle:
      self.goodput.add("input_s", time.perf_counter() - begin)
    self.sync.input_ready()
    rate = np.float32(learning_rate(self.experiment.optimizer, self.step, self.run.steps))
    self.state, metrics = self.run.step(self.state, batch, rate)
    self._report_waiting()
    self.step += 1
    self.waiting = (self.step, self.batch, metrics)
    self.batch += 1
    self._rewound()

  def _report_waiting(self) -> None:
    """Fetches and reports the metrics of the last step.

    Fetches all metrics only in steps that are logged, since work of the host slows down steps on CPU.
    """
    if self.waiting is None:
      return
    (step, batch, metrics), self.waiting = self.waiting, None
    record = {"step": step, **fetch_essential(metrics), **self.clock.lap(fetch_work(metrics))}
    if self.clock.stalled_s:
      self.goodput.add("stalled_s", self.clock.stalled_s)
    self.stop.hold()  # this step is in no checkpoint yet
    self.run.observe(record)
    skipped = self.skips.count(record)
    if step % self.experiment.training.log_every == 0 or step in (1, self.run.steps) or skipped or not_finite(record):
      record |= flatten(jax.device_get(metrics), self.experiment.model) | self.clock.mean() | self.sync.record()
      warnings = [*self.health.warnings(record), *filter(None, [self.sync.warning(record)])]
      if skipped:
        record |= {"batch": batch, "skipped_steps": self.skips.total}
        warnings.append(self.skips.describe(record))
        self.goodput.add("skipped_s", record["step_time_s"])
      if warnings:
        record["warnings"] = warnings
      for text in warnings:
        self.run.warn(text)
      self.writer.write(record)
    if self.skips.exceeded and not self.skips.may_rewind(self.checkpointer.finished() or 0):
      raise FloatingPointError(explain(self.skips.first, self.experiment, self.checkpointer.finished()))

  def _rewound(self) -> bool:
    """Restores the latest checkpoint if too many consecutive steps were skipped. The position of the input is kept."""
    if not self.skips.exceeded:
      return False
    found = self.checkpointer.restore_newest(self.run.spec.abstract_state, self.run.warn)
    step, state, progress = found or (0, self.run.spec.init_state(self.experiment.training.seed), {"tokens": 0})
    self.run.warn(
      f"{self.skips.streak} consecutive steps were skipped; training continues from step {step} with later data"
    )
    self.state, self.step, self.waiting, self.clock.tokens = state, step, None, progress["tokens"]
    self.writer.close()
    self.writer = MetricsWriter(self.run.directory, step, self.run.warn)
    self.checkpointer.compare(self.writer.scores)
    self.goodput.add("repeated_s", self.writer.repeated_s)
    self.health = self._new_health()
    self.skips.rewind(step)
    self.clock.restart()
    return True

  def _is_save_due(self) -> bool:
    policy = self.experiment.training.checkpoints
    if self.step % policy.every == 0 or self.step in self.run.copies:
      return True
    if policy.every_minutes is None:
      return False
    due = time.monotonic() - self.last_save >= 60 * policy.every_minutes
    return processes.first(lambda: due)  # the clocks of processes differ, but all must save the same steps

  def _save(self) -> None:
    begin = time.perf_counter()
    progress = {
      "data": self.batches.get_state(),
      "train_time_s": self.clock.total_s,
      "tokens": self.clock.tokens,
      "batch": self.batch,
      "skipped_steps": self.skips.total,
      "lost_s": self.goodput.lost_s,
    }
    self.checkpointer.save(self.state, self.step, progress)
    self.last_save = time.monotonic()
    self.goodput.add("save_s", time.perf_counter() - begin)

  def _copy(self) -> None:
    """Copies the checkpoint of this step to the run that begins with it."""
    there = self.run.copies.get(self.step)
    if there is not None and self.checkpointer.finished() == self.step:
      processes.first_writes(lambda: copy_start(self.run.directory, self.step, there))

  def _evaluate(self) -> dict[str, float]:
    """Evaluates this step. If files of an evaluation before the last step cannot be written, a warning is shown."""
    begin, scores = time.perf_counter(), dict[str, float]()
    try:
      for name, score in self.run.evaluators.items():
        scores |= {f"{name}/{key}": x for key, x in score(self.state).items()}
    except OSError as error:
      of_one = processes.count() > 1 and not isinstance(error, processes.NotWritten)
      if of_one or self.step == self.run.steps or not users_mistake(error):
        raise
      if processes.is_first():
        self.run.warn(f"step {self.step} could not be evaluated: {users_mistake(error)}")
    if scores and not self.writer.evaluated:
      self.writer.write({"step": self.step, **scores})
    self.goodput.add("evaluation_s", time.perf_counter() - begin)
    return scores

  def _new_health(self) -> Health:
    losses = dataclasses.asdict(self.experiment.training.losses)
    return Health(self.experiment.model, frozenset(name for name, c in losses.items() if c), self.step)


def _check_saved(run: Run, checkpointer: Checkpointer) -> None:
  """Raises Failure if the last step is not saved."""
  if (kept := checkpointer.finished()) != run.steps:
    raise Failure(
      f"training is complete, but the last checkpoint (step {run.steps}) could not be saved in "
      f"{run.directory / 'checkpoints'}; correct the cause and run the same command, which resumes from step "
      f"{kept or 0}"
    )


def _new_schedule(optimizer: Optimizer, done: int, before: int, now: int) -> str:
  """Describes how a new training length changes the learning rate."""
  last, following = learning_rate(optimizer, done - 1, before), learning_rate(optimizer, done, now)
  return (
    f"the length of the run changes from {before} to {now} steps and its schedule is recomputed: the learning rate "
    f"changes from {last:.4g} at step {done} to {following:.4g} at step {done + 1}, so the result differs from that of "
    f"a run with {now} steps from the start"
  )


def _is_evaluated(step: int, run: Run) -> bool:
  """Whether the state after this step is evaluated."""
  every = run.spec.experiment.evaluation.every
  return step == run.steps or (every is not None and step > 0 and step % every == 0)


def fetch_essential(metrics: Metrics) -> Record:
  """Fetches the metrics that are checked in every step. Waits for the step to end."""
  fetched = jax.device_get({name: metrics[name] for name in (*ESSENTIAL, SKIPPED)})
  return {name: float(value) for name, value in fetched.items()}


def rows_of_process(spec: TrainSpec) -> LocalRows:
  """The rows of each batch that this process reads."""
  training, length = spec.experiment.training, spec.experiment.data.sequence_length
  return local_rows(spec.partitioner.batch, (training.batch_size, length))
