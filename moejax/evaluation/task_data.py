"""Reads the data of harness tasks from a folder, instead of the dataset that is named in each task.

DIR/TASK/SPLIT.jsonl            as DIR/arc_easy/test.jsonl
DIR/GROUP/SUBTASK/SPLIT.jsonl   as DIR/mmlu/anatomy/test.jsonl, for the task mmlu_anatomy
DIR/DATASET/SPLIT.jsonl         as DIR/gsm8k/test.jsonl, for gsm8k_cot, which reads the data of the task gsm8k
"""

import contextlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets

from moejax.errors import UserError

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
Configuration = Callable[[str], Mapping[str, Any] | None]
"""Returns the YAML of a task, or None if there is no such task."""


def task_files(name: str, data: pathlib.Path, configuration: Configuration) -> dict[str, str]:
  """The file of each split of a task.

  Raises:
    UserError: If the folder has no data for it.
  """
  cuts = [match.start() for match in re.finditer("_", name)][::-1]
  own = [data / name, *(data / name[:cut] / name[cut + 1 :] for cut in cuts)]
  others = (
    folder for folder in sorted(data.iterdir()) if _same_dataset(configuration(name), configuration(folder.name))
  )
  for folder in itertools.chain(own, others):
    if files := {path.stem: str(path.absolute()) for path in sorted(folder.glob("*.jsonl"))}:
      return files
  looked = ", ".join(str(folder.relative_to(data)) for folder in own)
  raise UserError(
    f"{data} has no data for the task {name}: it needs SPLIT.jsonl in one of {looked}, or in the folder of a task with "
    "the same dataset"
  )


def absent_splits(configuration: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, None]:
  """The splits of a task without a file, which are treated as missing."""
  return {split: None for split in SPLITS if configuration.get(split) is not None and configuration[split] not in files}


@contextlib.contextmanager
def reading(files: Mapping[str, str] | None, cache: pathlib.Path) -> Iterator[None]:
  """A context in which tasks load their datasets from these files or, if `files` is None, as usual.

  Both YAML and Python tasks call `datasets.load_dataset`. Since a module can keep a reference to this function, it is
  replaced by a function that looks up the current files at each call.
  """
  global _read
  given, before = datasets.load_dataset, _read
  datasets.load_dataset, _read = _load_dataset, (files, cache)
  try:
    yield
  finally:
    datasets.load_dataset, _read = given, before


_given = datasets.load_dataset
_read: tuple[Mapping[str, str] | None, pathlib.Path] = (None, pathlib.Path())


def _load_dataset(path: str, name: str | None = None, *more: Any, split: Any = None, **options: Any) -> Any:
  files, cache = _read
  if files is None:
    return _given(path, name, *more, split=split, **options)
  return _given("json", data_files=dict(files), cache_dir=str(cache), split=split)


def _same_dataset(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
  if not one or not other:
    return False
  return all(one.get(key) == other.get(key) for key in ("dataset_path", "dataset_name"))
