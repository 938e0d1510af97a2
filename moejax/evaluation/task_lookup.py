"""Finds and loads tasks, groups, tags and patterns of lm-evaluation-harness by name."""

import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import datasets
import huggingface_hub
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from moejax.errors import UserError
from moejax.evaluation.task_data import absent_splits, reading, task_files
from moejax.files import read_json, write_whole

TASKS = pathlib.Path(lm_eval.tasks.__file__).parent
HUB_WAIT_S = 5.0
"""Timeout in seconds after which the Hugging Face Hub is considered unreachable."""
PACKAGES = {
  "antlr4": "antlr4-python3-runtime", "bs4": "beautifulsoup4", "PIL": "pillow", "pkg_resources": "setuptools",
  "sklearn": "scikit-learn",
}  # fmt: skip
"""Names of packages that differ from those of their modules."""


class TaskFinder(TaskManager):
  """A TaskManager of the harness that also finds tasks and data in folders.

  In addition, it caches the index of the 14,000 YAML files of the harness, loads a task with several names only once,
  and reports errors in one line.
  """

  def __init__(
    self,
    cache: pathlib.Path,
    data: pathlib.Path | None = None,
    include_path: pathlib.Path | None = None,
    progress: Callable[[str], None] = lambda name: None,
  ):
    """Args:
    cache: folder for the datasets made from `data`.
    data: folder with the data of the tasks. If None, tasks load their datasets.
    include_path: folder with additional YAML files, which replace those of the harness with the same name.
    progress: called with the name of each task before it is loaded.

    Raises:
      UserError: If a folder does not exist.
    """
    for name, folder in (("data", data), ("include_path", include_path)):
      if folder is not None and not folder.is_dir():
        raise UserError(f"{name}={str(folder)!r} is not a folder")
    super().__init__(include_defaults=False, include_path=include_path)
    self._index: dict[str, Entry] = harness_index() | self._index
    self._all_tasks = sorted(self._index)
    self._factory = _Factory(self._index, cache, data, progress)
    if data is None:
      _go_offline_without_the_hub()

  def names(self, name: str) -> list[str]:
    """The tasks and groups that a name stands for: the members of a tag, the matches of a pattern, or the task, group
    or YAML file itself.

    Raises:
      UserError: If there are none.
    """
    if name in self._index:
      entry = self._index[name]
      return sorted(entry.tags) if entry.kind == Kind.TAG else [name]
    if pathlib.Path(name).is_file():
      return [name]
    matching = self.match_tasks([name])
    if not matching:
      near = get_close_matches(name, self._all_tasks, n=3)
      raise UserError(
        f"lm-evaluation-harness has no task, group or tag {name}"
        + (f"; similar names are {', '.join(near)}" if near else "")
        + "; `lm-eval ls tasks` lists all tasks, and --include-path adds custom tasks"
      )
    return list(dict.fromkeys(found for match in matching for found in self.names(match)))

  def name_of(self, spec: str) -> str:
    """The name of a task or a group, which is read from the file if `spec` is the path of a YAML file."""
    entry = None if spec in self._index else TaskIndex.entry_from_path(pathlib.Path(spec))
    return entry.name if entry else spec

  def load(self, task_list: Any) -> Any:
    """Loads tasks like the TaskManager of the harness.

    Raises:
      UserError: If a task cannot be loaded, or has two different definitions.
    """
    try:
      return super().load(task_list)
    except UserError:
      raise
    except Exception as error:  # tasks are programs of others, and may fail in any way
      raise UserError(explained(", ".join(map(str, task_list)), error)) from error

  @staticmethod
  def _check_duplicates(built: list[Task | Group]) -> None:
    """Allows a task to be named twice, by itself and in a group, if it is the same task. It then runs once."""
    first: dict[str, tuple[str, Any]] = {}
    for item in built:
      source = item.name if isinstance(item, Group) else item.task_name
      for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
        there, other = first.setdefault(task.task_name, (source, task))
        if other is not task and (fields := _differences(other, task)):
          raise UserError(
            f"the task {task.task_name} is defined differently by {there} and by {source}; they differ in "
            f"{', '.join(fields)}; run them in two commands"
          )


class _Factory(TaskFactory):
  """Builds a task with its data."""

  def __init__(
    self, index: dict[str, Entry], cache: pathlib.Path, data: pathlib.Path | None, progress: Callable[[str], None]
  ):
    super().__init__()
    self._index, self._cache, self._data, self._progress = index, cache, data, progress

  def build(self, entry: Entry, *, overrides: dict[str, Any] | None = None, registry: dict[str, Entry]) -> Any:
    """Builds tasks like the factory of the harness, except that options for a nested group (`task: mmlu` with
    `num_fewshot: 5`) do not rename its tasks. In 0.4.13, all 57 subjects would be named mmlu, and only one would
      run."""
    if entry.kind == Kind.GROUP and overrides:
      overrides = {key: value for key, value in overrides.items() if key not in ("task", "group")}
    return super().build(entry, overrides=overrides, registry=registry)

  def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
    self._progress(entry.name)
    files = None
    if self._data is not None:
      configuration = {**(_configuration(self._index, entry.name) or {}), **(overrides or {})}
      files = task_files(entry.name, self._data, lambda name: _configuration(self._index, name))
      overrides = {**(overrides or {}), **absent_splits(configuration, files)}
    try:
      with reading(files, self._cache):
        task = super()._build_task(entry, overrides)
    except UserError:
      raise
    except Exception as error:  # tasks are programs of others, and may fail in any way
      raise UserError(explained(entry.name, error)) from error
    for mark, why in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "needs more than text")):
      if getattr(task, mark, False):
        raise UserError(f"the task {entry.name} {why}, which moejax does not support; remove the task")
    return task


def harness_index() -> dict[str, Entry]:
  """The tasks, groups and tags of the harness. The index is cached, because reading the YAML files takes 20 s."""
  files = sorted(TASKS.rglob("*.yaml"))
  state = repr([(str(path.relative_to(TASKS)), path.stat().st_mtime_ns) for path in files])
  root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  cached = root / "moejax" / "tasks" / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
  try:
    return _entries(read_json(cached))
  except (OSError, ValueError, TypeError, LookupError, AttributeError):  # there is none, or it is damaged
    index = TaskIndex.build([TASKS])
  rows = [
    [name, entry.kind.name, entry.yaml_path and str(entry.yaml_path.relative_to(TASKS)), sorted(entry.tags)]
    for name, entry in index.items()
  ]
  content = {"rows": rows, "sha256": _hash(rows)}
  _write(cached, json.dumps(content))
  return _entries(content)


def _entries(cached: dict[str, Any]) -> dict[str, Entry]:
  if cached["sha256"] != _hash(cached["rows"]):
    raise ValueError("the index is damaged")
  return {
    name: Entry(name, Kind[kind], path and TASKS / path, tags=set(tags)) for name, kind, path, tags in cached["rows"]
  }


def _hash(rows: list[list[Any]]) -> str:
  return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def explained(name: str, error: BaseException) -> str:
  """A message of one line with the reason why a task failed in the harness, and the remedy."""
  causes = [error]
  while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
    causes.append(cause)
  for cause in causes:
    if isinstance(cause, ImportError) and cause.name:
      package = cause.name.partition(".")[0]
      return f"the task {name} needs {package}, which is not installed; run `pip install {_requirement(package)}`"
  if any(_is_offline(cause) for cause in causes):
    named = re.search(r"'([\w.-]+/[\w.-]+)'", str(error))
    what, remedy = (
      (named[1], ", or give the data as files with --data DIR") if named else ("a file, such as a metric,", "")
    )
    return (
      f"the task {name} needs {what} from {huggingface_hub.constants.ENDPOINT}, which is not in the local cache "
      f"and cannot be reached; connect to the network{remedy}"
    )
  first = str(error).strip().partition("\n")[0]
  return f"lm-evaluation-harness fails at {name} with {type(error).__name__}: {first[:300]}"


def _is_offline(error: BaseException) -> bool:
  """Whether the Hub could not be reached, as opposed to not having the dataset."""
  if isinstance(error, ConnectionError) or re.search("offline|LocalEntryNotFound", f"{type(error)} {error}", re.I):
    return True
  # The error for a module (a metric) that is looked up offline only states that it is not found.
  return isinstance(error, FileNotFoundError) and huggingface_hub.constants.HF_HUB_OFFLINE and "Hub" in str(error)


def _requirement(package: str) -> str:
  """The requirement that installs a missing package of a task: the extra of the harness that contains it, if any."""
  wanted, extras = PACKAGES.get(package, package), set()
  for line in importlib.metadata.metadata("lm-eval").get_all("Requires-Dist") or []:
    required = re.split(r"[^\w.-]", line, maxsplit=1)[0]
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
    if extra and _plain(required) == _plain(wanted):
      extras.add(extra.group(1))
  extras -= {"all", "dev", "tasks", "testing"}
  return f"'lm-eval[{extras.pop()}]'" if len(extras) == 1 else wanted


def _plain(package: str) -> str:
  return re.sub(r"[-_.]+", "-", package).lower()


def _differences(one: Task, other: Task) -> list[str]:
  """Fields of the configuration in which two tasks of one name differ."""
  ours, theirs = one.dump_config(), other.dump_config()
  return sorted(key for key in ours.keys() | theirs.keys() if repr(ours.get(key)) != repr(theirs.get(key)))


def _configuration(index: dict[str, Entry], name: str) -> dict[str, Any] | None:
  entry = index.get(name)
  return load_yaml(entry.yaml_path, resolve_func=False) if entry and entry.yaml_path else None


def _go_offline_without_the_hub() -> None:
  """Switches to offline mode if the Hub does not respond, because its libraries would retry for a minute."""
  if huggingface_hub.constants.HF_HUB_OFFLINE or _hub_answers():
    return
  huggingface_hub.constants.HF_HUB_OFFLINE = True
  datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def _hub_answers() -> bool:
  found: list[bool] = []

  def request() -> None:
    try:
      request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
      urllib.request.urlopen(request, timeout=HUB_WAIT_S)
    except urllib.error.HTTPError as error:
      if error.code in (407, 502, 503, 504):  # errors of a proxy
        return
    except OSError:
      return
    found.append(True)

  requesting = threading.Thread(target=request, daemon=True)  # resolving a host name has no timeout
  requesting.start()
  requesting.join(HUB_WAIT_S)
  return bool(found)


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file of the cache, if possible."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
  except OSError as error:
    logging.getLogger(__name__).info("the index of tasks is not cached: %s", error)
