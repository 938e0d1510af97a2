"""Tasks of lm-evaluation-harness, found quickly, and their data taken from a folder where one is given.

An overlay is a task's own YAML, included, with its dataset replaced by local files:

    DIR/TASK/SPLIT.jsonl            as DIR/arc_easy/test.jsonl
    DIR/GROUP/SUBTASK/SPLIT.jsonl   as DIR/mmlu/anatomy/test.jsonl, for the task mmlu_anatomy
    DIR/DATASET/SPLIT.jsonl         as DIR/gsm8k/test.jsonl, for gsm8k_cot, which reads the data of the task gsm8k
"""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from moejax.errors import UserError

TASKS = pathlib.Path(lm_eval.tasks.__file__).parent
DECLARED = re.compile(r"""^["']?(?:task|group)["']?:[ ]*["']?([\w.-]+)""", re.MULTILINE)
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def find_tasks(names: Sequence[str], data: pathlib.Path | None, overlays: pathlib.Path) -> TaskManager:
  """A manager that knows these tasks.

  Args:
    names: tasks or groups of the harness.
    data: folder of their data; None leaves to the harness where it comes from.
    overlays: folder for the overlays, written anew.

  Raises:
    UserError: the harness has no such task, or the folder has no data for one.
  """
  families = _families(names)
  manager = TaskManager(include_defaults=False, include_path=families)
  if data is None:
    return manager
  overlays.mkdir(parents=True, exist_ok=True)
  for old in overlays.glob("*.yaml"):
    old.unlink()
  leaves = list(dict.fromkeys(leaf for name in names for leaf in _leaves(manager.task_index, name)))
  for name in leaves:
    _write_overlay(manager.task_index, name, data, overlays)
  return TaskManager(include_defaults=False, include_path=[*families, overlays])


def _families(names: Iterable[str]) -> list[pathlib.Path]:
  """The harness's folders that declare these names: reading the YAML of all 14,000 tasks takes 14 s, searching 1 s."""
  wanted = set(names)
  found: dict[str, pathlib.Path] = {}
  for path in sorted(TASKS.rglob("*.yaml")):
    for name in DECLARED.findall(path.read_text(errors="replace")):
      if name in wanted:
        found.setdefault(name, TASKS / path.relative_to(TASKS).parts[0])
  missing = sorted(wanted - set(found))
  if missing:
    raise UserError(f"lm-evaluation-harness has no task or group {', '.join(missing)}; `lm-eval ls tasks` lists them")
  return sorted(set(found.values()))


def _leaves(index: Mapping[str, Any], name: str) -> list[str]:
  """The tasks that a task, a group or a tag stands for."""
  entry = index[name]
  if entry.kind.name == "TAG":
    return [leaf for child in sorted(entry.tags) for leaf in _leaves(index, child)]
  if entry.kind.name != "GROUP":
    return [name]
  listed = entry.cfg["task"]
  children = listed if isinstance(listed, list) else [listed]
  names = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in children]
  return [leaf for child in names for leaf in _leaves(index, child)]


def _write_overlay(index: Mapping[str, Any], name: str, data: pathlib.Path, overlays: pathlib.Path) -> None:
  entry = index[name]
  folder = _folder(index, name, data)
  files = {path.stem: str(path.absolute()) for path in sorted(folder.glob("*.jsonl"))}
  absent = [split for split in SPLITS if entry.cfg.get(split) is not None and entry.cfg[split] not in files]
  overlay = {
    "include": str(entry.yaml_path),
    "task": name,
    "dataset_path": "json",
    "dataset_name": None,
    "dataset_kwargs": {"data_files": files, "cache_dir": str(overlays.absolute() / "cache")},
    **dict.fromkeys(absent),
  }
  (overlays / f"{name}.yaml").write_text(json.dumps(overlay))  # JSON is YAML


def _folder(index: Mapping[str, Any], name: str, data: pathlib.Path) -> pathlib.Path:
  """Where the data of a task lies."""
  cuts = [match.start() for match in re.finditer("_", name)][::-1]
  own = [data / name, *(data / name[:cut] / name[cut + 1 :] for cut in cuts)]
  shared = [data / name[:cut] for cut in cuts if _same_dataset(index, name, name[:cut])]
  for folder in (*own, *shared):
    if any(folder.glob("*.jsonl")):
      return folder
  looked = ", ".join(str(folder.relative_to(data)) for folder in (*own, *shared))
  raise UserError(f"{data} has no data for the task {name}: it needs SPLIT.jsonl in one of {looked}")


def _same_dataset(index: Mapping[str, Any], one: str, other: str) -> bool:
  if other not in index or not index[other].cfg:
    return False
  return all(index[one].cfg.get(key) == index[other].cfg.get(key) for key in ("dataset_path", "dataset_name"))
