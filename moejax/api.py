"""The commands as functions, for notebooks and scripts: `import moejax`, then `moejax.train(...)`.

These functions print nothing, do not exit, and do not change the process, except for environment variables that
libraries read. They report progress to the `progress` argument; pass `moejax.display.Display` to show progress bars.
JAX is imported when a function needs it. A mistake in the input raises `moejax.errors.UserError` with a message of one
line.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from moejax import lookup
from moejax.config.experiment import Evaluation, Experiment, Suite
from moejax.config.fields import OF_SPARSE_MEMBERS, with_fields, with_members
from moejax.config.kinds import check_functions
from moejax.config.walk import walk
from moejax.errors import UserError
from moejax.gpu_memory import use_gpu_memory
from moejax.optional import library
from moejax.processes.environment import is_one_of_several
from moejax.progress import SILENT, Progress
from moejax.results import Compared, Evaluated, Trained
from moejax.training.run_directory import open_comparison, open_run, read_experiment

Configuration = TypeVar("Configuration", Experiment, Suite)

Directory = str | pathlib.Path


def find(name: Directory) -> Experiment | Suite:
  """Returns an experiment or a suite, given its listed name, `path/to/file.py:function`, or the path of a run's
  experiment.json.

  Raises:
    UserError: If it does not exist. The message suggests similar names.
  """
  return lookup.find(str(name))


def replace(configuration: Configuration, **fields: Any) -> Configuration:
  """Returns a copy with other fields, by their dotted paths: `replace(e, name="small", **{"model.num_layers": 4})`.

  For a suite, a field is replaced in every member, and a field of sparse layers in every member that has them.

  Raises:
    UserError: If a field does not exist or the new configuration is not valid.
  """
  if isinstance(configuration, Experiment):
    return with_fields(configuration, fields)
  own = {field.name for field in dataclasses.fields(Suite)}
  of_members = {path: value for path, value in fields.items() if path.partition(".")[0] not in own}
  of_dense = {path: value for path, value in of_members.items() if not path.startswith(OF_SPARSE_MEMBERS)}
  of_suite = {path: value for path, value in fields.items() if path not in of_members}
  changed = with_members(
    configuration, lambda dense: with_fields(dense, of_dense), lambda candidate: with_fields(candidate, of_members)
  )
  return with_fields(changed, of_suite)


def join() -> None:
  """Connects the processes of a multi-process program, and lets JAX use the memory of GPUs (`moejax.gpu_memory`).

  `train`, `compare` and `evaluate` call it first.

  Raises:
    UserError: If the environment variables that describe the processes are incomplete.
    Failure: If other processes are missing.
  """
  use_gpu_memory()
  if is_one_of_several():
    from moejax.processes.join import join

    join()


def train(
  experiment: Experiment, directory: Directory, *, profile: int | None = None, progress: Progress = SILENT
) -> Trained:
  """Trains an experiment and evaluates it on held-out text. Resumes from the latest checkpoint in `directory`.

  Args:
    experiment: the experiment.
    directory: of the run.
    profile: number of steps to trace to `directory`/profile, after the first two.
      `moejax.planning.profile.write_profile` compares the trace with the plan.
    progress: receives progress reports.

  Raises:
    UserError: If the directory, the text or the devices are not suitable for the experiment.
    FloatingPointError: If the loss or the gradient norm becomes NaN or infinite.
  """
  check_kinds(experiment)
  join()
  text = _open_text(experiment, pathlib.Path(directory))
  directory = open_run(pathlib.Path(directory), experiment, experiment.training.steps)
  make_evaluators = _evaluators(experiment.evaluation)
  from moejax.training.run import train_experiment

  return Trained(directory, train_experiment(experiment, text, directory, make_evaluators, progress, profile))


def compare(suite: Suite, directory: Directory, *, progress: Progress = SILENT) -> Compared:
  """Measures step times, matches, trains and evaluates the members of a suite, and writes the report. Resumes an
  interrupted comparison.

  Raises:
    UserError: If the directory contains another suite or cannot be written, or the data or the devices are not suitable
      for the suite.
  """
  check_kinds(suite)
  join()
  text = _open_text(suite.members[0], pathlib.Path(directory))
  directory = open_comparison(pathlib.Path(directory), suite)
  make_evaluators = _evaluators(suite.members[0].evaluation)
  from moejax.comparison.run import compare as run_comparison

  return Compared(directory, run_comparison(suite, text, directory, make_evaluators, progress))


def evaluate(
  run: Directory,
  tasks: Sequence[str] = (),
  *,
  limit: int | None = None,
  few_shot: int | None = None,
  data: Directory | None = None,
  include_path: Directory | None = None,
  gen_kwargs: str | None = None,
  log_samples: bool = False,
  sparse: str | None = None,
  checkpoint: str = "latest",
  experiment: Experiment | None = None,
  progress: Progress = SILENT,
) -> Evaluated:
  """Runs lm-evaluation-harness benchmarks on a checkpoint of a run. Answers are cached.

  Args:
    run: directory of the run.
    tasks: suites (core_en), tasks, groups, tags and patterns. If empty, evaluation.tasks of the run.
    limit: number of examples per task, from the first. None uses all.
    few_shot: number of examples in each prompt. None uses that of the suite or the task.
    data: folder with the data of the tasks as TASK/SPLIT.jsonl. If None, it is read from the Hugging Face Hub or its
      cache.
    include_path: folder with custom task YAML files.
    gen_kwargs: generation options as KEY=VALUE,...
    log_samples: whether to write every example to RUN/evaluation/samples.
    sparse: which experts a DS-MoE uses, such as "top_k:4". None uses all.
    checkpoint: "latest", "best" (the lowest held-out bits per byte of the evaluated steps), or a step.
    experiment: the experiment of the run with another mesh or evaluation batch size. None uses it unchanged.
    progress: receives progress reports.

  Raises:
    UserError: If there is no run or no checkpoint, or a task or its data is not found.
  """
  join()
  directory = pathlib.Path(run)
  if experiment is None:
    # evaluation.task_limit of the run applies to evaluation during training, which should be short.
    experiment = with_fields(read_experiment(directory), {"evaluation.task_limit": None})
  given = {"tasks": tuple(tasks) or None, "task_limit": limit, "task_data": data and str(data)}
  changed = {name: value for name, value in given.items() if value is not None}
  evaluation = with_fields(experiment.evaluation, changed)
  harness = import_harness(evaluation)
  from moejax.evaluation.tasks import headlines, requested_benchmarks
  from moejax.inference.sparse import parse_sparse

  request = harness.make_request(
    evaluation,
    few_shot=few_shot,
    include_path=include_path and pathlib.Path(include_path),
    gen_kwargs=harness.parse_gen_kwargs(gen_kwargs) if gen_kwargs else {},
    sparse=None if sparse is None else parse_sparse(sparse),
  )
  results = harness.evaluate_run(directory, experiment, request, progress, log_samples, checkpoint)
  return Evaluated(directory, headlines(results, requested_benchmarks(results)), results)


def generate(
  run: Directory,
  prompts: Sequence[str],
  *,
  max_tokens: int = 64,
  stop: Sequence[str] = (),
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  seed: int = 0,
  sparse: str | None = None,
) -> list[str]:
  """Generates text after each prompt with the latest checkpoint of a run, until the document ends, a string of `stop`
  occurs, or `max_tokens` is reached. A DS-MoE uses all experts, or those that `sparse` selects, such as "top_k:4".

  Raises:
    UserError: If there is no run or no checkpoint, or the router is not causal, so that it cannot generate text.
  """
  from moejax.inference.sampling import Sampling
  from moejax.inference.sparse import parse_sparse
  from moejax.inference.text import Prompt, continue_texts

  sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  asked = [Prompt(text=text, max_tokens=max_tokens, stop=tuple(stop)) for text in prompts]
  chosen = None if sparse is None else parse_sparse(sparse)
  return [found.text for found in continue_texts(pathlib.Path(run), asked, sampling, seed, sparse=chosen)]


def sparsity(
  run: Directory,
  modes: Sequence[str] = (),
  *,
  data: Sequence[str] = (),
  max_increase: float = 0.03,
  batch_sizes: Sequence[int] = (1, 16),
  rounds: int = 5,
  tasks: Sequence[str] = (),
  limit: int | None = None,
  experiment: Experiment | None = None,
  progress: Progress = SILENT,
) -> dict[str, Any]:
  """Measures quality and speed of a DS-MoE with fewer experts. Writes sparsity.json of the run and its figures, and
  returns the content of sparsity.json (see `moejax.evaluation.sparsity.measure_modes`).

  Args:
    run: directory of a run that was trained with all experts.
    modes: modes such as "top_k:4" and "threshold:0.48". If empty, from many experts to few.
    data: text to score. If empty, the held-out text of the run.
    max_increase: maximum increase of perplexity, as a fraction, of the mode that is recommended.
    batch_sizes: batch sizes for which tokens per second are measured. If empty, they are not measured.
    rounds: number of measurements per mode.
    tasks: benchmarks to run in each mode, as for `evaluate`.
    limit: number of examples per task. None uses all.
    experiment: the experiment of the run with another mesh or evaluation. None uses it unchanged.
    progress: receives progress reports.

  Raises:
    UserError: If the model was not trained with all experts, or an argument is not valid.
  """
  directory = pathlib.Path(run)
  if experiment is None:
    experiment = with_fields(read_experiment(directory), {"evaluation.task_limit": None})
  from moejax.comparison.sparsity_run import run_sparsity
  from moejax.evaluation.sparsity import Sweep
  from moejax.evaluation.tasks import flat

  sweep = Sweep.of(experiment.model, modes, max_increase, batch_sizes, rounds)
  if limit is not None and not tasks:
    raise UserError(f"--limit {limit} has no effect without --tasks; remove it, or give --tasks")
  join()

  def score(mode: str | None) -> dict[str, float]:
    return flat(evaluate(directory, tasks, sparse=mode, limit=limit, experiment=experiment, progress=progress).scores)

  return run_sparsity(directory, experiment, sweep, data, score if tasks else None, progress)


def import_model(
  folder: Directory,
  run: Directory,
  *,
  load_balance: float | None = None,
  sequence_length: int | None = None,
  fields: Mapping[str, Any] | None = None,
  progress: Progress = SILENT,
) -> Experiment:
  """Converts a model in Hugging Face format to a run, which can be evaluated, used for generation, or trained further.

  Args:
    folder: folder with config.json, safetensors files and the tokenizer.
    run: directory of the new run.
    load_balance: coefficient of the load-balancing loss. Required for sparse models.
    sequence_length: number of tokens per training sequence (default: the maximum length of the model).
    fields: other fields of the experiment by their dotted paths, such as `{"data.train": ("books/*.txt",)}`.
    progress: receives progress reports.

  Raises:
    UserError: If the model is not supported, or files are incomplete.
  """
  from moejax.interop.huggingface import import_model as import_into
  from moejax.interop.huggingface import imported_experiment

  folder, run = pathlib.Path(folder), pathlib.Path(run)
  experiment = with_fields(imported_experiment(folder, run, load_balance, sequence_length), fields or {})
  import_into(folder, run, experiment, progress)
  return experiment


def export_model(
  run: Directory, folder: Directory, *, dtype: str = "float32", progress: Progress = SILENT
) -> dict[str, Any]:
  """Writes the latest checkpoint of a run in Hugging Face format. Returns the content of config.json.

  Raises:
    UserError: If there is no checkpoint, or no supported Hugging Face architecture matches the model. The message names
      the field.
  """
  from moejax.interop.huggingface import export_model as export_from

  return export_from(pathlib.Path(run), pathlib.Path(folder), dtype, progress)


def prune(
  run: Directory,
  new: Directory,
  keep: int,
  *,
  data: Sequence[str] = (),
  calibration_tokens: int = 4096,
  batch_size: int = 1,
  rounds: int = 5,
  experiment: Experiment | None = None,
  progress: Progress = SILENT,
) -> dict[str, Any]:
  """Drops experts of each sparse layer of a run, and writes the new run. Returns the content of its pruning.json:
  `layers`, with the experts that each layer keeps, and `models`, with the perplexity, memory and speed of both runs.

  Args:
    run: directory of the trained run.
    new: that of the new run.
    keep: number of experts of each sparse layer to keep.
    data: sources of the calibration text. If empty, the training text of the run.
    calibration_tokens: size of the calibration text in tokens.
    batch_size, rounds: of the speed measurement.
    experiment: that of the new run, with other training, data or mesh. None derives it from the run.
    progress: receives progress reports.

  Raises:
    UserError: If the model cannot be pruned, or the new directory contains a run.
  """
  from moejax.evaluation.pruned import prune_run

  return prune_run(
    pathlib.Path(run),
    pathlib.Path(new),
    keep,
    tuple(data),
    calibration_tokens,
    batch_size,
    rounds,
    experiment,
    progress,
  )


def import_harness(evaluation: Evaluation) -> ModuleType:
  """Imports moejax.evaluation.harness, without progress bars of libraries and, if `data` is set, without downloads.

  Raises:
    UserError: If lm-evaluation-harness is not installed.
  """
  # Libraries read these variables when they are imported, so they must be set before any other import.
  os.environ.setdefault("TQDM_DISABLE", "1")
  os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
  if evaluation.task_data is not None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
  # lm-evaluation-harness would fork this process, but the threads of JAX do not survive a fork.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  library("lm_eval", "eval")
  from moejax.evaluation import harness

  return harness


def check_kinds(configuration: Experiment | Suite) -> None:
  """Raises UserError if a kind of a user has no function yet."""
  check_functions(part for _, part in walk(configuration))


def _open_text(experiment: Experiment, directory: pathlib.Path) -> Any:
  """Finds and checks the text of an experiment without JAX. Returns a `moejax.data.text.Text`."""
  from moejax.data.text import open_text

  return open_text(experiment.data, directory)


def _evaluators(evaluation: Evaluation) -> Callable[..., Any]:
  """Returns the function that makes the evaluators of a run: held-out text and, if there are any, benchmarks.

  Raises:
    UserError: If there are benchmarks and lm-evaluation-harness is not installed.
  """
  tasks = import_harness(evaluation).TaskEvaluators() if evaluation.tasks else None
  from moejax.evaluation.evaluators import make_evaluators

  return functools.partial(make_evaluators, tasks=tasks)
