"""Selects the files of a dataset in folders that Hugging Face `datasets` wrote."""

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from moejax.data.documents import SourceFile
from moejax.data.remote import RemotePath
from moejax.errors import UserError

_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"
"""Files that save_to_disk writes in addition to the Arrow files of a Dataset and the folders of a DatasetDict."""

_CACHED = re.compile(r"(cache-|tmp).*\.arrow")
"""Cached results of map and filter, which are stored in the folder of their input."""


def of_datasets(files: Sequence[SourceFile]) -> list[SourceFile]:
  """Selects files with text: of a saved dataset, those in its state.json, without cache files of `datasets`.

  Raises:
    UserError: If there are several splits, or a state.json is damaged or selects rows.
  """
  for file in files:
    if file.path.name == _DICT:
      folder = str(file.path).removesuffix(f"/{_DICT}")
      splits = ", ".join(f"{folder}/{split}" for split in sorted(_content(file.path).get("splits", ())))
      raise UserError(f"folder {folder!r} has the splits of a dataset; give one of {splits}")
  folders: dict[str, list[SourceFile]] = {}
  for file in files:
    folders.setdefault(file.name.rpartition("/")[0], []).append(file)
  kept = {file for of_folder in folders.values() for file in _of_folder(of_folder)}
  return [file for file in files if file in kept]


def _of_folder(files: list[SourceFile]) -> list[SourceFile]:
  arrow = next((file for file in files if file.kind == ".arrow"), None)
  if arrow is None:
    return files
  beside: Callable[[str], pathlib.Path | RemotePath] = arrow.path.with_name
  content = _content(beside(_STATE)) if beside(_STATE).is_file() else {}
  if any(content.get(name) for name in ("_indices_files", "_indices_data_files")):
    raise UserError(
      f"{beside(_STATE)}: this dataset was saved with an indices mapping; save it again with "
      "load_from_disk(FOLDER).flatten_indices().save_to_disk(OTHER)"
    )
  if "_data_files" in content:
    listed = {entry["filename"] for entry in content["_data_files"]}
    if missing := next((name for name in sorted(listed) if not beside(name).is_file()), None):
      raise UserError(
        f"{beside(missing)} is missing, which is listed in {_STATE}; restore it, or save the dataset again"
      )
    return [file for file in files if file.path.name in listed]
  if beside(_INFO).is_file():  # the cache of load_dataset
    return [file for file in files if not _CACHED.fullmatch(file.path.name) and file.path.name != _INFO]
  return files


def _content(path: pathlib.Path | RemotePath) -> dict[str, Any]:
  try:
    with path.open("rb") as file:
      content = json.loads(file.read())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is damaged ({error}); save the dataset again") from None
  return content if isinstance(content, dict) else {}
