"""Ensures that the text does not change within a run or between the members of a comparison."""

import json
import pathlib
import re
from typing import Any

from moejax import processes
from moejax.data.corpus import PARTS, Corpus
from moejax.errors import UserError
from moejax.files import write_json

TEXT = "text.json"


def claim_text(directory: pathlib.Path, corpus: Corpus) -> None:
  """Makes the corpus the directory's, or checks that it is.

  Raises:
    UserError: the directory was begun with other text; the message names what has changed. Or the processes of this
      program find different text.
  """
  here = {"sha256": corpus.summary()["sha256"], "corpus": corpus.folder.name}
  different = [index for index, sha256 in enumerate(processes.gather(here["sha256"])) if sha256 != here["sha256"]]
  if different:
    raise UserError(
      f"process {different[0]} finds other text than process {processes.index()}; give all hosts the same files, best "
      "on a file system that they share"
    )
  processes.first(lambda: _claim(directory, corpus, here))


def _claim(directory: pathlib.Path, corpus: Corpus, here: dict[str, Any]) -> None:
  path = directory / TEXT
  there = _read(path)
  if there is None:
    write_json(path, here)
  elif there["sha256"] != here["sha256"]:
    raise UserError(
      f"{directory} was begun with other text: {_changes(corpus.folder.with_name(there['corpus']), corpus.folder)}; "
      "restore it to continue, or choose another --workdir"
    )


def _read(path: pathlib.Path) -> dict[str, str] | None:
  """What a directory was begun with, None if it has none.

  Raises:
    UserError: the file is damaged.
  """
  try:
    there = json.loads(path.read_bytes())
    if isinstance(there["sha256"], str) and re.fullmatch(r"[0-9a-f]+", there["corpus"]):
      return there
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError):
    pass
  raise UserError(
    f"{path} is damaged, which says what text {path.parent} was begun with; put a copy in its place, or, if you are "
    "sure that the text has not changed, delete it and run again"
  )


def _changes(there: pathlib.Path, here: pathlib.Path) -> str:
  """What differs between two corpora, the first thing by name."""
  try:
    before, now = _by_place(there), _by_place(here)
  except (OSError, ValueError, TypeError, KeyError):
    return f"{there} is gone or damaged, which would say what has changed"
  changed = [f"{place} is new" for place in now if place not in before]
  changed += [f"{place} is gone" for place in before if place not in now]
  changed += [f"{place} has changed" for place in now if place in before and now[place] != before[place]]
  more = f" and {len(changed) - 1:,} other differences" if len(changed) > 1 else ""
  return f"{changed[0]}{more}" if changed else "its tokenizer or the order of its documents has changed"


def _by_place(folder: pathlib.Path) -> dict[str, Any]:
  return {part["place"]: (part["stream"], part["sha256"]) for part in json.loads((folder / PARTS).read_bytes())}
