"""Encodes the texts of benchmarks as lm-evaluation-harness does."""

from moejax.data.records import encodable
from moejax.data.tokenizers import Tokenizer
from moejax.errors import UserError


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """Ids of a context, which the tokenizer's begin opens, and of the continuation to score after it.

  As in the harness's own models, spaces at the end of the context belong to the continuation, so that words stay whole,
  and both are encoded jointly. A token may span the join; where that leaves no token for the continuation, the two are
  encoded apart. An empty continuation has no ids, whatever the context: its log-likelihood is 0.

  Raises:
    UserError: the tokenizer has no token for the continuation even by itself, so that it has no likelihood.
  """
  context, continuation = encodable(context), encodable(continuation)
  kept = context.rstrip()
  context_ids = tokenizer.encode(kept).tolist()
  if not continuation:
    return [tokenizer.begin, *context_ids], []
  scored = context[len(kept) :] + continuation
  ids = tokenizer.encode(kept + scored).tolist()[len(context_ids) :] or tokenizer.encode(scored).tolist()
  if not ids:
    raise UserError(
      f"the tokenizer encodes the continuation {scored!r} as no token, so it has no likelihood; leave out the task "
      "with it, or train with a tokenizer that keeps white space"
    )
  return [tokenizer.begin, *context_ids], ids


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
  """Ids of a text to score as a whole: begin, and all of the text; an empty text has the log-likelihood 0."""
  return [tokenizer.begin], tokenizer.encode(encodable(text)).tolist()


def is_cut(context: list[int], continuation: list[int], max_length: int) -> bool:
  """Whether the model sees less than the whole context before some token of the continuation."""
  return len(context) + len(continuation) > max_length + 1


def encode_prompt(tokenizer: Tokenizer, prompt: str, max_tokens: int) -> tuple[list[int], bool]:
  """The last `max_tokens` ids of a prompt, begin included, and whether that leaves out any."""
  ids = [tokenizer.begin, *tokenizer.encode(encodable(prompt)).tolist()]
  return ids[-max_tokens:], len(ids) > max_tokens
