"""A little text for the processes of these tests, and a run of two of them."""

import pathlib
import random

import pytest
from started import started, train


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with train.txt and validation.txt."""
  folder = tmp_path_factory.mktemp("text")
  letters, words = random.Random(0), ["alpha", "beta", "gamma", "delta", "dense", "router", "expert"]
  for name, documents in (("train", 30), ("validation", 2)):
    paragraphs = (" ".join(letters.choice(words) for _ in range(40)) for _ in range(documents))
    (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
  return folder


@pytest.fixture(scope="session")
def run_of_two(
  text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[str], list[str]]:
  """The directory of a run that two processes of two devices trained, which nobody changes, their command and what
  they printed."""
  folder = tmp_path_factory.mktemp("two")
  command = train(text, folder / "run", "sparse", "--data.sequence-length", "64")
  with started(2, 2, command, folder) as both:
    assert [process.wait(400) for process in both] == [0, 0], both[0].output + both[1].output
    return folder / "run", command, [process.output for process in both]
