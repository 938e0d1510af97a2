"""The evaluators of a run: held-out text, and benchmarks if the experiment has any."""

import pathlib
from collections.abc import Callable, Iterator, Mapping

from moejax import processes
from moejax.data.corpus import Corpus
from moejax.data.pipeline import evaluation_batches, num_evaluation_batches
from moejax.data.tokenizers import Tokenizer
from moejax.evaluation.held_out import compile_scorer, score_documents
from moejax.progress import Progress
from moejax.training.loop import Evaluator
from moejax.training.prepare import Prepared
from moejax.training.state import State, TrainSpec

MakeTaskEvaluator = Callable[[TrainSpec, Tokenizer, pathlib.Path, Progress], Evaluator]
"""Makes the evaluator of benchmarks. It is an argument because it needs an optional package."""


def make_evaluators(
  prepared: Prepared, directory: pathlib.Path, progress: Progress, tasks: MakeTaskEvaluator | None = None
) -> dict[str, Evaluator]:
  """Makes the evaluators for during and after training: held-out text, and benchmarks if `tasks` is given."""
  spec, corpus = prepared.spec, prepared.corpus
  evaluators = {"held_out": make_evaluator(spec, corpus, directory, progress)}
  if tasks is not None:
    evaluators["tasks"] = tasks(spec, corpus.tokenizer, directory, progress)
  return {name: _aside(evaluator, progress) for name, evaluator in evaluators.items()}


def _aside(evaluator: Evaluator, progress: Progress) -> Evaluator:
  """The evaluator, whose stages interrupt the stage of training."""

  def score(state: State) -> Mapping[str, float]:
    with progress.aside():
      return evaluator(state)

  return score


def make_evaluator(spec: TrainSpec, corpus: Corpus, directory: pathlib.Path, progress: Progress) -> Evaluator:
  """Makes an evaluator that scores the held-out text of a corpus, writes the sums of each document to held_out.npz of
  `directory`, and returns the summary.

  Raises:
    UserError: If its program does not fit in device memory.
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
    processes.first_writes(lambda: held_out.save(directory / "held_out.npz"))
    return held_out.summary()

  return evaluate
