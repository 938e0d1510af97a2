"""What happens when a file that a command writes whole cannot be written: every file in turn, with one and with two
processes."""

import json
import pathlib
import sys

import pytest
from started import EXPERIMENTS, started, train

FULL = """
import errno, json, os, pathlib
failing, log = os.environ["FAILING"], pathlib.Path(os.environ["LOG"])
replace = pathlib.Path.replace
def full(part, target):
  if target.name == failing:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
  with log.open("a") as file:
    file.write(target.name + "\\n")
  return replace(part, target)
pathlib.Path.replace = full
from moejax.__main__ import command
command()
"""


def run(count: int, words: list[str], folder: pathlib.Path, failing: str = "") -> tuple[int, list[str]]:
  """Exit code, which must be that of all processes, and outputs. The file `failing` cannot be written."""
  variables = {"FAILING": failing, "LOG": str(folder / "written")}
  with started(count, 2 // count, [sys.executable, "-c", FULL, *words], folder, **variables) as all_of_them:
    codes = [process.wait(300) for process in all_of_them]
    outputs = [process.output for process in all_of_them]
  text = "\n".join(outputs)
  assert len(set(codes)) == 1, text
  assert "Traceback" not in text, text
  return codes[0], outputs


def commands(text: pathlib.Path, verb: str, directory: pathlib.Path) -> list[str]:
  """The words of a tiny `moejax train`, which evaluates twice, or of a tiny `moejax compare`."""
  often = ("--evaluation.every", "2", "--training.steps", "4")
  if verb == "train":
    return train(text, directory, "dense", *often)[3:]
  data = ("--data.train", str(text / "train.txt"), "--data.validation", str(text / "validation.txt"))
  return ["compare", f"{EXPERIMENTS}:suite", "--workdir", str(directory), *data, *often]


def summaries(directory: pathlib.Path) -> dict[str, float]:
  """Held-out bits per byte of the runs in a directory, and the checksums of their parameters."""
  found = {}
  for path in sorted(directory.rglob("summary.json")):
    if "held_out/bits_per_byte" in (summary := json.loads(path.read_text())):
      progress = path.parent / "checkpoints" / str(summary["steps"]) / "progress" / "metadata"
      found[path.parent.name] = json.loads(progress.read_text())["arrays"], summary["held_out/bits_per_byte"]
  return found


@pytest.mark.slow
def test_two_processes_train_on_if_an_evaluation_cannot_be_written_and_end_if_it_is_the_last(text, tmp_path):
  words = commands(text, "train", tmp_path / "run")
  code, (first, second) = run(2, words, tmp_path, "held_out.npz")
  assert "warning: step 2 could not be evaluated: No space left on device" in first, first
  assert "could not be evaluated" not in second and " train dense 4/4" in first
  assert code == 2 and first.splitlines()[-1].startswith("moejax: No space left on device"), first
  assert second.splitlines()[-1].startswith("moejax: process 0 (host "), second
  assert run(2, words, tmp_path)[0] == 0 and (tmp_path / "run" / "held_out.npz").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_whichever_file_cannot_be_written_the_command_tells_and_ends_or_goes_on_and_can_be_repeated(
  text, tmp_path, verb, count
):
  clean = tmp_path / "clean"
  assert run(count, commands(text, verb, clean), tmp_path)[0] == 0
  written = sorted({*(tmp_path / "written").read_text().split()})
  figures = {path.suffix: path.name for path in map(pathlib.Path, written) if path.suffix in (".png", ".svg")}
  names = [name for name in written if pathlib.Path(name).suffix not in figures] + [*figures.values()]  # one of each
  assert {"held_out.npz", "summary.json", "experiment.json", "metrics.jsonl"} <= {*names}
  for name in names:
    directory = tmp_path / f"without-{name}"
    code, outputs = run(count, commands(text, verb, directory), tmp_path, name)
    # A cache of verified files, and comparison.json before the end, can be missing.
    assert code == (0 if name == "verified.json" else 2), (name, outputs[0])
    assert code == 0 or f"moejax: No space left on device ({directory}" in outputs[0], (name, outputs[0])
    assert run(count, commands(text, verb, directory), tmp_path)[0] == 0, name
    if verb == "train":
      assert [*summaries(directory).values()] == [*summaries(clean).values()], name
    assert {*summaries(directory)} == ({directory.name} if verb == "train" else {"dense", "sparse"})
    assert not [path for path in directory.rglob(".*") if path.name.endswith(name)], name
