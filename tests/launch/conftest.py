"""A little text for the processes of these tests."""

import pathlib
import random

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with train.txt and validation.txt."""
  folder = tmp_path_factory.mktemp("text")
  letters, words = random.Random(0), ["alpha", "beta", "gamma", "delta", "dense", "router", "expert"]
  for name, documents in (("train", 30), ("validation", 2)):
    paragraphs = (" ".join(letters.choice(words) for _ in range(40)) for _ in range(documents))
    (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
  return folder
