"""`moejax generate` on a small run: a stream, several prompts, a batch file, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "training"))
from training_fixtures import spec_of, tiny

import moejax
from moejax import cli
from moejax.config import Mesh
from moejax.training.checkpoint import Checkpointer
from moejax.training.run_directory import claim


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run with a checkpoint, of parameters as they are drawn."""
  directory = tmp_path_factory.mktemp("run")
  experiment = tiny(True, mesh=Mesh(data=1))
  state = spec_of(experiment).init_state(5)
  claim(directory, experiment, 6)
  checkpointer = Checkpointer(directory / "checkpoints", experiment.training.checkpoints)
  checkpointer.save(state, 3, {"data": {}, "train_time_s": 1.0})
  checkpointer.close()
  return directory


@pytest.fixture
def run(capsys, trained):
  """Calls moejax generate in this process; returns exit code, stdout and stderr."""

  def call(*arguments):
    with pytest.raises(SystemExit) as stop:
      cli.main(["generate", str(trained), *map(str, arguments)])
    return stop.value.code, *capsys.readouterr()

  return call


@pytest.mark.slow
def test_a_stream_a_list_and_a_file_have_the_continuations_of_the_python_function(run, trained, tmp_path):
  prompts = ["def ", "a longer prompt"]
  expected = moejax.generate(trained, prompts, max_tokens=6)
  assert run("--prompt", prompts[0], "--max-tokens", 6) == (0, f"{expected[0]}\n", "")
  assert run("--prompt", *prompts, "--max-tokens", 6) == (0, f"{expected[0]}\n{expected[1]}\n", "")
  file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  file.write_text("".join(json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(prompts)))
  assert run("--batch-file", file, "--max-tokens", 6, "--out", out, "--mesh.data", 2) == (0, "", "")
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(line["id"], line["prompt"], line["text"]) for line in lines] == [
    (i, prompt, text) for i, (prompt, text) in enumerate(zip(prompts, expected, strict=True))
  ]
  assert run("--batch-file", file, "--max-tokens", 6)[1] == out.read_text()


@pytest.mark.slow
def test_a_stop_string_ends_a_continuation_and_a_prompt_that_does_not_fit_is_told(run, trained, tmp_path):
  (text,) = moejax.generate(trained, ["def "], max_tokens=6)
  (cut,) = moejax.generate(trained, ["def "], max_tokens=6, stop=[text[-1]])
  assert cut == text[: text.index(text[-1])]
  assert run("--prompt", "def ", "--max-tokens", 6, "--stop", text[-1]) == (0, f"{cut}\n", "")
  code, _, err = run("--prompt", "def " * 100, "--max-tokens", 2)
  assert code == 0 and "the prompt was truncated from the left" in err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "generate needs either --prompt TEXT or --batch-file FILE"),
    (["--prompt", "a", "--batch-file", "b"], "generate needs either --prompt"),
    (["--prompt", "a", "--out", "b"], "--out requires --batch-file"),
    (["--prompt", "a", "--max-tokens", "1000"], "max_tokens=1000 must lie between 1 and "),
    (["--prompt", "a", "--top-k", "4"], "top_k=4 has no effect with temperature=0"),
    (["--prompt", "a", "--min-p", "2", "--temperature", "1"], "min_p=2.0 must be 0 or above and at most 1"),
    (["--prompt", "a", "--model.d-ff", "8"], "these fields of a trained run cannot change: model.d_ff"),
    (["--batch-file", "missing.jsonl"], "--batch-file missing.jsonl cannot be read"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_with_the_value(run, arguments, message):
  code, out, err = run(*arguments)
  assert (code, out) == (2, "") and message in err and err.count("\n") == 1
