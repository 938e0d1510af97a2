"""Generates text with a trained run."""

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from moejax.config.checks import SEEDS
from moejax.config.experiment import Experiment
from moejax.data.records import encodable
from moejax.data.tokenizers import Tokenizer, make_tokenizer
from moejax.errors import UserError
from moejax.inference.generate import Generator
from moejax.inference.load import load_run
from moejax.inference.sampling import GREEDY, Sampling
from moejax.inference.sparse import Sparse
from moejax.training.run_directory import read_experiment

LARGEST_BATCH = 16
"""Maximum number of prompts in a batch, before it is rounded up to a multiple of the data shards."""

INCOMPLETE = "\ufffd"
"""The character to which incomplete bytes at the end of a text are decoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A text to continue."""

  text: str
  max_tokens: int = 64
  """Maximum number of new tokens."""
  stop: tuple[str, ...] = ()
  """Strings that end the continuation, which does not include them."""

  def __post_init__(self) -> None:
    if "" in self.stop:
      raise UserError("stop='' would end every continuation immediately; remove it")

  def check_fits(self, length: int) -> None:
    """Raises UserError if the new tokens and one token of the prompt do not fit in the training length."""
    if not 1 <= self.max_tokens < length:
      raise UserError(
        f"max_tokens={self.max_tokens} must lie between 1 and {length - 1}, one less than the training length"
      )


@dataclasses.dataclass(frozen=True)
class Continuation:
  """The continuation of a prompt."""

  text: str
  tokens: int
  """Number of generated tokens, including the token that ends the document."""
  finish_reason: Literal["stop", "length"]
  """stop for a stop string or the end of the document, length for max_tokens."""
  prompt_cut: bool
  """Whether the prompt was truncated from the left, because it did not fit in the training length."""


Observe = Callable[[int, str], None]
"""Called with the index of a prompt and the text of its continuation so far, after each token and at the end."""


def continue_texts(
  directory: pathlib.Path,
  prompts: Sequence[Prompt],
  sampling: Sampling = GREEDY,
  seed: int = 0,
  experiment: Experiment | None = None,
  observe: Observe | None = None,
  warn: Callable[[str], None] = warnings.warn,
  sparse: Sparse | None = None,
) -> list[Continuation]:
  """Continues each prompt until the document ends, a stop string occurs, or max_tokens is reached.

  A prompt starts with the begin-of-document token, as documents do in training. A prompt that does not fit in the
  training length together with the new tokens is truncated on the left.

  Args:
    directory: directory of the run.
    prompts: the prompts.
    sampling: the sampling method.
    seed: seed for sampling.
    experiment: the experiment of the run, possibly with another mesh or rules. None uses it unchanged.
    observe: called with each text as it grows, without incomplete characters and possible starts of stop strings.
    warn: called with a warning for each damaged checkpoint.
    sparse: as of `load_run`.

  Raises:
    UserError: as `load_run`, or max_tokens is not between 1 and the training length.
  """
  if not prompts:
    return []
  if not 0 <= seed < SEEDS:
    raise UserError(f"seed={seed} must be 0 or above and below 2^32, the number of seeds of JAX")
  experiment = experiment or read_experiment(directory)
  length = experiment.data.sequence_length
  for prompt in prompts:
    prompt.check_fits(length)
  tokenizer = make_tokenizer(experiment.data.tokenizer)
  loaded = load_run(directory, experiment, warn, sparse, decode=True)
  writers = [_Writer(tokenizer, prompt, i, observe) for i, prompt in enumerate(prompts)]
  whole = [[tokenizer.begin, *tokenizer.encode(encodable(prompt.text)).tolist()] for prompt in prompts]
  ids = [tokens[prompt.max_tokens - length :] for tokens, prompt in zip(whole, prompts, strict=True)]
  shards = loaded.model.partitioner.shards("batch")
  batch = shards * max(1, math.ceil(min(len(ids), LARGEST_BATCH) / shards))
  generator = Generator(loaded.model, batch, tokenizer.vocab_size, sampling)
  found: dict[int, Continuation] = {}
  stops, limits = [writer.is_complete for writer in writers], [prompt.max_tokens for prompt in prompts]
  for i, tokens in generator.generate(loaded.parameters, ids, stops, limits, seed):
    text, finished = writers[i].finish(tokens)
    cut = len(ids[i]) < len(whole[i])
    found[i] = Continuation(text, len(tokens), "stop" if finished else "length", cut)
  return [found[i] for i in range(len(prompts))]


@dataclasses.dataclass(frozen=True)
class _Writer:
  """The text of a continuation while it is generated."""

  tokenizer: Tokenizer
  prompt: Prompt
  index: int
  observe: Observe | None

  def is_complete(self, tokens: list[int]) -> bool:
    """Whether the document has ended or a stop string has occurred. Reports the text so far."""
    if tokens[-1] in (self.tokenizer.begin, self.tokenizer.end):
      return True
    if not self.prompt.stop and self.observe is None:
      return False
    text = self._text(tokens)
    if self.observe is not None:
      self.observe(self.index, visible(text, self.prompt.stop))
    return any(stop in text for stop in self.prompt.stop)

  def finish(self, tokens: list[int]) -> tuple[str, bool]:
    """Returns the text, and whether it is complete."""
    ended = tokens[-1] in (self.tokenizer.begin, self.tokenizer.end)
    text = self._text(tokens)
    cut = until(text, self.prompt.stop)
    if self.observe is not None:
      self.observe(self.index, cut)
    return cut, ended or cut != text

  def _text(self, tokens: list[int]) -> str:
    ends = (self.tokenizer.begin, self.tokenizer.end)
    return self.tokenizer.decode(np.array([token for token in tokens if token not in ends], np.int64))


def until(text: str, stops: Sequence[str]) -> str:
  """The text before the first stop string."""
  return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def visible(text: str, stops: Sequence[str]) -> str:
  """The part of a growing text that is final: before a stop string or a possible start of one, and without incomplete
  characters."""
  cut = until(text, stops)
  if cut != text:
    return cut
  text = text.rstrip(INCOMPLETE)
  held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
  return text[: len(text) - held]
