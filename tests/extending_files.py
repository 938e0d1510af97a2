"""The files of docs/extending.md, as a user has them."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
FILES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))


@contextlib.contextmanager
def written(folder: pathlib.Path) -> Iterator[None]:
  """Writes the files to a folder, which is the current one."""
  for name, text in FILES.items():
    (folder / name).write_text(text)
  before = os.getcwd()
  os.chdir(folder)
  try:
    yield
  finally:
    os.chdir(before)
