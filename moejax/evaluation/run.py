"""Held-out evaluation as the training loop uses it, and one whole run: text, training, evaluation."""

import collections
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moejax.config.chips import without_mfu
from moejax.config.experiment import Experiment
from moejax.data.corpus import Corpus, build_corpus
from moejax.data.pipeline import evaluation_batches, num_evaluation_batches
from moejax.data.target_count import TargetCounter
from moejax.data.tokenizers import Tokenizer
from moejax.evaluation.held_out import compile_scorer, score_documents
from moejax.models.abstract import placement_table
from moejax.progress import SILENT, Progress, training_facts
from moejax.training.claimed_text import claim_text
from moejax.training.clock import DROPPED
from moejax.training.exclusive import exclusive
from moejax.training.loop import Evaluator, Run, train
from moejax.training.metrics import Record
from moejax.training.prepare import on_devices, prepare
from moejax.training.run_directory import prepare_directory
from moejax.training.state import State, TrainSpec

MakeEvaluator = Callable[[TrainSpec, Tokenizer, pathlib.Path, Progress], Evaluator]
"""Makes the evaluator of benchmarks. It is an argument because it needs an optional package."""


def train_and_evaluate(
  experiment: Experiment, directory: pathlib.Path, progress: Progress = SILENT, ask: MakeEvaluator | None = None
) -> dict[str, Any]:
  """Trains one experiment from wherever an earlier run of it stopped; returns the content of summary.json.

  Args:
    experiment: what is trained.
    directory: where the run lies.
    progress: is told what runs and what the user should know.
    ask: makes what asks the experiment's benchmarks; None where it has none.

  Raises:
    UserError: the directory, the text or the devices do not suit the experiment, or another process is at work there.
    Interrupted: SIGINT or SIGTERM came; the same call continues.
  """
  on_devices(experiment)
  prepare_directory(directory)
  with exclusive(directory, f"train {experiment.name}", progress.note):
    return _train_and_evaluate(experiment, directory, progress, ask)


def _train_and_evaluate(
  experiment: Experiment, directory: pathlib.Path, progress: Progress, ask: MakeEvaluator | None
) -> dict[str, Any]:
  for caution in experiment.cautions:
    progress.note(f"caution: {caution}")
  progress.stage("text: reading and tokenizing", total=1.0)
  corpus = build_corpus(
    experiment.data,
    directory / "corpus",
    lambda what, part: progress.advance(part, what),
    lambda text: progress.note(f"warning: {text}"),
  )
  claim_text(directory, corpus)
  progress.stage(f"compile {experiment.name}")
  prepared = prepare(experiment, corpus)
  show_placement(prepared.spec, progress)
  evaluators = make_evaluators(prepared.spec, corpus, directory, progress, ask)
  length, times_s = TargetCounter(corpus).steps(experiment), collections.deque[float](maxlen=100)
  if no_mfu := without_mfu(prepared.spec.partitioner.device.device_kind):
    progress.note(no_mfu)
  progress.stage(f"train {experiment.name}", total=length, line_every=experiment.training.log_every)

  def observe(record: Record) -> None:
    step = record["step"]
    times_s.append(record["step_time_s"])
    progress.advance(
      step, training_facts(record["loss"], record["tokens_per_s"], record.get("mfu"), record.get(DROPPED))
    )
    # What the last evaluation takes is not known before it begins, and then its own bar tells.
    step_time_s = statistics.mean(times_s)
    progress.whole(step * step_time_s, (length - step) * step_time_s if step < length else None)

  return train(
    Run(
      spec=prepared.spec,
      step=prepared.step,
      batches=prepared.batches,
      steps=length,
      directory=directory,
      evaluators=evaluators,
      observe=observe,
      warn=lambda text: progress.note(f"warning: {text}"),
    )
  )


def show_placement(spec: TrainSpec, progress: Progress) -> None:
  """Prints name, shape, PartitionSpec and bytes per device of every parameter."""
  rows = [(*row, f"{size:,}") for *row, size in placement_table(spec.model)]
  total = sum(size for *_, size in placement_table(spec.model))
  heads = ("parameter", "shape", "sharding", "bytes per device")
  widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(3)]
  for name, shape, sharding, size in [heads, *rows]:
    progress.note(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {sharding:<{widths[2]}}  {size:>16}")
  progress.note(f"mesh {spec.partitioner.shape}: {total:,} bytes of parameters per device")


def make_evaluators(
  spec: TrainSpec, corpus: Corpus, directory: pathlib.Path, progress: Progress, ask: MakeEvaluator | None
) -> dict[str, Evaluator]:
  """What is scored during training and after it: held-out text, and benchmarks if `ask` is given."""
  evaluators = {"held_out": make_evaluator(spec, corpus, directory, progress)}
  if ask is not None:
    evaluators["tasks"] = ask(spec, corpus.tokenizer, directory, progress)
  return {name: _aside(evaluator, progress) for name, evaluator in evaluators.items()}


def _aside(evaluator: Evaluator, progress: Progress) -> Evaluator:
  """The evaluator, whose stages interrupt the stage of training."""

  def score(state: State) -> Mapping[str, float]:
    with progress.aside():
      return evaluator(state)

  return score


def make_evaluator(spec: TrainSpec, corpus: Corpus, directory: pathlib.Path, progress: Progress) -> Evaluator:
  """An evaluator that scores the corpus's held-out text, leaves the sums of each document in held_out.npz of
  `directory`, and returns the summary.

  Raises:
    UserError: its program does not fit the devices' memory.
  """
  experiment = spec.experiment
  length, evaluation = experiment.data.sequence_length, experiment.evaluation
  scorer = compile_scorer(spec)
  arguments = (corpus.validation, length, evaluation.batch_size, evaluation.max_tokens)

  def batches() -> Iterator[dict]:
    total = num_evaluation_batches(*arguments)
    progress.stage(f"evaluate {experiment.name}", total=total)
    for i, batch in enumerate(evaluation_batches(*arguments)):
      yield batch
      progress.advance(i + 1)

  def evaluate(state: State) -> dict[str, float]:
    held_out = score_documents(spec, state.parameters, batches(), corpus.tokenizer.byte_lengths, scorer)
    held_out.save(directory / "held_out.npz")
    return held_out.summary()

  return evaluate
