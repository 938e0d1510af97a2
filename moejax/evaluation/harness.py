"""Runs lm-evaluation-harness on moejax models. It needs the extra `eval`, so commands import it only if necessary."""

import contextlib
import dataclasses
import io
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import lm_eval
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.utils import handle_non_serializable, simple_parse_args_string

from moejax import processes
from moejax.config.experiment import Evaluation, Experiment
from moejax.data.tokenizers import Tokenizer, make_tokenizer
from moejax.errors import UserError
from moejax.evaluation.answers import Answers
from moejax.evaluation.harness_model import HarnessModel
from moejax.evaluation.task_lookup import TaskFinder, explained
from moejax.evaluation.tasks import Benchmark, benchmarks, check_named, flat, headlines
from moejax.files import write_json, write_whole
from moejax.inference.dropless import inference_model
from moejax.inference.load import load_run
from moejax.inference.sparse import Sparse
from moejax.models.abstract import Parameters
from moejax.progress import SILENT, Progress
from moejax.training.checkpoint import LATEST
from moejax.training.exclusive import exclusive
from moejax.training.loop import Evaluator
from moejax.training.state import State, TrainSpec

RESULTS, WORK = "results.json", "evaluation"
"""Names in the run directory: the results, and the folder of answers, samples and data of tasks."""
BOOTSTRAP_ROUNDS = 1_000
"""Number of bootstrap iterations for standard errors without a formula, such as that of F1. The harness uses 100,000 by
default. The first 1,000 of them are accurate to 2 % and take a hundredth of the time."""
TRIED_PROMPTS = 16
"""Number of examples per task whose prompts are checked before the evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """The benchmarks to run, and their options."""

  tasks: tuple[str, ...]
  """Suites, tasks, groups and tags of the harness, patterns such as arc_*, or paths of YAML files."""
  limit: int | None = None
  """Number of examples per task. None means all."""
  few_shot: int | None = None
  """Number of few-shot examples in each prompt. None uses that of the suite or the task."""
  data: pathlib.Path | None = None
  """Folder with the data of the tasks. None lets the harness find the data."""
  include_path: pathlib.Path | None = None
  """Folder with additional tasks, or None."""
  gen_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Generation options, which override those of the tasks."""
  allow_cut_prompts: bool = False
  """Whether to run a benchmark if most of its few-shot prompts do not fit."""
  sparse: Sparse | None = None
  """Which experts a model uses that was trained with all of them. None uses all."""

  def __post_init__(self) -> None:
    if self.few_shot is not None and self.few_shot < 0:
      raise UserError(f"few_shot={self.few_shot} must be 0 or above")


@dataclasses.dataclass(frozen=True)
class Loaded:
  """The tasks and options of a request."""

  finder: TaskFinder
  benchmarks: list[Benchmark]
  """The tasks and groups to report."""
  tasks: dict[str, Any]
  """Tasks, groups and their nesting, as returned by `TaskFinder.load`."""

  @property
  def task_index(self) -> Mapping[str, Any]:
    """Index of the declarations of tasks."""
    return self.finder.task_index

  def load(self, names: Any) -> dict[str, Any]:
    """Returns the loaded tasks. For the harness, this object is a TaskManager."""
    return self.tasks

  def leaves(self, benchmark: Benchmark) -> list[Task]:
    """The tasks of a benchmark."""
    if benchmark.name in self.tasks["tasks"]:
      return [self.tasks["tasks"][benchmark.name]]
    return [self.tasks["tasks"][task.task_name] for task in self.tasks["groups"][benchmark.name].get_all_tasks()]


def make_request(evaluation: Evaluation, **more: Any) -> Request:
  """Makes the request of an experiment, with `more` fields of Request.

  Raises:
    UserError: If no benchmark is named.
  """
  check_named(evaluation.tasks)
  data = None if evaluation.task_data is None else pathlib.Path(evaluation.task_data)
  return Request(
    tasks=evaluation.tasks, limit=evaluation.task_limit, data=data, allow_cut_prompts=evaluation.allow_cut_prompts,
    **more,
  )  # fmt: skip


def load_tasks(request: Request, cache: pathlib.Path, progress: Progress = SILENT) -> Loaded:
  """Loads tasks and groups with their data and the requested number of few-shot examples.

  Args:
    request: the benchmarks and their options.
    cache: folder for the datasets made from `request.data`.
    progress: receives the name of each task.

  Raises:
    UserError: If a task or group does not exist, its data is missing, or a package that it needs is not installed.
  """
  # The harness warns about defaults of its own tasks, and about tasks that are replaced by those of include_path.
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  progress.stage("tasks: reading the index")
  loaded = 0

  def count(name: str) -> None:
    nonlocal loaded
    loaded += 1
    progress.advance(loaded, name)

  finder = TaskFinder(cache, request.data, request.include_path, count)
  specs = _resolved(finder, request.tasks)
  progress.stage("tasks: loading")
  found = Loaded(finder, list(specs.values()), finder.load(list(specs)))
  _set_shots(found, request.few_shot)
  for i, task in enumerate(found.tasks["tasks"].values()):
    _set_generation(task, request.gen_kwargs)
    if isinstance(task, ConfigurableTask) and task.config.num_fewshot and task.config.doc_to_choice:
      _show_one_choice(task)
    _show_building(task, progress, i, len(found.tasks["tasks"]))
  if request.gen_kwargs and not any(_generates(task) for task in found.tasks["tasks"].values()):
    raise UserError(
      f"--gen-kwargs {dict(request.gen_kwargs)} would have no effect: no task generates with YAML options"
    )
  return found


def check_prompts(model: HarnessModel, loaded: Loaded, request: Request) -> None:
  """Checks the first examples of every task before the evaluation.

  Raises:
    UserError: If a task uses generation options that are not supported, or most few-shot prompts of a benchmark do not
      fit and `request.allow_cut_prompts` is False.
  """
  for benchmark in loaded.benchmarks:
    cut = total = 0
    for task in loaded.leaves(benchmark):
      if _generates(task):
        model.generation(task.task_name, dict(task.config.generation_kwargs or {}))
      if task.config.num_fewshot and not request.allow_cut_prompts:
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # as `simple_evaluate` does, so that the prompts are the same
        _guarded(task.task_name, task.build_all_requests, limit=min(request.limit or TRIED_PROMPTS, TRIED_PROMPTS))
        cut += sum(not model.fits(instance) for instance in task.instances)
        total += len(task.instances)
    if 2 * cut > total:
      shots = max(task.config.num_fewshot or 0 for task in loaded.leaves(benchmark))
      raise UserError(
        f"{benchmark.name} uses {shots} examples in the prompt, but {cut} of the first {total} prompts do not fit in "
        f"data.sequence_length={model.max_length}, so their examples would be truncated; lower --few-shot, remove the "
        "benchmark, or allow truncation with --evaluation.allow-cut-prompts True"
      )


def evaluate(
  model: HarnessModel,
  loaded: Loaded,
  request: Request,
  directory: pathlib.Path,
  parameters: Parameters,
  step: int,
  log_samples: bool = False,
) -> dict[str, Any]:
  """Runs tasks, writes results.json of `directory` in the format of the harness, and returns its content.

  Answers of a checkpoint are cached in DIRECTORY/evaluation. The results have two additional keys: `benchmarks`, and
  `cut` with the numbers of requests and of truncated requests by task. `log_samples` writes each example with its
  prompts and answers to DIRECTORY/evaluation/samples/TASK.jsonl.
  """
  # Not cached with several processes, which must compute the same batches together.
  path = directory / WORK / f"answers_{step}.jsonl" if jax.process_count() == 1 else None
  model.take(parameters, step, Answers(path))
  # Suppress the progress output of the harness.
  with contextlib.redirect_stdout(io.StringIO()):
    results = _guarded(
      ", ".join(request.tasks),
      lm_eval.simple_evaluate,
      model,
      tasks=list(request.tasks),
      task_manager=loaded,
      limit=request.limit,
      batch_size=model.batch_size,
      log_samples=log_samples,
      gen_kwargs=dict(request.gen_kwargs) or None,
      bootstrap_iters=BOOTSTRAP_ROUNDS,
    )
  samples = results.pop("samples", {})
  results = json.loads(json.dumps(results, default=handle_non_serializable))
  results |= {"benchmarks": [dataclasses.asdict(benchmark) for benchmark in loaded.benchmarks], "cut": model.cut}

  def write() -> None:
    write_json(directory / RESULTS, results)
    for task, examples in samples.items():
      _write_samples(directory / WORK / "samples" / f"{task.replace('/', '_')}.jsonl", examples)

  processes.first_writes(write)
  cut = {task: f"{counted['cut']:,}/{counted['requests']:,}" for task, counted in model.cut.items() if counted["cut"]}
  if cut:
    shown = ", ".join(f"{task} {counted}" for task, counted in list(cut.items())[:4])
    model.progress.note(
      f"warning: requests longer than {model.max_length} tokens were truncated from the left: {shown}"
      + (f" and those of {len(cut) - 4} more tasks (`cut` in {RESULTS})" if len(cut) > 4 else "")
    )
  return results


def evaluate_run(
  directory: pathlib.Path,
  experiment: Experiment,
  request: Request,
  progress: Progress,
  log_samples: bool = False,
  checkpoint: str = LATEST,
) -> dict[str, Any]:
  """Evaluates a checkpoint of a run, and returns the content of results.json.

  With a sparse mode, results.json and the answers are written to a folder for the mode.

  Args:
    directory: directory of the run.
    experiment: the experiment of the run, possibly with another mesh.
    request: the benchmarks and their options.
    progress: receives progress reports.
    log_samples: whether to write all examples (see `evaluate`).
    checkpoint: which checkpoint to load (see `load_run`).

  Raises:
    UserError: If the run or the tasks cannot be loaded, prompts do not fit, or another process uses the directory.
  """
  with exclusive(directory, f"evaluate {experiment.name}", progress.note):
    tokenizer = make_tokenizer(experiment.data.tokenizer)
    tasks = load_tasks(request, directory / WORK / "data", progress)
    loaded = load_run(directory, experiment, lambda text: progress.note(f"warning: {text}"), request.sparse, checkpoint)
    model = HarnessModel(experiment, loaded.model, tokenizer, progress)
    check_prompts(model, tasks, request)
    place = directory if request.sparse is None else directory / request.sparse.folder
    place.mkdir(parents=True, exist_ok=True)
    return evaluate(model, tasks, request, place, loaded.parameters, loaded.step, log_samples)


class TaskEvaluators:
  """Makes the benchmark evaluators of the runs of a command. Tasks are loaded once."""

  def __init__(self) -> None:
    self._loaded: dict[str, Loaded] = {}

  def __call__(self, spec: TrainSpec, tokenizer: Tokenizer, directory: pathlib.Path, progress: Progress) -> Evaluator:
    """Makes an evaluator that runs the benchmarks of an experiment and returns their main scores and their average.

    Raises:
      UserError: If tasks cannot be loaded or prompts do not fit. This is checked before training.
    """
    experiment = spec.experiment
    model = HarnessModel(experiment, inference_model(experiment.model, spec.partitioner), tokenizer, progress)
    request = make_request(experiment.evaluation)
    tasks = self._load(request, directory, progress)
    check_prompts(model, tasks, request)

    def score(state: State) -> dict[str, float]:
      results = evaluate(model, tasks, request, directory, state.parameters, int(state.step))
      return flat(headlines(results, tasks.benchmarks))

    return score

  def _load(self, request: Request, directory: pathlib.Path, progress: Progress) -> Loaded:
    key = repr(request)
    if key not in self._loaded:
      self._loaded[key] = load_tasks(request, directory / WORK / "data", progress)
    return self._loaded[key]


def parse_gen_kwargs(text: str) -> dict[str, Any]:
  """Parses KEY=VALUE,... like the harness.

  Raises:
    UserError: If a part is not KEY=VALUE.
  """
  for part in text.split(","):
    if not all(part.partition("=")[::2]):
      raise UserError(f"--gen-kwargs {text!r}: {part!r} is not KEY=VALUE, as in temperature=0.7,do_sample=True")
  return simple_parse_args_string(text)


def _resolved(finder: TaskFinder, names: Iterable[str]) -> dict[str, Benchmark]:
  """The tasks and groups that the names stand for, without duplicates."""
  specs: dict[str, Benchmark] = {}
  for benchmark in benchmarks(names):
    for spec in finder.names(benchmark.name):
      known = benchmark if spec == benchmark.name else benchmarks([spec])[0]
      specs.setdefault(spec, dataclasses.replace(known, name=finder.name_of(spec)))
  return specs


def _set_shots(loaded: Loaded, few_shot: int | None) -> None:
  for benchmark in loaded.benchmarks:
    shots = benchmark.few_shot if few_shot is None else few_shot
    for task in loaded.leaves(benchmark) if shots is not None else ():
      task.set_config(key="num_fewshot", value=shots)


def _generates(task: Task) -> bool:
  """Whether a task generates with the options in its configuration. Tasks written in Python set their own options."""
  return isinstance(task, ConfigurableTask) and task.config.output_type == "generate_until"


def _set_generation(task: Task, options: Mapping[str, Any]) -> None:
  if options and _generates(task):
    task.set_config(key="generation_kwargs", value=dict(options), update=True)


def _show_building(task: Task, progress: Progress, number: int, total: int) -> None:
  """Makes a task report progress while it builds its requests, which takes a minute for large tasks."""
  build = task.build_all_requests

  def shown(**options: Any) -> None:
    if not number:
      progress.stage("tasks: building requests", total=total)
    progress.advance(number + 1, task.task_name)
    build(**options)

  setattr(task, "build_all_requests", shown)  # noqa: B010  # of this task alone


def _guarded(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
  """Calls a function of the harness. Converts exceptions, such as for missing packages, to UserError."""
  try:
    return function(*arguments, **options)
  except (ImportError, ConnectionError, FileNotFoundError, LookupError) as error:
    if isinstance(error, KeyError | IndexError):
      raise
    raise UserError(explained(name, error)) from error


def _write_samples(path: pathlib.Path, examples: list[Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps(example, default=handle_non_serializable, ensure_ascii=False) for example in examples)
  write_whole(path, "".join(f"{line}\n" for line in lines))


def _show_one_choice(task: ConfigurableTask) -> None:
  """Uses the first of several correct choices in few-shot examples, for which harness 0.4.13 raises an exception."""
  given = task.fewshot_cfg.doc_to_target

  def target(doc: dict) -> Any:
    answer = task.doc_to_target(doc, given)
    return answer[0] if isinstance(answer, list) else answer

  example = next(iter(task.fewshot_docs()))
  answer = task.doc_to_target(example, given)
  if isinstance(answer, list) and all(isinstance(choice, int) for choice in answer):
    task.fewshot_cfg.doc_to_target = target
