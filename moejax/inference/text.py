"""Continues texts with a trained run."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from moejax.data.records import encodable
from moejax.data.tokenizers import make_tokenizer
from moejax.errors import UserError
from moejax.inference.generate import Generator
from moejax.inference.load import load_run
from moejax.inference.sampling import Sampling

LARGEST_BATCH = 16
"""Largest number of prompts in a batch, before it is rounded up to a multiple of the data shards."""


def continue_texts(
  directory: pathlib.Path, prompts: Sequence[str], max_tokens: int, sampling: Sampling, seed: int
) -> list[str]:
  """The continuation of each prompt, up to the end of its document or `max_tokens`.

  A prompt starts with the begin-of-document token, as documents do in training. A prompt that does not fit in the
  training length together with the new tokens is truncated on the left.

  Raises:
    UserError: as `load_run`, or max_tokens is not between 1 and the training length.
  """
  loaded = load_run(directory)
  length = loaded.experiment.data.sequence_length
  if not 1 <= max_tokens < length:
    raise UserError(f"max_tokens={max_tokens} must lie between 1 and {length - 1}, one less than the training length")
  tokenizer = make_tokenizer(loaded.experiment.data.tokenizer)
  ids = [[tokenizer.begin, *tokenizer.encode(encodable(prompt)).tolist()][max_tokens - length :] for prompt in prompts]
  ends = (tokenizer.begin, tokenizer.end)
  shards = loaded.model.partitioner.shards("batch")
  batch = shards * max(1, math.ceil(min(len(ids), LARGEST_BATCH) / shards))
  generator = Generator(loaded.model, batch, tokenizer.vocab_size, sampling)
  texts = [""] * len(ids)
  stops = [lambda continuation: continuation[-1] in ends] * len(ids)
  for i, continuation in generator.generate(loaded.parameters, ids, stops, max_tokens, seed):
    kept = [token for token in continuation if token not in ends]
    texts[i] = tokenizer.decode(np.array(kept, np.int64))
  return texts
