"""The training loop: next batch, step, the previous step's metrics, evaluate, save, stop."""

import dataclasses
import pathlib
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
from moejax.training.health import RouterHealth
from moejax.training.loss import Metrics
from moejax.training.metrics import MetricsWriter, Record, flatten
from moejax.training.not_finite import ESSENTIAL, check_finite, not_finite
from moejax.training.optimizers import learning_rate
from moejax.training.process_sync import ProcessSync
from moejax.training.provenance import provenance
from moejax.training.run_directory import check_run, claim
from moejax.training.state import State, TrainSpec
from moejax.training.step import TrainStep


class Batches(Protocol):
  """An endless input whose position can be saved."""

  def __next__(self) -> dict[str, np.ndarray]: ...
  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any]) -> None: ...


Evaluator = Callable[[State], Mapping[str, float]]
Observer = Callable[[Record], None]


@dataclasses.dataclass(frozen=True)
class Run:
  """The arguments of the training loop."""

  spec: TrainSpec
  step: TrainStep
  """The compiled step."""
  batches: Callable[[], Batches]
  """Opens this process's part of the input at its first batch."""
  steps: int
  """Length of the run."""
  directory: pathlib.Path
  evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
  """What is scored every `evaluation.every` steps and after the last, by the prefix of its metrics."""
  observe: Observer = lambda record: None
  """Called with each step's record, for displays."""
  warn: Callable[[str], None] = lambda text: None
  """Called with what a user should see at once, such as an expert that gets no tokens."""


def train(run: Run) -> dict[str, Any]:
  """Trains to the last step, from the newest checkpoint if there is one, and returns the content of summary.json.

  Raises:
    UserError: the directory holds another experiment, a run that is longer, or only damaged checkpoints.
    FloatingPointError: the loss, the gradient or the parameters became NaN or infinite.
    Failure: the last step could not be saved.
    Interrupted: SIGINT or SIGTERM came; every step that was done is saved.
  """
  experiment = run.spec.experiment
  # 1. The directory is ours.
  check_run(run.directory, experiment, run.steps)
  checkpointer = Checkpointer(run.directory / "checkpoints", experiment.training.checkpoints, run.warn)
  # 2. The state: the newest checkpoint that is not damaged, or fresh from the seed.
  found = checkpointer.restore_newest(run.spec.abstract_state, run.warn)
  earlier = processes.first(lambda: claim(run.directory, experiment, run.steps))
  batches, done, clock = run.batches(), 0, Clock(run.spec)
  if found:
    done, state, progress = found
    # 3. The input stands where it stood.
    batches.set_state(progress["data"])
    clock = Clock(run.spec, progress["train_time_s"], progress["tokens"])
    if earlier and earlier[-1]["last_step"] == done < run.steps:
      run.warn(_new_schedule(experiment.optimizer, done, earlier[-1]["steps"], run.steps))
  else:
    state = run.spec.init_state(experiment.training.seed)
  # 4. The metrics end where the state does.
  writer = MetricsWriter(run.directory, done, run.warn)
  with continuing(lambda: _saved(run, checkpointer)), deferral() as stop:
    try:
      results = _steps(run, state, batches, done, clock, checkpointer, writer, stop)
    finally:
      stop.hold()  # what is being saved is finished
      checkpointer.close()
      writer.close()
  results |= {EARLIER: earlier} if earlier else {}
  write_json(run.directory / "summary.json", results)
  return results


def _saved(run: Run, checkpointer: Checkpointer) -> str | None:
  step = checkpointer.whole()
  return None if step is None else f"step {step} of {run.steps} in {run.directory}"


def _steps(
  run: Run,
  state: State,
  batches: Batches,
  done: int,
  clock: Clock,
  checkpointer: Checkpointer,
  writer: MetricsWriter,
  stop: Deferral,
) -> dict[str, Any]:
  experiment = run.spec.experiment
  policy = experiment.training.checkpoints
  trained_losses = frozenset(name for name, c in dataclasses.asdict(experiment.training.losses).items() if c)
  health = RouterHealth(experiment.model, trained_losses, done)
  waiting: tuple[int, Any] | None = None
  results: dict[str, float] = {}
  local, sync = rows_of_process(run.spec), ProcessSync(run.spec.partitioner.mesh)
  clock.restart()

  def report(waiting: tuple[int, Any]) -> None:
    """Fetches a step's metrics, which by now another step follows on the device, and hands them on.

    All of them only where they are written: on CPU what the host does is taken from the step.
    """
    step, metrics = waiting
    record = {"step": step, **fetch_essential(metrics), **clock.lap(fetch_work(metrics))}
    stop.hold()  # now there is a step that no checkpoint has
    run.observe(record)
    if step % experiment.training.log_every == 0 or step in (1, run.steps) or not_finite(record):
      record |= flatten(jax.device_get(metrics), experiment.model) | clock.mean() | sync.record()
      if warnings := [*health.warnings(record), *filter(None, [sync.warning(record)])]:
        record["warnings"] = warnings
        for text in warnings:
          run.warn(text)
      writer.write(record)
    check_finite(record, experiment, checkpointer.finished)

  if _is_evaluated(done, run) and not writer.evaluated:  # a stop came between this checkpoint and its scores
    results = _evaluate(run, state, done, writer)
  for step in range(done + 1, run.steps + 1):
    processes.at(step)
    sync.send(stop)
    batch = to_devices(next(batches), run.spec.partitioner.batch, local)
    sync.input_ready()
    state, metrics = run.step(state, batch, np.float32(learning_rate(experiment.optimizer, step - 1, run.steps)))
    if waiting:
      report(waiting)
    waiting = (step, metrics)
    stopping = sync.should_stop(stop)
    evaluate = _is_evaluated(step, run)
    if stopping or evaluate or step % policy.every == 0:
      report(waiting)
      waiting = None
      processes.at(None)
      progress = {"data": batches.get_state(), "train_time_s": clock.total_s, "tokens": clock.tokens}
      checkpointer.save(state, step, progress)
      if stopping or evaluate:
        stop.release()
      if evaluate:
        results = _evaluate(run, state, step, writer)
      clock.restart()
  if checkpointer.finished() != run.steps:  # it could not be saved, and is tried once more
    checkpointer.save(state, run.steps, progress)
    _check_saved(run, checkpointer)
  if not results:  # an earlier process wrote the last scores and was killed before the summary
    results = _evaluate(run, state, run.steps, None)
  return {
    "name": experiment.name,
    "steps": run.steps,
    "tokens": clock.tokens,
    "train_time_s": clock.total_s,
    "tokens_per_s": clock.tokens / clock.total_s,
    "seed": experiment.training.seed,
    **results,
    "provenance": provenance(),
  }


def _check_saved(run: Run, checkpointer: Checkpointer) -> None:
  """Raises Failure if the last step is not saved."""
  if (kept := checkpointer.finished()) != run.steps:
    raise Failure(
      f"the run is trained, but its last checkpoint, that of step {run.steps}, could not be saved in "
      f"{run.directory / 'checkpoints'}; when it can be, the same command continues from step {kept or 0}"
    )


def _new_schedule(optimizer: Optimizer, done: int, before: int, now: int) -> str:
  """What another length does to the learning rate."""
  last, following = learning_rate(optimizer, done - 1, before), learning_rate(optimizer, done, now)
  return (
    f"the run was {before} steps long and is now {now}, and its schedule is recomputed: the learning rate jumps from "
    f"{last:.4g} at step {done} to {following:.4g} at step {done + 1}, so that the result is not that of a run which "
    f"was {now} steps long from the beginning"
  )


def _is_evaluated(step: int, run: Run) -> bool:
  """Whether the state after this step is scored."""
  every = run.spec.experiment.evaluation.every
  return step == run.steps or (every is not None and step > 0 and step % every == 0)


def _evaluate(run: Run, state: State, step: int, writer: MetricsWriter | None) -> dict[str, float]:
  """The scores of a step, which `writer` writes; those that cannot be written are left out before the last step, with a
  warning."""
  try:
    scores = {f"{name}/{key}": x for name, score in run.evaluators.items() for key, x in score(state).items()}
    if scores and writer is not None:
      writer.write({"step": step, **scores})
    return scores
  except OSError as error:
    if step == run.steps or processes.count() > 1 or not users_mistake(error):
      raise
    run.warn(f"step {step} could not be evaluated: {users_mistake(error)}")
    return {}


def fetch_essential(metrics: Metrics) -> Record:
  """What every step is watched by; waits for the step to end."""
  return {name: float(value) for name, value in jax.device_get({name: metrics[name] for name in ESSENTIAL}).items()}


def rows_of_process(spec: TrainSpec) -> LocalRows:
  """The rows of each batch that this process reads."""
  training, length = spec.experiment.training, spec.experiment.data.sequence_length
  return local_rows(spec.partitioner.batch, (training.batch_size, length))
