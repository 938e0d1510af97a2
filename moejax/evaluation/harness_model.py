"""The model interface of lm-evaluation-harness: log-likelihoods, rolling log-likelihoods and generation."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from moejax.config.experiment import Experiment
from moejax.config.parameters import parameter_counts
from moejax.data.tokenizers import Tokenizer
from moejax.evaluation.answers import Answers
from moejax.evaluation.encoding import encode_pair, encode_prompt, encode_text, is_cut
from moejax.evaluation.generation_options import Generation, generation
from moejax.inference.generate import Generator
from moejax.inference.sampling import Sampling
from moejax.inference.score import Scorer
from moejax.models.abstract import AbstractModel, Parameters
from moejax.progress import Progress

ANSWERED_AS = 3
"""Version of the answers. It must be increased if the answers to requests change, so that cached answers are not
used."""
MAX_NEW_TOKENS = 256
"""Default number of new tokens, as in the models of the harness."""


class HarnessModel(LM):
  """A model for the harness. Every text starts with the begin-of-document token, as in training.

  A prompt that does not fit in the training length is truncated on the left, as in the models of the harness, and
  counted.
  """

  def __init__(self, experiment: Experiment, model: AbstractModel, tokenizer: Tokenizer, progress: Progress):
    super().__init__()
    self.progress, self.batch_size = progress, experiment.evaluation.batch_size
    self.max_length = experiment.data.sequence_length
    self.cut: dict[str, dict[str, int]] = {}
    """For each task, the number of requests and the number of truncated prompts."""
    self._experiment, self._model, self._tokenizer = experiment, model, tokenizer
    self._scorer = Scorer(model, self.batch_size, self.max_length)
    self._generators: dict[Sampling, Generator] = {}
    self._parameters: Parameters = {}
    self._answers = Answers(None)
    self._step = 0

  def take(self, parameters: Parameters, step: int, answers: Answers) -> None:
    """Sets the parameters, and their cached `answers`."""
    self._parameters, self._step, self._answers, self.cut = parameters, step, answers, {}

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding gives it."""

    def compute(args: Sequence[tuple]) -> Iterator[tuple[int, tuple[float, bool, bool]]]:
      pairs = [self._pair(*each) for each in args]
      for i, (score, greedy) in self._scorer.score(self._parameters, pairs):
        yield i, (score, greedy, is_cut(*pairs[i], self.max_length))

    return [(score, greedy) for score, greedy, _ in self._answered("loglikelihood", requests, compute)]

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood of each text. A text that does not fit is scored in windows."""

    def compute(args: Sequence[tuple]) -> Iterator[tuple[int, tuple[float, bool]]]:
      pairs = [encode_text(self._tokenizer, text) for (text,) in args]
      return ((i, (score, False)) for i, (score, _) in self._scorer.score(self._parameters, pairs))

    return [score for score, _ in self._answered("loglikelihood_rolling", requests, compute)]

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """A continuation of each prompt up to its stop strings, or to the end of the document."""
    tasks = {json.dumps(request.args[1], sort_keys=True): str(request.task_name) for request in requests}

    def compute(args: Sequence[tuple]) -> Iterator[tuple[int, tuple[str, bool]]]:
      of_options: dict[str, list[int]] = {}
      for i, (_, options) in enumerate(args):
        of_options.setdefault(json.dumps(options, sort_keys=True), []).append(i)
      for options, members in of_options.items():
        requested = self.generation(tasks[options], json.loads(options))
        for i, answer in self._generate([args[i][0] for i in members], requested):
          yield members[i], answer

    return [text for text, _ in self._answered("generate_until", requests, compute)]

  def generation(self, task: str, options: dict[str, Any]) -> Generation:
    """The generation options of a task, with at most half of the training length as new tokens. See
    `generation_options.generation` for errors."""
    return generation(task, normalize_gen_kwargs(options, MAX_NEW_TOKENS))

  def fits(self, request: Instance) -> bool:
    """Whether the prompt of a request fits without truncation."""
    match request.request_type:
      case "loglikelihood":
        return not is_cut(*self._pair(*request.args), self.max_length)
      case "generate_until":
        prompt, options = request.args
        max_new = self._max_new(self.generation(str(request.task_name), options))
        return not encode_prompt(self._tokenizer, prompt, self.max_length - max_new)[1]
    return True

  def get_model_info(self) -> dict[str, Any]:
    """The `config` of the results."""
    parameters = parameter_counts(self._experiment.model)
    return {
      "experiment": self._experiment.name,
      "step": self._step,
      "model_num_parameters": parameters.total,
      "model_active_parameters": parameters.active,
      "max_length": self.max_length,
      "tokenizer": self._tokenizer.identity,
    }

  def _answered(
    self, kind: str, requests: list[Instance], compute: Callable[[Sequence[tuple]], Iterator[tuple[int, Any]]]
  ) -> list[Any]:
    """All answers. The last item of each says whether the prompt was truncated. Answers that are not cached are
    computed and added to the cache."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
      text = json.dumps(request.args)
      keys.append(
        (kind, ANSWERED_AS, seen[text], text)
      )  # a repeated request, such as that of a task that samples, gets a separate answer
      seen[text] += 1
    missing = [i for i, key in enumerate(keys) if key not in self._answers]
    done = len(requests) - len(missing)
    self.progress.stage(f"{kind} of {len(requests)} requests", total=len(requests))
    self.progress.advance(done, f"{done} cached" if done else "")
    for i, answer in compute([requests[i].args for i in missing]):
      self._answers.add(keys[missing[i]], answer)
      done += 1
      self.progress.advance(done)
    answers = [self._answers[key] for key in keys]
    for request, answer in zip(requests, answers, strict=True):
      counted = self.cut.setdefault(str(request.task_name), {"requests": 0, "cut": 0})
      counted["requests"] += 1
      counted["cut"] += answer[-1]
    self.progress.stage("metrics and their standard errors")
    return answers

  def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    return encode_pair(self._tokenizer, context, continuation)

  def _max_new(self, requested: Generation) -> int:
    return min(requested.max_new, self.max_length // 2)

  def _generate(self, texts: Sequence[str], requested: Generation) -> Iterator[tuple[int, tuple[str, bool]]]:
    max_new = self._max_new(requested)
    if max_new < requested.max_new:
      # The rest of the training length is for the prompt.
      self.progress.note(
        f"warning: a prompt and {requested.max_new} new tokens do not fit in {self.max_length} tokens; "
        f"generating at most {max_new}"
      )
    if requested.sampling not in self._generators:
      self._generators[requested.sampling] = Generator(
        self._model, self.batch_size, self._tokenizer.vocab_size, requested.sampling
      )
    prompts = [encode_prompt(self._tokenizer, text, self.max_length - max_new) for text in texts]
    stops = [lambda ids: self._is_complete(ids, requested.until)] * len(prompts)
    generator = self._generators[requested.sampling]
    for i, ids in generator.generate(self._parameters, [ids for ids, _ in prompts], stops, max_new):
      text = postprocess_generated_text(self._tokenizer.decode(np.array(ids)), list(requested.until), None)
      yield i, (text, prompts[i][1])

  def _is_complete(self, ids: list[int], until: Sequence[str]) -> bool:
    # In training text, the begin token of the next document ends a document.
    if ids[-1] in (self._tokenizer.begin, self._tokenizer.end):
      return True
    text = self._tokenizer.decode(np.array(ids))
    return any(stop and stop in text for stop in until)
