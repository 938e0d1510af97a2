"""Files of a user's, each with the modules in its own folder."""

import importlib
import pathlib
import sys
from importlib import metadata

import pytest

from moejax.errors import UserError
from moejax.user_files import import_file

IMPORTS = {
  "import": "import sizes\nvalue = lambda: sizes.D_FF",
  "import as": "import sizes as s\nvalue = lambda: s.D_FF",
  "from": "from sizes import D_FF\nvalue = lambda: D_FF",
  "in a function": "def value():\n  from sizes import D_FF\n  return D_FF",
  "in a method": "class A:\n  def value(self):\n    import sizes\n    return sizes.D_FF\nvalue = A().value",
  "through another": "import other\nvalue = lambda: other.value()",
  "of a package": "from package.inner import D_FF\nvalue = lambda: D_FF",
  "dotted": "def value():\n  import package.inner\n  return package.inner.D_FF",
  "a module of a package": "from package import inner\nvalue = lambda: inner.D_FF",
  "relative in a package": "from package.leaf import D_FF\nvalue = lambda: D_FF",
  "relative": "from .sizes import D_FF\nvalue = lambda: D_FF",
  "beside a package": "import package\nvalue = lambda: package.D_FF",
  "a folder": "from plain_folder import leaf\nvalue = lambda: leaf.D_FF",
  "by text": "def value():\n  scope = {}\n  exec('from sizes import D_FF', globals(), scope)\n  return scope['D_FF']",
  "by name": "import importlib\nvalue = lambda: importlib.import_module('sizes').D_FF",
  "by a dotted name": "from importlib import import_module\nvalue = lambda: import_module('package.inner').D_FF",
  "named as a library": "import json\nvalue = lambda: json.D_FF",
}
"""Ways in which a file gets D_FF from its folder."""


SIZES = {"first": 111, "second": 222}
"""D_FF in each folder."""


@pytest.fixture
def folders(tmp_path):
  """Two folders with files of the same names, whose D_FF differ."""
  for name, size in SIZES.items():
    content = {
      "sizes.py": f"D_FF = {size}",
      "json.py": f"D_FF = {size}",
      "other.py": "def value():\n  from sizes import D_FF\n  return D_FF",
      "package/__init__.py": "from sizes import D_FF",
      "package/inner.py": "from package import D_FF",
      "package/leaf.py": "from .inner import D_FF",
      "plain_folder/leaf.py": "import sizes\nD_FF = sizes.D_FF",
      **{f"{way.replace(' ', '-')}.py": text for way, text in IMPORTS.items()},
    }
    for file, text in content.items():
      path = tmp_path / name / file
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
  return [tmp_path / name for name in SIZES]


def test_each_file_imports_the_modules_of_its_own_folder_at_any_time(folders):
  names, path = {*sys.modules}, [*sys.path]
  files = [(way, folder) for way in IMPORTS for folder in folders]
  modules = [import_file(str(folder / f"{way.replace(' ', '-')}.py")) for way, folder in files]
  wrong = [way for (way, folder), module in zip(files, modules, strict=True) if module.value() != SIZES[folder.name]]
  assert not wrong
  assert all(name.startswith("moejax_folder_") for name in {*sys.modules} - names) and sys.path == path


def test_a_file_and_the_module_that_its_neighbor_imports_are_the_same(tmp_path):
  (tmp_path / "one.py").write_text("class Kind: ...")
  (tmp_path / "two.py").write_text("from one import Kind")
  assert import_file(str(tmp_path / "two.py")).Kind is import_file(str(tmp_path / "one.py")).Kind


def test_what_was_changed_is_executed_again_and_nothing_else(tmp_path):
  (tmp_path / "sizes.py").write_text("D_FF = 1")
  (tmp_path / "mine.py").write_text("from sizes import D_FF\nmade = object()")
  first = import_file(str(tmp_path / "mine.py"))
  assert import_file(str(tmp_path / "mine.py")) is first
  (tmp_path / "sizes.py").write_text("D_FF = 2")  # within the same second, of the same length
  assert import_file(str(tmp_path / "mine.py")).D_FF == 2 and first.D_FF == 1
  (tmp_path / "sizes.py").unlink()
  with pytest.raises(UserError, match=r"mine\.py:1: ModuleNotFoundError: No module named 'sizes'"):
    import_file(str(tmp_path / "mine.py"))


def test_a_file_may_have_the_name_of_a_library_that_it_imports(tmp_path):
  (tmp_path / "optax.py").write_text("import optax\nvalue = optax.adam")
  assert callable(import_file(str(tmp_path / "optax.py")).value)


def test_a_copy_of_moejax_beside_a_file_is_not_imported(tmp_path):
  (tmp_path / "moejax").mkdir()
  (tmp_path / "moejax" / "__init__.py").write_text("1 / 0")
  (tmp_path / "mine.py").write_text("from moejax.config import Experiment")
  assert import_file(str(tmp_path / "mine.py")).Experiment


def test_a_neighbor_that_a_notebook_has_imported_is_not_executed_again(tmp_path, monkeypatch):
  (tmp_path / "of_a_notebook.py").write_text("class Kind: ...")
  (tmp_path / "mine.py").write_text("from of_a_notebook import Kind")
  monkeypatch.syspath_prepend(tmp_path)
  import of_a_notebook  # type: ignore[import-not-found]

  assert import_file(str(tmp_path / "mine.py")).Kind is of_a_notebook.Kind
  del sys.modules["of_a_notebook"]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("none.py", None, r"none\.py does not exist; give the path of a Python file"),
    (".", None, r"^\. is a folder; give the path of a Python file in it, as in mine\.py"),
    ("own.py", "1 / 0", r"^own\.py:1: ZeroDivisionError"),
    ("own.txt", "", r"^own\.txt is not a Python file"),
  ],
)
def test_a_file_to_import_that_is_missing_or_fails_is_an_error_of_one_line(name, text, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  if text is not None:
    pathlib.Path(name).write_text(text)
  with pytest.raises(UserError, match=message):
    import_file(name)


def test_a_module_of_importlib_that_nothing_has_imported_yet_is_found(tmp_path, monkeypatch):
  monkeypatch.delitem(sys.modules, "importlib.metadata", raising=False)
  monkeypatch.delattr(importlib, "metadata", raising=False)
  text = "from importlib import import_module, metadata\nvalue = lambda: metadata.version('jax')"
  (tmp_path / "own.py").write_text(text)
  assert import_file(str(tmp_path / "own.py")).value() == metadata.version("jax")
