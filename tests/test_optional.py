"""Libraries that are not there."""

import sys

import pytest

from moejax.errors import UserError
from moejax.optional import library


def test_a_library_that_is_there_is_its_module():
  assert library("json.decoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize("name", ["no_such_library", "no_such_library.part"])
def test_a_missing_library_says_what_installs_it(name):
  with pytest.raises(UserError, match=r"^no_such_library is not installed; `pip install moejax\[data\]`$"):
    library(name)


def test_what_a_library_itself_lacks_is_not_blamed_on_it(tmp_path, monkeypatch):
  (tmp_path / "half_installed.py").write_text("import its_own_need\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="its_own_need"):
    library("half_installed")
