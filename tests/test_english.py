"""Messages, help and documentation use the standard terms of the field."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]

UNUSUAL = (
  r"\bone's own\b", r"\bof your own\b", r"\bgoes on\b", r"\b(is|are) told\b", r"\bdearest\b", r"\bdoes nothing\b",
  r"\bmisspelt\b", r"\bis no (list|object|number|image|directory|file)\b", r"--help` explains", r"\bsays why\b",
)  # fmt: skip
"""Phrases for which the documentation of JAX and PyTorch uses others."""


def shown_to_users(source: str) -> list[tuple[int, str]]:
  """Line and text of every string of a module that is not a docstring."""
  tree = ast.parse(source)
  docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
  return [(node.lineno, node.value) for node in strings if id(node) not in docstrings]


def test_messages_help_and_docs_have_no_unusual_phrases():
  texts = [
    (path, line, text)
    for folder in ("moejax", "experiments", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for line, text in shown_to_users(path.read_text())
  ]
  pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "launch" / "README.md"]
  texts += [(path, n, line) for path in pages for n, line in enumerate(path.read_text().splitlines(), 1)]
  found = [
    f"{path.relative_to(ROOT)}:{line}: {match[0]}"
    for path, line, text in texts
    for match in re.finditer("|".join(UNUSUAL), text)
  ]
  assert not found, "write what the documentation of JAX or PyTorch would say:\n" + "\n".join(found)
