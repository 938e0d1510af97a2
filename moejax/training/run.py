"""Trains experiments: `train_experiment` prepares and trains one, and `run` trains a prepared one."""

import collections
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config.experiment import Experiment
from moejax.data.target_count import TargetCounter
from moejax.data.text import Text
from moejax.models.abstract import placement_table
from moejax.progress import SILENT, Progress, training_facts
from moejax.training.clock import DROPPED
from moejax.training.goodput import describe
from moejax.training.loop import Evaluator, Observer, Run, train
from moejax.training.metrics import Record
from moejax.training.prepare import Prepared, open_workspace, prepare
from moejax.training.profile import check_profile, profiled
from moejax.training.run_directory import saved_step
from moejax.training.state import TrainSpec

Evaluators = Mapping[str, Evaluator]
"""Evaluators that run during and after training, by the prefix of their metrics."""

MakeEvaluators = Callable[[Prepared, pathlib.Path, Progress], Evaluators]
"""Makes the evaluators of a run, given its directory. It is an argument because evaluation imports training."""


def train_experiment(
  experiment: Experiment,
  text: Text,
  directory: pathlib.Path,
  make_evaluators: MakeEvaluators,
  progress: Progress = SILENT,
  profile: int | None = None,
) -> dict[str, Any]:
  """Trains and evaluates one experiment from the latest checkpoint in a directory. Returns the content of summary.json.

  Args:
    experiment: the experiment.
    text: its text, as returned by `open_text`.
    directory: of the run, as returned by `open_run`.
    make_evaluators: makes the evaluators.
    progress: receives progress reports and notes.
    profile: number of steps to profile, or None.

  Raises:
    UserError: If the directory, the text or the devices are not suitable, another process uses the directory, or fewer
      steps are left than are to be profiled.
    FloatingPointError: If the loss, the gradient or the parameters become NaN or infinite.
    Interrupted: After SIGINT or SIGTERM. The same call resumes.
  """
  with open_workspace([experiment], text, directory, f"train {experiment.name}", progress) as workspace:
    steps, times_s = TargetCounter(workspace.corpus).steps(experiment), collections.deque[float](maxlen=100)
    if profile is not None:
      check_profile(profile, steps - saved_step(directory), steps)
    prepared = prepare(workspace, experiment.name, progress)
    show_placement(prepared.spec, progress)
    evaluators = make_evaluators(prepared, directory, progress)

    def observe(record: Record) -> None:
      times_s.append(record["step_time_s"])
      done, step_time_s = record["step"], statistics.mean(times_s)
      # The duration of the last evaluation is unknown until it starts, when it has its own bar.
      progress.whole(done * step_time_s, (steps - done) * step_time_s if done < steps else None)

    def warn(text: str) -> None:
      progress.note(f"warning: {text}")

    with profiled(prepared, directory, profile) as traced:
      return run(traced, directory, steps, evaluators, progress, observe, warn)


def run(
  prepared: Prepared,
  directory: pathlib.Path,
  steps: int,
  evaluators: Evaluators,
  progress: Progress,
  observe: Observer,
  warn: Callable[[str], None],
  copies: Mapping[int, pathlib.Path] | None = None,
) -> dict[str, Any]:
  """Trains a prepared experiment for `steps` steps, from the latest checkpoint in its directory.

  Returns the content of summary.json. Calls `observe` with the record of each step, and `warn` with each warning.
  `copies` are directories of other runs, which begin with the checkpoint of these steps.

  Raises:
    UserError, FloatingPointError, Interrupted: See `moejax.training.loop.train`.
  """
  experiment = prepared.spec.experiment
  progress.stage(f"train {experiment.name}", total=steps, line_every=experiment.training.log_every)

  def observed(record: Record) -> None:
    facts = training_facts(record["loss"], record["tokens_per_s"], record.get("mfu"), record.get(DROPPED))
    progress.advance(record["step"], facts)
    observe(record)

  summary = train(
    Run(
      spec=prepared.spec,
      step=prepared.step,
      batches=prepared.batches,
      steps=steps,
      directory=directory,
      evaluators=evaluators,
      observe=observed,
      warn=warn,
      copies=copies or {},
    )
  )
  progress.note(f"{experiment.name}: {describe(summary['goodput'])}")
  return summary


def show_placement(spec: TrainSpec, progress: Progress) -> None:
  """Prints name, shape, PartitionSpec and bytes per device of every parameter."""
  table = placement_table(spec.model)
  rows = [(*row, f"{size:,}") for *row, size in table]
  total = sum(size for *_, size in table)
  heads = ("parameter", "shape", "sharding", "bytes per device")
  widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(3)]
  for name, shape, sharding, size in [heads, *rows]:
    progress.note(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {sharding:<{widths[2]}}  {size:>16}")
  progress.note(f"mesh {spec.partitioner.shape}: {total:,} bytes of parameters per device")
  if networks := spec.partitioner.networks:
    progress.note(f"mesh axes: {networks}")
