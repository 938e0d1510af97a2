"""A letter of an array's name means one thing in all files: what docs/architecture.md says."""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TABLE = dict(
  re.findall(
    r"\| ([A-W]) \| ([^|]+?) (?=\|)", (ROOT / "docs" / "architecture.md").read_text().partition("| letter |")[2]
  )
)
OWN = set("XYZ")
"""Letters that each file defines for itself."""
SOURCES = sorted((ROOT / "moejax").rglob("*.py"))


def legend(path: pathlib.Path) -> dict[str, str]:
  """The letters of a file's docstring, with what they stand for."""
  entries: dict[str, str] = {}
  for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines():
    parts = re.split(r"  +", line.strip())
    if all(re.match(r"[A-Z] (= )?\S", part) for part in parts) and (
      len(parts) > 1 or parts[0][2:] in TABLE.values() or parts[0][1:3] == " ="
    ):
      entries |= {part[0]: part[2:] for part in parts}
  return entries


def letters(path: pathlib.Path) -> set[str]:
  """Capital letters in the suffixes of a file's names, such as q_BTNH; a constant is no array."""
  found: set[str] = set()
  for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
    if token.type == tokenize.NAME and (match := re.fullmatch(r"_?[a-z]\w*_([A-Z][A-Za-z0-9]{0,6})", token.string)):
      suffix = match[1]
      if len(suffix) == 1 or not re.search(r"[a-z]{3}", suffix):
        found |= {letter for letter in suffix if letter.isupper()}
  return found


def test_every_letter_has_one_meaning():
  assert sorted({*TABLE, *OWN}) == [chr(ord("A") + i) for i in range(26)]
  assert len({*TABLE.values()}) == len(TABLE)
  assert sum(bool(legend(path)) for path in SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_the_legend_of_its_letters(path):
  printed = legend(path)
  wrong = {letter: meaning for letter, meaning in printed.items() if letter not in OWN and TABLE[letter] != meaning}
  assert not wrong, f"the table has {[f'{letter} {TABLE[letter]}' for letter in wrong]}"
  assert all(printed[letter].startswith("= ") for letter in OWN & {*printed}), (
    "X, Y and Z are defined, as in `X = N x H`"
  )
  assert not letters(path) - {*printed}, "letters that the legend at the head of the file lacks"
