"""The data of harness tasks from a folder, in place of where each task says that its dataset is.

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
"""The YAML of a task, None where there is no such task."""


def task_files(name: str, data: pathlib.Path, configuration: Configuration) -> dict[str, str]:
  """The file of each split of a task.

  Raises:
    UserError: the folder has no data for it.
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
  """The splits that a task names and that have no file: they count as not there."""
  return {split: None for split in SPLITS if configuration.get(split) is not None and configuration[split] not in files}


@contextlib.contextmanager
def reading(files: Mapping[str, str] | None, cache: pathlib.Path) -> Iterator[None]:
  """Within it, any dataset that a task loads is read from these files, or as the task says where there are None.

  Both YAML and Python tasks call `datasets.load_dataset`. A module of tasks may keep the function that it finds
  when it is imported, so that function looks up what is to be read at each call.
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
