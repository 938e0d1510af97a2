"""Ensures that the text does not change within a run or between the members of a comparison."""

import pathlib
import re
from typing import Any

from moejax import processes
from moejax.data.corpus import PARTS, Corpus
from moejax.errors import UserError
from moejax.files import read_json, write_json

TEXT = "text.json"


def claim_text(directory: pathlib.Path, corpus: Corpus) -> None:
  """Records the corpus in the directory or, if one is recorded, checks that it is the same.

  Raises:
    UserError: If the text differs from the recorded text, or between the processes of this program. The message names
      the first difference.
  """
  summary = corpus.summary()
  here = {"sha256": summary["sha256"], "corpus": corpus.folder.name, "skipped": summary["skipped"]}
  different = [index for index, sha256 in enumerate(processes.gather(here["sha256"])) if sha256 != here["sha256"]]
  if different:
    raise UserError(
      f"process {different[0]} finds other text than process {processes.index()}; give all hosts the same files, "
      "preferably on a shared file system"
    )
  processes.first(lambda: _claim(directory, corpus, here))


def _claim(directory: pathlib.Path, corpus: Corpus, here: dict[str, Any]) -> None:
  path = directory / TEXT
  there = _read(path)
  if there is None:
    write_json(path, here)
  elif there["sha256"] != here["sha256"]:
    raise UserError(
      f"{directory} was started with other text: {_changes(corpus.folder.with_name(there['corpus']), corpus.folder)}; "
      "restore it to resume, or choose another --workdir"
    )


def _read(path: pathlib.Path) -> dict[str, str] | None:
  """Reads the recorded identity of the text, or returns None if there is none.

  Raises:
    UserError: If the file is damaged.
  """
  try:
    there = read_json(path)
    if isinstance(there["sha256"], str) and re.fullmatch(r"[0-9a-f]+", there["corpus"]):
      return there
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError):
    pass
  raise UserError(
    f"{path} is damaged, which identifies the text of {path.parent}; restore a copy or, if you are sure that the text "
    "has not changed, delete the file and run again"
  )


def _changes(there: pathlib.Path, here: pathlib.Path) -> str:
  """Describes the difference between two corpora. Names the first changed source."""
  try:
    before, now = _by_place(there), _by_place(here)
  except (OSError, ValueError, TypeError, KeyError):
    return f"the changes cannot be listed because {there} is missing or damaged"
  changed = [f"{place} is new" for place in now if place not in before]
  changed += [f"{place} is missing" for place in before if place not in now]
  changed += [f"{place} has changed" for place in now if place in before and now[place] != before[place]]
  more = f" and {len(changed) - 1:,} other differences" if len(changed) > 1 else ""
  return f"{changed[0]}{more}" if changed else "its tokenizer or the order of its documents has changed"


def _by_place(folder: pathlib.Path) -> dict[str, Any]:
  return {part["place"]: (part["stream"], part["sha256"]) for part in read_json(folder / PARTS)}
