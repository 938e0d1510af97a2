"""Encodes the texts of benchmarks as lm-evaluation-harness does."""

from moejax.data.records import encodable
from moejax.data.tokenizers import Tokenizer
from moejax.errors import UserError


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """Encodes a context, starting with the begin token, and a continuation to score.

  As in the models of the harness, trailing spaces of the context are moved to the continuation, and both are encoded
  together. A token may span the boundary. If this leaves no token for the continuation, both are encoded separately. An
  empty continuation has no ids and log-likelihood 0.

  Raises:
    UserError: If the continuation is encoded to no tokens, so that it has no likelihood.
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
      f"the tokenizer encodes the continuation {scored!r} to no tokens, so it has no likelihood; remove the task, or "
      "train with a tokenizer that keeps white space"
    )
  return [tokenizer.begin, *context_ids], ids


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
  """Encodes a text to score as a whole: the begin token, and the ids of the text."""
  return [tokenizer.begin], tokenizer.encode(encodable(text)).tolist()


def is_cut(context: list[int], continuation: list[int], max_length: int) -> bool:
  """Whether the context is truncated for some token of the continuation."""
  return len(context) + len(continuation) > max_length + 1


def encode_prompt(tokenizer: Tokenizer, prompt: str, max_tokens: int) -> tuple[list[int], bool]:
  """The last `max_tokens` ids of a prompt, including the begin token, and whether the prompt is truncated."""
  ids = [tokenizer.begin, *tokenizer.encode(encodable(prompt)).tolist()]
  return ids[-max_tokens:], len(ids) > max_tokens
