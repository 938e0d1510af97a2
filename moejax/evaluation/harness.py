"""lm-evaluation-harness driving our models. Needs the extra `eval`; only the commands import it, when asked."""

import contextlib
import dataclasses
import io
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from moejax.config.experiment import Evaluation, Experiment
from moejax.config.parameters import count
from moejax.data.tokenizers import Tokenizer, make_tokenizer
from moejax.display import Display
from moejax.errors import UserError
from moejax.evaluation.answers import Answers
from moejax.evaluation.encoding import encode_pair, encode_text
from moejax.evaluation.task_data import find_tasks
from moejax.evaluation.tasks import Benchmark, benchmarks, flat, headlines
from moejax.inference.blueprint import Blueprint, make_blueprint
from moejax.inference.generate import Generator
from moejax.inference.load import load_run
from moejax.inference.sampling import Sampling
from moejax.inference.score import Scorer
from moejax.training.loop import Evaluator
from moejax.training.run_directory import write_json
from moejax.training.state import Definition, Parameters, State

RESULTS, WORK = "results.json", "evaluation"
"""In a run's directory: the results, and the folder of answers and overlays."""
ANSWERED_AS = 2
"""Raised when the same request is answered otherwise, so that no answer kept before is taken for one of now."""
MAX_NEW_TOKENS = 256
"""Tokens to generate where a task does not say, as in the harness's own models."""


class HarnessModel(LM):
  """A model as the harness asks it. Every text is opened by the tokenizer's begin, as each document in training is.

  A text beyond the training length is cut from the left, as the harness's own models do.
  """

  def __init__(self, experiment: Experiment, blueprint: Blueprint, tokenizer: Tokenizer, display: Display):
    super().__init__()
    self.display, self.batch_size = display, experiment.evaluation.batch_size
    self._experiment, self._blueprint, self._tokenizer = experiment, blueprint, tokenizer
    self._max_length = experiment.data.sequence_length
    self._scorer = Scorer(blueprint, self.batch_size, self._max_length)
    self._generators: dict[Sampling, Generator] = {}
    self._parameters: Parameters = {}
    self._answers = Answers(None)
    self._step = 0

  def take(self, parameters: Parameters, step: int, answers: Answers) -> None:
    """Answers with these parameters from now on, those of `answers` without computing them again."""
    self._parameters, self._step, self._answers = parameters, step, answers

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding gives it."""
    answers = self._answered("loglikelihood", requests, lambda args: self._score([self._pair(*each) for each in args]))
    return [(score, greedy) for score, greedy in answers]

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood of each whole text."""

    def compute(args: Sequence[tuple]) -> Iterator[tuple[int, float]]:
      pairs = [encode_text(self._tokenizer, text) for (text,) in args]
      return ((i, score) for i, (score, _) in self._score(pairs))

    return self._answered("loglikelihood_rolling", requests, compute)

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """A continuation of each prompt up to its stop strings, or to the end of the document."""
    return self._answered("generate_until", requests, self._generate)

  def get_model_info(self) -> dict[str, Any]:
    """What stands in the `config` of the results."""
    parameters = count(self._experiment.model)
    return {
      "experiment": self._experiment.name,
      "step": self._step,
      "model_num_parameters": parameters.total,
      "model_active_parameters": parameters.active,
      "max_length": self._max_length,
      "tokenizer": self._tokenizer.identity,
    }

  def _answered(
    self, kind: str, requests: list[Instance], compute: Callable[[Sequence[tuple]], Iterator[tuple[int, Any]]]
  ) -> list[Any]:
    """All answers; those that are not known are computed, and kept as they come."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
      text = json.dumps(request.args)
      keys.append((kind, ANSWERED_AS, seen[text], text))  # asked twice, as where a task samples, it is answered twice
      seen[text] += 1
    missing = [i for i, key in enumerate(keys) if key not in self._answers]
    done = len(requests) - len(missing)
    self.display.stage(f"{kind} of {len(requests)} requests", total=len(requests))
    self.display.advance(done, f"{done} known" if done else "")
    for i, answer in compute([requests[i].args for i in missing]):
      self._answers.add(keys[missing[i]], answer)
      done += 1
      self.display.advance(done)
    return [self._answers[key] for key in keys]

  def _score(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, tuple[float, bool]]]:
    return self._scorer.score(self._parameters, pairs)

  def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    return encode_pair(self._tokenizer, context, continuation)

  def _generate(self, args: Sequence[tuple]) -> Iterator[tuple[int, str]]:
    groups: dict[str, list[int]] = {}
    for i, (_, options) in enumerate(args):
      groups.setdefault(json.dumps(options, sort_keys=True), []).append(i)
    for options, members in groups.items():
      generator, until, max_new = self._options(json.loads(options))
      prompts = [
        [self._tokenizer.begin, *self._tokenizer.encode(args[i][0]).tolist()][-(self._max_length - max_new) :]
        for i in members
      ]
      stops = [lambda ids, until=until: self._is_complete(ids, until)] * len(prompts)
      for i, ids in generator.generate(self._parameters, prompts, stops, max_new):
        yield members[i], postprocess_generated_text(self._tokenizer.decode(np.array(ids)), until, None)

  def _options(self, options: Mapping[str, Any]) -> tuple[Generator, list[str], int]:
    """What compiles the generation that a task asks for, its stop strings, and its most tokens."""
    known = normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS)
    until, max_new = known.pop("until"), known.pop("max_gen_toks")
    sampled, temperature = known.pop("do_sample"), known.pop("temperature", 0.0)
    sampling = Sampling(
      temperature=temperature if sampled else 0.0, top_k=known.pop("top_k", None), top_p=known.pop("top_p", None)
    )
    if known:
      raise UserError(f"a task asks to generate with {', '.join(known)}, which this model does not know")
    if max_new > self._max_length // 2:
      # The rest of the window is for the prompt.
      self.display.note(f"{max_new} new tokens do not fit {self._max_length} with a prompt: {self._max_length // 2}")
      max_new = self._max_length // 2
    if sampling not in self._generators:
      self._generators[sampling] = Generator(self._blueprint, self.batch_size, self._tokenizer.vocab_size, sampling)
    return self._generators[sampling], until, max_new

  def _is_complete(self, ids: list[int], until: Sequence[str]) -> bool:
    # Streams of training text close a document by the next one's begin.
    if ids[-1] in (self._tokenizer.begin, self._tokenizer.end):
      return True
    text = self._tokenizer.decode(np.array(ids))
    return any(stop and stop in text for stop in until)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """Which benchmarks are asked, and how."""

  tasks: tuple[str, ...]
  """Suites and tasks of the harness."""
  limit: int | None = None
  """Examples of each task; None for all."""
  few_shot: int | None = None
  """Examples in each prompt; None takes what suite and task say."""
  data: pathlib.Path | None = None
  """Folder of the tasks' data; None leaves to the harness where it comes from."""

  def __post_init__(self):
    if self.few_shot is not None and self.few_shot < 0:
      raise UserError(f"few_shot={self.few_shot} must be 0 or above")


def make_request(evaluation: Evaluation, few_shot: int | None = None) -> Request:
  """What an experiment says that is asked, core_en where it says nothing."""
  data = None if evaluation.task_data is None else pathlib.Path(evaluation.task_data)
  return Request(tasks=evaluation.tasks or ("core_en",), limit=evaluation.task_limit, few_shot=few_shot, data=data)


def load_tasks(request: Request, overlays: pathlib.Path) -> list[Any]:
  """The harness's tasks and groups, with their data and as many examples in a prompt as are asked for.

  Args:
    request: what is asked.
    overlays: folder for what redirects tasks to local data.

  Raises:
    UserError: there is no such task or group, or no data for it.
  """
  # It warns of what its own tasks leave to defaults, and that an overlay takes a task's place.
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  chosen = benchmarks(request.tasks)
  manager = find_tasks([benchmark.name for benchmark in chosen], request.data, overlays)
  return [_load(manager, benchmark, request.few_shot) for benchmark in chosen]


def evaluate(
  model: HarnessModel, tasks: list[Any], limit: int | None, directory: pathlib.Path, parameters: Parameters, step: int
) -> dict[str, Any]:
  """Asks tasks, writes results.json of `directory` in the harness's format, and returns it.

  Answers are kept in DIRECTORY/evaluation, and not asked twice of one checkpoint.
  """
  # Processes of one run would each keep other answers, and then no longer compute the same batches together.
  path = directory / WORK / f"answers_{step}.jsonl" if jax.process_count() == 1 else None
  model.take(parameters, step, Answers(path))
  # Progress is shown by the display.
  with contextlib.redirect_stdout(io.StringIO()):
    results = lm_eval.simple_evaluate(model, tasks=tasks, limit=limit, batch_size=model.batch_size, log_samples=False)
  results = json.loads(json.dumps(results, default=handle_non_serializable))
  write_json(directory / RESULTS, results)
  return results


def evaluate_run(directory: pathlib.Path, experiment: Experiment, request: Request, display: Display) -> dict[str, Any]:
  """Asks a trained run, from its newest checkpoint, and returns what it writes to results.json.

  Args:
    directory: of the run.
    experiment: the run's, perhaps on another mesh.
    request: what is asked.
    display: shows what runs.

  Raises:
    UserError: as `load_run` and `load_tasks`.
  """
  display.stage(f"read {', '.join(request.tasks)}")
  tasks = load_tasks(request, directory / WORK / "tasks")
  loaded = load_run(directory, experiment)
  model = HarnessModel(experiment, loaded.blueprint, make_tokenizer(experiment.data.tokenizer), display)
  return evaluate(model, tasks, request.limit, directory, loaded.parameters, loaded.step)


def make_task_evaluator(
  definition: Definition, tokenizer: Tokenizer, directory: pathlib.Path, display: Display
) -> Evaluator:
  """An evaluator that asks the experiment's benchmarks and returns their headlines and their average.

  Raises:
    UserError: as `load_tasks`, before any training.
  """
  experiment = definition.experiment
  blueprint = make_blueprint(experiment.model, definition.partitioner)
  model = HarnessModel(experiment, blueprint, tokenizer, display)
  request = make_request(experiment.evaluation)
  display.stage(f"read {', '.join(request.tasks)}")
  tasks = load_tasks(request, directory / WORK / "tasks")

  def score(state: State) -> dict[str, float]:
    results = evaluate(model, tasks, request.limit, directory, state.parameters, int(state.step))
    return flat(headlines(results, benchmarks(request.tasks)))

  return score


def _load(manager: TaskManager, benchmark: Benchmark, few_shot: int | None) -> Any:
  """A benchmark's task or group."""
  loaded = manager.load([benchmark.name])
  shots = benchmark.few_shot if few_shot is None else few_shot
  for task in loaded["tasks"].values():
    if shots is not None:
      task.set_config(key="num_fewshot", value=shots)
    if isinstance(task, ConfigurableTask) and task.config.num_fewshot and task.config.doc_to_choice:
      _show_one_choice(task)
  return {**loaded["tasks"], **loaded["groups"]}[benchmark.name]


def _show_one_choice(task: ConfigurableTask) -> None:
  """Lets examples in a prompt show the first of several right choices, where harness 0.4.13 stops at the list."""
  given = task.fewshot_cfg.doc_to_target

  def target(doc: dict) -> Any:
    answer = task.doc_to_target(doc, given)
    return answer[0] if isinstance(answer, list) else answer

  example = next(iter(task.fewshot_docs()))
  answer = task.doc_to_target(example, given)
  if isinstance(answer, list) and all(isinstance(choice, int) for choice in answer):
    task.fewshot_cfg.doc_to_target = target
