"""Reads prompts from a JSONL file, and formats their continuations as JSONL."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.data.records import encodable
from moejax.errors import UserError
from moejax.inference.text import Continuation, Prompt

FIELDS = '{"prompt": "...", "max_tokens": 64, "stop": ["\\n"]}'
"""A line of a batch file. Other fields are copied to the output."""


OF_COMMAND = ("temperature", "top_k", "top_p", "min_p")
"""Options of the command that a line cannot have."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One line of a batch file."""

  line: dict[str, Any]
  prompt: Prompt


def read_requests(path: pathlib.Path, max_tokens: int, stop: Sequence[str], length: int) -> list[Request]:
  """Reads the requests of a batch file for a model with this training length. `max_tokens` and `stop` are defaults for
  lines without these fields.

  Raises:
    UserError: If the file cannot be read or a line is not valid. The message gives the line number.
  """
  try:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else error
    raise UserError(f"--batch-file {path} cannot be read ({reason}); give a JSONL file") from None
  requests = [
    _request(line, f"{path}, line {n}", max_tokens, stop, length) for n, line in enumerate(lines, 1) if line.strip()
  ]
  if not requests:
    raise UserError(f"--batch-file {path} is empty; each line must be an object such as {FIELDS}")
  return requests


def _request(text: str, where: str, max_tokens: int, stop: Sequence[str], length: int) -> Request:
  try:
    line = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not JSON ({error}); each line is an object such as {FIELDS}") from None
  if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
    raise UserError(f'{where} has no string "prompt"; each line is an object such as {FIELDS}')
  for name in OF_COMMAND:
    if line.get(name) is not None:
      raise UserError(f"{where}: {name}={line[name]!r} cannot differ by line; use --{name.replace('_', '-')}")
  limit = max_tokens if line.get("max_tokens") is None else line["max_tokens"]
  stops = list(stop) if line.get("stop") is None else line["stop"]
  if type(limit) is not int or limit < 1:
    raise UserError(f"{where}: max_tokens={limit!r} must be an integer above 0")
  stops = [stops] if isinstance(stops, str) else stops
  if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
    raise UserError(f"{where}: stop={stops!r} must be a string or a list of strings")
  try:
    prompt = Prompt(text=line["prompt"], max_tokens=limit, stop=tuple(stops))
    prompt.check_fits(length)
  except UserError as error:
    raise UserError(f"{where}: {error}") from None
  return Request(line, prompt)


def answers(requests: Sequence[Request], continuations: Sequence[Continuation]) -> Iterator[str]:
  """Yields the lines of the output: each request with its continuation."""
  for request, found in zip(requests, continuations, strict=True):
    yield encodable(json.dumps({**request.line, **dataclasses.asdict(found)}, ensure_ascii=False)) + "\n"
