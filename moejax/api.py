"""The commands as functions, for notebooks and scripts: `import moejax`, then `moejax.train(...)`.

Nothing here draws, exits, or changes the process, but for environment variables that libraries read. Progress goes to
the `moejax.progress.Progress` that is passed; `moejax.display.Display` draws bars. JAX is imported by the functions
that need it, when they are called. A user's mistake raises `moejax.errors.UserError`, with one line.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from moejax import lookup
from moejax.config.experiment import Evaluation, Experiment, Pair, Suite
from moejax.config.fields import OF_SPARSE_MEMBERS, with_fields, with_members
from moejax.errors import UserError
from moejax.optional import library
from moejax.processes.environment import is_one_of_several
from moejax.progress import SILENT, Progress
from moejax.results import Compared, Evaluated, Trained
from moejax.training.run_directory import open_comparison, open_run, read_experiment

Configuration = TypeVar("Configuration", Experiment, Suite)

Directory = str | pathlib.Path


def find(name: Directory) -> Experiment | Suite:
  """The experiment or suite of a listed name, of `path/to/file.py:function`, or of a run's experiment.json.

  Raises:
    UserError: there is none; the message names the nearest.
  """
  return lookup.find(str(name))


def replace(configuration: Configuration, **fields: Any) -> Configuration:
  """A copy with other fields, by their dotted paths: `replace(e, name="small", **{"model.num_layers": 4})`.

  A field of an experiment, given for a suite, is replaced in every member, one of sparse layers in every sparse member.

  Raises:
    UserError: a path without a field, or a configuration that is not valid.
  """
  if isinstance(configuration, Experiment):
    return with_fields(configuration, fields)
  _check_kind(Suite, configuration, "replace")
  own = {field.name for field in dataclasses.fields(Suite)}
  of_members = {path: value for path, value in fields.items() if path.partition(".")[0] not in own}
  of_dense = {path: value for path, value in of_members.items() if not path.startswith(OF_SPARSE_MEMBERS)}
  of_suite = {path: value for path, value in fields.items() if path not in of_members}
  changed = with_members(
    configuration, lambda dense: with_fields(dense, of_dense), lambda candidate: with_fields(candidate, of_members)
  )
  return with_fields(changed, of_suite)


def join() -> None:
  """Makes this process one of the several that a launcher has started for one program. Alone, it does nothing.

  `train`, `compare` and `evaluate` begin with it.

  Raises:
    UserError: the environment does not say how to find the other processes.
    Failure: other processes are missing.
  """
  if is_one_of_several():
    from moejax.processes.join import join

    join()


def train(experiment: Experiment, directory: Directory, *, progress: Progress = SILENT) -> Trained:
  """Trains an experiment and evaluates it on held-out text. Resumes from the latest checkpoint in `directory`.

  Raises:
    UserError: the directory, the text or the devices do not suit the experiment.
    FloatingPointError: the loss or the gradient norm became NaN or infinite.
  """
  _check_kind(Experiment, experiment, "train")
  join()
  text = _open_text(experiment, pathlib.Path(directory))
  directory = open_run(pathlib.Path(directory), experiment, experiment.training.steps)
  make_evaluators = _evaluators(experiment.evaluation)
  from moejax.training.run import train_experiment

  return Trained(directory, train_experiment(experiment, text, directory, make_evaluators, progress))


def compare(suite: Suite, directory: Directory, *, progress: Progress = SILENT) -> Compared:
  """Measures step times, matches and trains the members of a suite, evaluates them and writes the report. Resumes.

  Raises:
    UserError: the directory holds another suite or cannot be written, or the suite does not fit data or devices.
  """
  _check_kind(Suite, suite, "compare")
  join()
  text = _open_text(suite.members[0], pathlib.Path(directory))
  directory = open_comparison(pathlib.Path(directory), suite)
  make_evaluators = _evaluators(suite.members[0].evaluation)
  from moejax.comparison.run import compare as run_comparison

  return Compared(directory, run_comparison(suite, text, directory, make_evaluators, progress))


def plan(
  experiment: Experiment,
  topology: str,
  *,
  slices: int = 1,
  calibration: Directory | None = None,
  progress: Progress = SILENT,
) -> Any:
  """Predicts step time and memory on a topology such as `v5p:4x8x8` or `gpu:h100:8`: a `moejax.planning.plan.Plan`.

  Call it before anything else uses JAX, or with JAX_PLATFORMS=cpu, since it compiles for devices that are not present.
  `calibration` is a file of your own measurements (`calibrate`).

  Raises:
    UserError: no such topology, a mesh that does not tile it, or a compiler that is not installed.
  """
  _check_kind(Experiment, experiment, "plan")
  described = described_topology(topology, slices, calibration)
  from moejax.planning.plan import plan as predict

  return predict(experiment, described, progress)


def match(
  dense: Experiment,
  moe: Experiment,
  topology: str,
  *,
  slices: int = 1,
  tolerance: float = 0.05,
  calibration: Directory | None = None,
  progress: Progress = SILENT,
) -> Any:
  """Varies the `matchable` fields of an MoE until its predicted step time is the dense model's: a
  `moejax.comparison.pod_match.PodMatch`, whose `experiment` is the one to train.

  Raises:
    UserError: as `plan`, or no value of a matchable field fits the topology.
  """
  for experiment in (dense, moe):
    _check_kind(Experiment, experiment, "match")
  pair, described = Pair(dense=dense, candidates=(moe,)), described_topology(topology, slices, calibration)
  from moejax.comparison.pod_match import match_on_pod

  return match_on_pod(pair, described, tolerance, progress)


def calibrate(file: Directory, *, progress: Progress = SILENT) -> Any:
  """Measures products, copies, attention and grouped products on the first device of this machine, in a few minutes,
  and writes them to a file that `plan` and `match` take as `calibration`: a `moejax.planning.calibration.Calibrated`.

  The file keeps what it has of other chips, and measured steps.

  Raises:
    UserError: plans do not know the device, or the file is damaged.
  """
  from moejax.planning.calibration import add_operations
  from moejax.planning.timed_operations import local_chip, time_operations

  chip = local_chip()
  return add_operations(pathlib.Path(file), chip, *time_operations(chip, progress))


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
  experiment: Experiment | None = None,
  progress: Progress = SILENT,
) -> Evaluated:
  """Runs benchmarks of lm-evaluation-harness on the latest checkpoint of a run. Answers are cached.

  Args:
    run: directory of the run.
    tasks: suites (core_en), tasks, groups, tags and patterns; empty takes the run's evaluation.tasks.
    limit: examples of each task, the first; None takes all.
    few_shot: examples in each prompt; None takes what suite and task say.
    data: folder of the tasks' data as TASK/SPLIT.jsonl; None reads from the Hugging Face hub or its cache.
    include_path: folder of your own task YAML files.
    gen_kwargs: generation options as KEY=VALUE,...
    log_samples: whether every example is written to RUN/evaluation/samples.
    experiment: the run's, with another mesh or evaluation batch; None takes it as it was.
    progress: receives the progress.

  Raises:
    UserError: no run, no checkpoint, no such task, or no data for it.
  """
  _check_several(tasks, "tasks")
  join()
  directory = pathlib.Path(run)
  if experiment is None:
    # The run's own limit is that of the training loop, which must not wait long.
    experiment = with_fields(read_experiment(directory), {"evaluation.task_limit": None})
  given = {"tasks": tuple(tasks) or None, "task_limit": limit, "task_data": data and str(data)}
  changed = {name: value for name, value in given.items() if value is not None}
  evaluation = with_fields(experiment.evaluation, changed)
  harness = import_harness(evaluation)
  from moejax.evaluation.tasks import headlines, requested_benchmarks

  request = harness.make_request(
    evaluation,
    few_shot=few_shot,
    include_path=include_path and pathlib.Path(include_path),
    gen_kwargs=harness.parse_gen_kwargs(gen_kwargs) if gen_kwargs else {},
  )
  results = harness.evaluate_run(directory, experiment, request, progress, log_samples)
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
) -> list[str]:
  """Continues prompts with the latest checkpoint of a run, each to the end of its document, a string of `stop`, or
  `max_tokens`.

  Raises:
    UserError: no run or no checkpoint, or a router that looks ahead and so cannot generate.
  """
  _check_several(prompts, "prompts")
  _check_several(stop, "stop")
  from moejax.inference.sampling import Sampling
  from moejax.inference.text import Prompt, continue_texts

  sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  asked = [Prompt(text=text, max_tokens=max_tokens, stop=tuple(stop)) for text in prompts]
  return [found.text for found in continue_texts(pathlib.Path(run), asked, sampling, seed)]


def import_model(
  folder: Directory,
  run: Directory,
  *,
  load_balance: float | None = None,
  sequence_length: int | None = None,
  fields: Mapping[str, Any] | None = None,
  progress: Progress = SILENT,
) -> Experiment:
  """Makes a run of a model in the format of Hugging Face, to be evaluated, continued, or trained further.

  Args:
    folder: holds config.json, safetensors and the tokenizer.
    run: directory of the new run.
    load_balance: coefficient of the load-balancing loss, which sparse models need.
    sequence_length: tokens of a training sequence (default: the longest that the model was trained to see).
    fields: other fields of the experiment by their dotted paths, such as `{"data.train": ("books/*.txt",)}`.
    progress: is told what runs.

  Raises:
    UserError: moejax cannot express the model, or the files are not whole.
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
  """Writes the latest checkpoint of a run in the format of Hugging Face; returns its config.json.

  Raises:
    UserError: there is no checkpoint, or no family of models expresses the run's; the message has the field.
  """
  from moejax.interop.huggingface import export_model as export_from

  return export_from(pathlib.Path(run), pathlib.Path(folder), dtype, progress)


def import_harness(evaluation: Evaluation) -> ModuleType:
  """moejax.evaluation.harness, told to leave progress to us, and to fetch nothing where the tasks' data is at hand.

  Raises:
    UserError: lm-evaluation-harness is not installed.
  """
  # Read when they are imported, which others do too: so this comes before any other import of a command.
  os.environ.setdefault("TQDM_DISABLE", "1")
  os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
  if evaluation.task_data is not None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
  # It would fork this process, whose JAX threads a child does not have.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  library("lm_eval", "eval")
  from moejax.evaluation import harness

  return harness


def described_topology(name: str, slices: int, calibration: Directory | None = None, to_record: bool = False) -> Any:
  """The topology of this name, and the environment for it, which JAX and libtpu read when they are imported.

  A file of measurements calibrates its chip; it may have none of this chip if some are `to_record`.
  """
  from moejax.planning.calibration import calibrated
  from moejax.planning.topology import parse_topology, prepare_environment

  topology = parse_topology(name, slices)
  prepare_environment(topology)
  return calibrated(topology, None if calibration is None else pathlib.Path(calibration), to_record)


def _check_kind(kind: type, value: object, function: str) -> None:
  """Raises UserError where a name, or the other kind of configuration, is given for an experiment or a suite."""
  if not isinstance(value, kind):
    remedy = (
      f"moejax.find({value!r}) gives one" if isinstance(value, str) else "use moejax.find or an object of the class"
    )
    raise UserError(
      f"moejax.{function} takes an object of the class {kind.__name__}, not {type(value).__name__}; {remedy}"
    )


def _check_several(texts: Sequence[str], name: str) -> None:
  """Raises UserError for one text in place of a list, whose letters would be taken one by one, or for no text."""
  if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
    raise UserError(f"{name} must be a list of strings, such as [{str(texts)[:40]!r}]")


def _open_text(experiment: Experiment, directory: pathlib.Path) -> Any:
  """The experiment's text, found and checked without JAX: a `moejax.data.text.Text`."""
  from moejax.data.text import open_text

  return open_text(experiment.data, directory)


def _evaluators(evaluation: Evaluation) -> Callable[..., Any]:
  """What makes the evaluators of a run: of held-out text, and of benchmarks where there are any.

  Raises:
    UserError: there are, and lm-evaluation-harness is not installed.
  """
  tasks = import_harness(evaluation).TaskEvaluators() if evaluation.tasks else None
  from moejax.evaluation.evaluators import make_evaluators

  return functools.partial(make_evaluators, tasks=tasks)
