"""Executes Python files of users, which can import modules from their folder like scripts.

Files in two folders may import different modules with the same name, also inside functions. Therefore, each folder is a
separate package. `import sizes` in one of its files imports the module `sizes` of this package. `sys.path` and the
names of other modules do not change.
"""

import builtins
import contextlib
import importlib
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from moejax.config.kinds import RAISED_BY, short_path
from moejax.errors import UserError, chain, reason

FOLDERS: dict[pathlib.Path, "_Folder"] = {}  # folders of executed files


def import_file(path: str) -> ModuleType:
  """Imports a Python file, so that its routers, optimizers and other kinds of configurations can be used by name.

  A file is executed again only if it, or a module that it imported from its folder, has changed.

  Raises:
    UserError: If the file does not exist or raises an exception.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    raise UserError(f"{path} is a folder; give the path of a Python file in it, as in {file / 'mine.py'}")
  if not file.is_file():
    raise UserError(f"{path} does not exist; give the path of a Python file")
  if file.suffix != ".py":
    raise UserError(f"{path} is not a Python file; its name must end in .py")
  folder = file.parent.resolve()
  if folder not in FOLDERS:
    FOLDERS[folder] = _Folder(folder, f"moejax_folder_{len(FOLDERS)}")
  with one_line_errors(path):
    return FOLDERS[folder].execute(file.name)


@contextlib.contextmanager
def one_line_errors(path: str) -> Iterator[None]:
  """Converts an exception of a user's file to a UserError with the line of that file, or of a file in its folder."""
  try:
    yield
  except (Exception, SystemExit) as error:
    text = " ".join(str(error).split())
    where = _user_line(path, error)
    if isinstance(error, UserError):
      raise UserError(f"{where}: {text}" if where else text) from error
    kind = type(error).__name__
    said = f"{where or path}: {kind}: {text}" if text else f"{where or path}: {kind}"
    raise UserError(f"{said}{_raised_by(error)}") from error


class _Folder:
  """A folder as a package, and the import finder for its modules."""

  def __init__(self, path: pathlib.Path, package: str):
    self.path, self.package = path, package
    self.builtins = vars(builtins) | {"__import__": self._import}
    self.importlib = ModuleType("importlib")
    vars(self.importlib).update(vars(importlib), import_module=self._import_module)
    self.texts: dict[str, bytes] = {}  # content of executed files, by path
    self._forget()
    sys.meta_path.insert(0, self)

  def execute(self, name: str) -> ModuleType:
    """Executes a file and returns its module."""
    if any(not os.path.isfile(path) or pathlib.Path(path).read_bytes() != text for path, text in self.texts.items()):
      self._forget()
    importlib.invalidate_caches()  # a file may have been written since the folder was last read
    module_name, path = f"{self.package}.{name.removesuffix('.py')}", str(self.path / name)
    if module_name not in sys.modules:
      loader = _Loader(self, module_name, path)
      spec = importlib.util.spec_from_file_location(module_name, path, loader=loader)
      assert spec
      sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
      try:
        loader.exec_module(module)
      except BaseException:
        del sys.modules[module_name]
        raise
    return sys.modules[module_name]

  def find_spec(
    self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
  ) -> ModuleSpec | None:
    """Finds a module of the package. Returns None for any other module."""
    if not name.startswith(f"{self.package}."):
      return None
    spec = PathFinder.find_spec(name, path, target)
    if spec and isinstance(spec.loader, SourceFileLoader):
      spec.loader = _Loader(self, name, spec.loader.path)
    return spec

  def _import(
    self,
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
  ) -> ModuleType:
    """Implements `import` in the files of the folder."""
    if name == "importlib":  # with those of its modules that fromlist names, such as metadata
      found = builtins.__import__(name, globals, locals, fromlist or (), level)
      vars(self.importlib).update(vars(found), import_module=self._import_module)
      return self.importlib
    top = f"{self.package}.{name.partition('.')[0]}"
    # A file named optax.py that imports optax does not import itself.
    if level or not self._has(name.partition(".")[0]) or (globals and globals.get("__name__") == top):
      return builtins.__import__(name, globals, locals, fromlist or (), level)
    found = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist or ())
    return found if fromlist else sys.modules[top]

  def _import_module(self, name: str, package: str | None = None) -> ModuleType:
    """What `importlib.import_module` does in a file of the folder."""
    return importlib.import_module(f"{self.package}.{name}" if self._has(name.partition(".")[0]) else name, package)

  def _has(self, name: str) -> bool:
    """Whether a top-level module with this name is in the folder."""
    spec = PathFinder.find_spec(f"{self.package}.{name}", [str(self.path)])
    if spec is None or name == "moejax":  # a copy of moejax beside the file is not the one that runs
      return False
    if spec.loader is None:  # a folder without __init__.py comes after any module, as in Python
      return name not in sys.modules and importlib.util.find_spec(name) is None
    return spec.origin != getattr(sys.modules.get(name), "__file__", None)  # a notebook may have imported it itself

  def _forget(self) -> None:
    self.texts.clear()
    for name in [name for name in sys.modules if name.startswith(f"{self.package}.")]:
      del sys.modules[name]
    sys.modules[self.package] = package = ModuleType(self.package)
    package.__path__ = [str(self.path)]


class _Loader(SourceFileLoader):
  """Executes a file with the `import` of its folder. It does not use Python's cache of compiled files, whose time
  stamps do not detect changes within a second."""

  def __init__(self, folder: _Folder, name: str, path: str):
    super().__init__(name, path)
    self.folder = folder

  def get_code(self, fullname: str) -> CodeType:
    text = self.folder.texts[self.path] = self.get_data(self.path)
    return self.source_to_code(text, self.path)

  def exec_module(self, module: ModuleType) -> None:
    vars(module)["__builtins__"] = self.folder.builtins
    super().exec_module(module)


def failure_of_users_code(error: BaseException) -> tuple[str, str] | None:
  """The user's own part of a traceback, and one line that says what was raised where; None if a user's file was not
  running."""
  for cause in chain(error):
    if frames := _user_frames(cause):
      last = frames[-1]
      line = f"{short_path(last.filename)}:{last.lineno}: {type(cause).__name__}: {reason(cause)}{_raised_by(cause)}"
      return "".join(traceback.format_list(frames)), line
  return None


def _raised_by(error: BaseException) -> str:
  """The kind whose code raised an exception, in parentheses; empty if it was none."""
  return next((f" ({note})" for note in getattr(error, "__notes__", ()) if note.startswith(RAISED_BY)), "")


def _user_line(path: str, error: BaseException) -> str | None:
  """FILE:LINE of the innermost code of a user in a traceback; None if it was not reached."""
  lines = [(frame.filename, frame.lineno) for frame in _user_frames(error)]
  if isinstance(error, SyntaxError) and any(error.filename in folder.texts for folder in FOLDERS.values()):
    lines.append((str(error.filename), error.lineno or 1))
  for file, line in lines[-1:]:
    return f"{path if pathlib.Path(file) == _absolute(path) else short_path(file)}:{line}"
  return None


def _absolute(path: str) -> pathlib.Path:
  """The path by which a file is executed."""
  return pathlib.Path(path).parent.resolve() / pathlib.Path(path).name


def _user_frames(error: BaseException) -> traceback.StackSummary:
  """The frames of a traceback that execute the files of users."""
  packages = tuple(f"{folder.package}." for folder in FOLDERS.values())
  walked = traceback.walk_tb(error.__traceback__)
  found = [(frame, line) for frame, line in walked if str(frame.f_globals.get("__name__")).startswith(packages)]
  # Without the methods that dataclasses writes.
  return traceback.StackSummary.extract(pair for pair in found if pair[0].f_code.co_filename != "<string>")
