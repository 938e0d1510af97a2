"""The commands as a user meets them: what they print, what they refuse, and that refusing is quick."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

import moejax
from moejax import cli
from moejax.command_line import COMMANDS
from moejax.config.chips import CHIPS
from moejax.config.parameters import full_sequence_steps
from moejax.config.sharding import LOGICAL_AXES
from moejax.experiments import EXPERIMENTS
from moejax.lookup import find_experiment, find_suite
from moejax.training.run_directory import claim, claim_comparison

MINE = pathlib.Path(__file__).parent / "conftest.py"
NAMES = {"dense": f"{MINE}:dense", "sparse": f"{MINE}:sparse", "suite": f"{MINE}:suite"}

RUN = ["--workdir", "{tmp}/run"]
MESH = "mesh (replica 1 x data {data} x expert {expert} x model {model})"

# Arguments, and parts of the one line that answers them. {tmp} is an empty folder but for empty.txt and text.txt.
MISTAKES = {
  "no command": ([], ["arguments are required: COMMAND", "`moejax --help`"]),
  "unknown command": (["trian"], ["invalid choice: 'trian'", "'train'"]),
  "unknown experiment": (["train", "quikstart", *RUN], ["no experiment is named 'quikstart'", "quickstart"]),
  "unknown function": (["train", f"{MINE}:dence", *RUN], ["has no function 'dence'", "it has dense"]),
  "file that is not there": (["show", "{tmp}/mine.py:dense"], ["{tmp}/mine.py does not exist"]),
  "unknown field": (
    ["train", "{dense}", *RUN, "--model.num-layer", "4"],
    ["'dense' has no field 'model.num_layer'", "did you mean --model.num-layers"],
  ),
  "wrong type": (
    ["train", "{dense}", *RUN, "--model.num-layers", "four"], ["model.num_layers='four' is not an integer; give one"],
  ),
  "value missing": (["train", "{dense}", *RUN, "--model.num-layers"], ["--model.num-layers needs a value: an integer"]),
  "not a choice": (["train", "{dense}", *RUN, "--model.remat", "all"], ["'all'", "attention, layer_inputs"]),
  "value out of range": (["train", "{dense}", *RUN, "--training.steps", "0"], ["training.steps=0 must be above 0"]),
  "batch and mesh": (
    ["train", "{dense}", *RUN, "--mesh.data", "3"],
    ["batch=8 is not divisible by the 3 shards", MESH.format(data=3, expert=1, model=1), "change one of them"],
  ),
  "heads and mesh": (
    ["train", "{dense}", *RUN, "--mesh.model", "3"],
    ["heads=4 is not divisible by the 3 shards", MESH.format(data="?", expert=1, model=3), "through model"],
  ),
  "experts and mesh": (
    ["train", "{sparse}", *RUN, "--mesh.expert", "8"],
    ["experts=4 is not divisible by the 8 shards", MESH.format(data="?", expert=8, model=1), "through expert"],
  ),
  "experts per token": (
    ["train", "{sparse}", *RUN, "--model.moe.experts-per-token", "5"],
    ["moe.experts_per_token=5 is more than moe.num_experts=4", "use at most 4"],
  ),
  "plan without a topology": (["plan", "{dense}"], ["plan needs --topology NAME"]),
  "plan on an unknown topology": (
    ["plan", "{dense}", "--topology", "v9:4x4"], ["unknown topology 'v9:4x4'", "v5p:4x8x8", "cpu:8"],
  ),
  "match of two dense models": (
    ["match", "{dense}", "{dense}", "--topology", "cpu:8"],
    ["candidate 'dense' for 'dense' has no sparse layer", "set model.moe"],
  ),
  "expert field of a dense model": (
    ["train", "{dense}", *RUN, "--model.moe.num-experts", "4"],
    ["'dense' has no field 'model.moe.num_experts'", "no sparse layers", "use an MoE experiment"],
  ),
  "coefficient without a sparse layer": (
    ["train", "{dense}", *RUN, "--training.losses.load-balance", "0.1"],
    ["training.losses.load_balance=0.1", "no layer is sparse", "set it to 0"],
  ),
  "rule for no axis": (
    ["train", "{dense}", *RUN, "--rules.nonsense", "data"],
    ["'dense' has no field 'rules.nonsense'", "did you mean"],
  ),
  "rule with no mesh axis": (
    ["train", "{dense}", *RUN, "--rules.embed", "fsdp"],
    ["'embed' names an unknown mesh axis 'fsdp'", "replica, data, expert, context, model"],
  ),
  "rule that claims an axis twice": (
    ["train", "{dense}", *RUN, "--rules.heads", "data"],
    ["rules map both 'embed' and 'heads' to mesh axis 'data'"],
  ),
  "no text": (["train", "{dense}", *RUN, "--data.train"], ["data.train is empty", "python-standard-library"]),
  "empty text": (["train", "{dense}", *RUN, "--data.train", "{tmp}/empty.txt"], ["data.train", "'{tmp}/empty.txt'"]),
  "missing text": (
    ["train", "{dense}", *RUN, "--data.train", "{tmp}/gone.txt"],
    ["data.train: '{tmp}/gone.txt' does not exist"],
  ),
  "missing validation text of a suite": (
    ["compare", "{suite}", *RUN, "--data.validation", "{tmp}/gone.txt"],
    ["data.validation: '{tmp}/gone.txt' does not exist"],
  ),
  "no name": (["train", *RUN], ["train needs NAME", "`moejax train --help`"]),
  "no suite": (["compare", *RUN], ["compare needs SUITE", "`moejax compare --help`"]),
  "no work directory": (["train", "{dense}"], ["train needs --workdir DIR", "`moejax train --help`"]),
  "no work directory to compare in": (["compare", "{suite}"], ["compare needs --workdir DIR"]),
  "work directory without a value": (["train", "{dense}", "--workdir"], ["--workdir: expected one argument"]),
  "empty work directory": (["train", "{dense}", "--workdir", ""], ["argument --workdir: the path is empty"]),
  "tries of no search": (
    ["plan", "{dense}", "--topology", "cpu:8", "--tries", "3"], ["--tries has no effect without --search"],
  ),
  "split of all documents": (
    ["data", "pack", "--source", "{tmp}/text.txt", "--out", "{tmp}/a", "--validation-fraction", "0.1"],
    ["--validation-fraction has no effect with --keep all", "--keep train"],
  ),
  "suite to train": (["train", "{suite}", *RUN], ["is a suite", "moejax compare", "dense, sparse, wide"]),
  "experiment to compare": (["compare", "{dense}", *RUN], ["is a single experiment", "moejax train", "quickstart"]),
  "word without an option": (["show", "{dense}", "and"], ["unexpected argument 'and'", "--model.num-layers 4"]),
  "field of the list": (["list", "--model.num-layers", "4"], ["unexpected --model.num-layers 4", "no fields"]),
  "tokenizer of no kind": (["train", "{dense}", *RUN, "--data.tokenizer", "gpt2"], ["data.tokenizer='gpt2'", ".json"]),
  "tokenizer that is not there": (
    ["train", "{dense}", *RUN, "--data.tokenizer", "{tmp}/gone.model"],
    ["data.tokenizer='{tmp}/gone.model' cannot be read"],
  ),
  "weights for other sources": (
    ["train", "{dense}", *RUN, "--data.weights", "0.5", "0.5"],
    ["data.weights has 2 numbers for the 1 entries of data.train"],
  ),
  "nothing to do with data": (["data"], ["data needs pack", "`moejax data --help`"]),
  "no text to pack": (["data", "pack", "--out", "{tmp}/packed"], ["data needs --source SOURCE"]),
  "missing text to pack": (
    ["data", "pack", "--source", "{tmp}/gone.txt", "--out", "{tmp}/packed"],
    ["'{tmp}/gone.txt' does not exist"],
  ),
  "nowhere to pack to": (["data", "pack", "--source", "{tmp}/text.txt"], ["data needs --out DIR"]),
  "no text to train a tokenizer on": (["tokenizer", "train", "--out", "{tmp}/a.json"], ["tokenizer needs --source"]),
  "tokenizer of another suffix": (
    ["tokenizer", "train", "--source", "{tmp}/text.txt", "--out", "{tmp}/a.model"],
    ["{tmp}/a.model does not end in .json"],
  ),
  "report of nothing": (["report", "{tmp}"], ["{tmp}/comparison.json does not exist", "moejax compare"]),
  "evaluation of nothing": (["evaluate", "{tmp}"], ["{tmp}/experiment.json does not exist", "moejax train"]),
  "no run to evaluate": (["evaluate"], ["evaluate needs RUN"]),
  "limit that is no number": (["evaluate", "{tmp}", "--limit", "many"], ["--limit: invalid int value: 'many'"]),
  "no directory to report": (["report"], ["report needs DIR"]),
  "work directory is a file": (
    ["train", "{dense}", "--workdir", "{tmp}/text.txt"],
    ["cannot write to {tmp}/text.txt: it is a file", "choose another --workdir"],
  ),
  "work directory below a file": (
    ["compare", "{suite}", "--workdir", "{tmp}/text.txt/run"],
    ["cannot write to {tmp}/text.txt/run: Not a directory", "choose another --workdir"],
  ),
}  # fmt: skip


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
  """What stands in braces in arguments and answers."""
  (tmp_path / "empty.txt").touch()
  (tmp_path / "text.txt").write_text("In the beginning there was a text.\n" * 100)
  return {**NAMES, "tmp": str(tmp_path)}


@pytest.fixture
def run(capsys, places):
  """Calls moejax in this process; returns exit code, stdout and stderr."""

  def call(*arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
      cli.main([argument.format(**places) for argument in arguments])
    assert isinstance(stop.value.code, int)
    out, err = capsys.readouterr()
    return stop.value.code, out, err

  return call


def refused(answer: tuple[int, str, str]) -> str:
  """The one line on stderr of a command that was refused."""
  code, out, err = answer
  assert (code, out) == (2, "")
  assert err.startswith("moejax: ") and err.endswith("\n") and err.count("\n") == 1, err
  return err


def entries(folder: pathlib.Path) -> dict[str, bytes | None]:
  return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2_and_nothing_is_written(run, places, tmp_path, arguments, said):
  before = entries(tmp_path)
  line = refused(run(*arguments))
  assert [part for part in said if part.format(**places) not in line] == [], line
  assert entries(tmp_path) == before


SILENT = """
import contextlib, io, json, sys
from moejax import cli
for name, arguments in json.load(sys.stdin).items():
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
      cli.main(arguments)
    except SystemExit:
      pass
  slow = {"jax", "flax", "optax", "orbax", "grain"} & {*sys.modules}
  assert not slow, f"{name} imports {slow}"
"""


def test_lists_pages_helps_and_mistakes_need_no_jax(places):
  commands = {
    "list": ["list"],
    "show": ["show", "{sparse}"],
    "show as JSON": ["show", "{suite}", "--json"],
    "help": ["--help"],
    "help of a command": ["train", "--help"],
    "help with fields": ["train", "{sparse}", "--help"],
    **{name: arguments for name, (arguments, _) in MISTAKES.items()},
  }
  filled = {name: [argument.format(**places) for argument in given] for name, given in commands.items()}
  done = subprocess.run([sys.executable, "-c", SILENT], input=json.dumps(filled), capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")


def test_a_directory_that_holds_another_run_is_refused_and_left_as_it_is(run, places, tmp_path, tiny_dense):
  claim(tmp_path / "run", tiny_dense, 700)  # how many the budget takes only the text tells
  before = entries(tmp_path)
  line = refused(run("train", "{dense}", *RUN, "--optimizer.learning-rate", "0.5"))
  assert "run holds another configuration: optimizer.learning_rate is 0.001 there and 0.5 here; choose another" in line
  assert entries(tmp_path) == before


def test_a_directory_that_holds_another_comparison_is_refused_and_left_as_it_is(run, places, tmp_path, tiny_suite):
  claim_comparison(tmp_path / "run", tiny_suite)
  before = entries(tmp_path)
  line = refused(run("compare", "{suite}", *RUN, "--tolerance", "0.5"))
  assert "run holds another configuration: tolerance is 0.05 there and 0.5 here; choose another --workdir" in line
  assert "run holds a comparison; choose another --workdir" in refused(run("train", "{dense}", *RUN))
  assert entries(tmp_path) == before


def test_a_full_disk_is_refused(run, tmp_path, monkeypatch):
  def full(path: pathlib.Path, content: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  for command, name in (("train", "{dense}"), ("compare", "{suite}")):
    line = refused(run(command, name, *RUN))
    assert line == f"moejax: cannot write to {tmp_path}/run: No space left on device; choose another --workdir\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(run, tmp_path):
  (tmp_path / "run").mkdir(mode=0o500)
  assert "run: Permission denied; choose another --workdir" in refused(run("train", "{dense}", *RUN))


def test_more_devices_than_there_are_is_refused_before_anything_compiles(run, monkeypatch):
  import moejax.training.prepare

  monkeypatch.setattr(moejax.training.prepare, "make_train_step", lambda spec: pytest.fail("it compiles"))
  text = ["--data.train", "{tmp}/text.txt", "--data.validation", f"{MINE}"]
  sizes = ["--training.batch-size", "16", "--evaluation.batch-size", "16"]
  code, out, err = run("train", "{dense}", *RUN, *text, *sizes, "--mesh.data", "16")
  assert (code, out) == (2, "")
  assert err.splitlines()[-1] == (
    "moejax: mesh replica 1 x data 16 x expert 1 x model 1 needs 16 devices, but there are 8; lower an axis"
  )


def test_tasks_without_the_harness_are_refused_with_what_to_install(run, monkeypatch, tmp_path, tiny_dense):
  import moejax.evaluation

  claim(tmp_path / "done", tiny_dense, 2)
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  monkeypatch.delitem(sys.modules, "moejax.evaluation.harness", raising=False)
  monkeypatch.delattr(moejax.evaluation, "harness", raising=False)
  text = ["--data.train", "{tmp}/text.txt", "--evaluation.tasks", "core_en"]
  for words in (["evaluate", "{tmp}/done"], ["train", "{dense}", *RUN, *text], ["compare", "{suite}", *RUN, *text]):
    assert refused(run(*words)) == "moejax: lm_eval is not installed; run `pip install moejax[eval]`\n"


def test_a_trained_model_is_evaluated_as_it_is(run, tmp_path, tiny_dense):
  claim(tmp_path / "done", tiny_dense, 2)
  line = refused(run("evaluate", "{tmp}/done", "--model.d-ff", "48", "--mesh.data", "2"))
  assert "model.d_ff is 24 there and 48 here; those that can are model.logit_chunks" in line
  assert "evaluation.task_limit=0 must be above 0" in refused(run("evaluate", "{tmp}/done", "--limit", "0"))


def test_the_version(run):
  assert run("--version") == (0, f"moejax {moejax.__version__}\n", "")


def test_help_names_every_command_and_gives_examples(run):
  code, out, err = run("--help")
  assert (code, err) == (0, "")
  for command in COMMANDS:
    assert command in [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "]
  examples = [line.split() for line in out.splitlines() if line.startswith("  moejax ")]
  assert {words[1] for words in examples} >= {"compare", "show", "train"}
  assert "dotted path" in out and "resumes from the latest checkpoint" in out


def test_the_examples_of_the_help_are_valid(run):
  """Every example names something that exists and fields that it has."""
  _, out, _ = run("--help")
  for line in out.splitlines():
    if line.startswith("  moejax ") and not any(word in line for word in (".py:", ".json", "evaluate", "generate")):
      words = line.partition("    ")[0].split()[1:]
      places = {"--workdir", "--topology"}
      without_directory = [word for i, word in enumerate(words) if not places & {*words[max(0, i - 1) : i + 1]}]
      assert run("show", *without_directory[1:])[0] == 0, line


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_says_what_it_does_and_takes(run, command):
  code, out, err = run(command, "--help")
  assert (code, err) == (0, "")
  assert out.startswith(f"usage: moejax {command} [-h]")
  if command in ("show", "train", "compare"):
    assert "To list all fields of an experiment, add its NAME" in out and "`moejax list`" in out


@pytest.mark.parametrize("command", ["show", "train"])
def test_the_help_with_a_name_has_every_dotted_field(run, command):
  code, out, err = run(command, "{sparse}", "--help")
  assert (code, err) == (0, "")
  _, page, _ = run("show", "{sparse}")
  fields = {line.split()[0] for line in page.splitlines() if line.startswith("--")}
  assert len(fields) > 50 and {f"--rules.{name.replace('_', '-')}" for name in LOGICAL_AXES} <= fields
  assert fields <= set(out.split())


def test_the_help_of_an_unknown_name_is_a_mistake(run):
  code, _, err = run("train", "quikstart", "--help")
  assert code == 2 and "no experiment is named 'quikstart'" in err


def test_the_list_has_every_experiment_and_every_member(run):
  code, out, err = run("list")
  assert (code, err) == (0, "")
  shown = {line.split()[0] for line in out.splitlines() if line.strip()}
  assert {*EXPERIMENTS, *(member.name for member in find_suite("quickstart").members)} <= shown


@pytest.mark.parametrize("name", [*EXPERIMENTS, *NAMES.values()])
def test_everything_that_has_a_name_can_be_shown(run, name):
  code, out, err = run("show", name)
  assert (code, err) == (0, "") and out.startswith(name.rpartition(":")[2])


def test_show_takes_fields_and_gives_the_numbers_that_scripts_rely_on(run):
  code, out, err = run("show", "{sparse}", "--json", "--training.batch-size", "16")
  assert (code, err) == (0, "")
  numbers = json.loads(out)
  contract = {
    "parameters_total": 8592,
    "parameters_active": 7824,
    "parameters_embedding": 4224,
    "model_flops_per_token": 58_752,
    "tokens_per_step": 512,
  }
  assert {name: numbers[name] for name in contract} == contract
  assert numbers["config"]["model"]["moe"]["num_experts"] == 4
  assert numbers["config"]["training"]["batch_size"] == 16


def test_show_gives_the_numbers_of_every_member_of_a_suite(run):
  code, out, _ = run("show", "{suite}", "--json")
  members = json.loads(out)["members"]
  assert code == 0 and [member["name"] for member in members] == ["dense", "sparse", "wide"]
  assert [member["parameters_total"] for member in members] == [8144, 8592, 10_128]


@pytest.fixture
def train_instead(monkeypatch):
  """Puts a function in the place of training."""
  import moejax.training.run

  def replace(function):
    monkeypatch.setattr(moejax.training.run, "train_experiment", function)

  return replace


def test_train_hands_on_the_experiment_with_its_fields_and_the_directory_and_prints_the_result(
  run, train_instead, tmp_path
):
  seen = []

  def train(experiment, text, directory, make_evaluators, display, profile):
    seen.append((experiment.name, experiment.training.steps, directory, profile))
    return {"name": "[brackets]", "held_out/bits_per_byte": 2.3456789, "tokens": 1234567, "provenance": {"git": "abc"}}

  train_instead(train)
  code, out, err = run("train", "{dense}", "--training.steps", "5", *RUN)
  assert (code, err) == (0, "") and seen == [("dense", 5, tmp_path / "run", None)]
  assert "[brackets]" in out and "2.3457" in out and "1,234,567" in out and "abc" not in out


@pytest.mark.parametrize(
  ("error", "expected", "line"),
  [
    (FloatingPointError("loss is nan at step 3"), 1, "moejax: loss is nan at step 3"),
    (KeyboardInterrupt(), 130, "moejax: stopped by SIGINT"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "moejax: No space left on device; free some space"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 2, "moejax: out of memory: RESOURCE_EX"),
  ],
  ids=["not finite", "interrupted", "full disk", "out of memory"],
)
def test_what_stops_a_run_is_one_line_with_its_exit_code(run, train_instead, error, expected, line):
  def train(experiment, text, directory, make_evaluators, display, profile):
    raise error

  train_instead(train)
  code, out, err = run("train", "{dense}", *RUN)
  assert (code, out) == (expected, "") and err.strip().startswith(line) and err.strip().count("\n") == 0


def test_a_bug_of_ours_keeps_its_traceback(places, train_instead):
  def train(experiment, text, directory, make_evaluators, display, profile):
    raise ValueError("shapes do not match")

  train_instead(train)
  with pytest.raises(ValueError, match="shapes do not match"):
    cli.main(["train", places["dense"], "--workdir", f"{places['tmp']}/run"])


def test_a_reader_that_goes_away_leaves_no_traceback():
  command = [sys.executable, "-m", "moejax", "show", NAMES["suite"], "--help"]
  writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert writer.stdout and writer.stderr
  writer.stdout.close()
  assert writer.stderr.read() == b""
  assert writer.wait() == 1


def test_a_tokenizer_is_trained_text_is_packed_with_it_and_an_experiment_trains_on_that(run, tmp_path, monkeypatch):
  pytest.importorskip("tokenizers", reason="of the extra `data`")
  monkeypatch.chdir(tmp_path)
  sources = ["{tmp}/text.txt", str(MINE)]
  code, out, _ = run("tokenizer", "train", "--source", *sources, "--vocab-size", "263", "--out", "a.json")
  assert (code, out) == (0, "a.json: 263 tokens; use --data.tokenizer a.json --model.vocab-size 384\n")
  for source, packed in zip(sources, ("train", "validation"), strict=True):
    pack = ("data", "pack", "--source", source, "--tokenizer", "a.json", "--out", packed, "--processes", "1")
    code, out, _ = run(*pack)
    assert code == 0 and out.startswith(f"{packed}: 1 documents, "), out
    assert out.endswith("in 1 shards; use --model.vocab-size 384\n")
    assert run(*pack)[:2] == (0, out)
  data = ["--data.train", "train", "text.txt", "--data.weights", "3", "1", "--data.validation", "validation"]
  data += ["--data.tokenizer", "a.json", "--data.packing", "best_fit"]
  code, _, err = run("train", "{dense}", "--workdir", "run", *data, "--training.steps", "2", "--mesh.data", "1")
  assert code == 0, err
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [0.5 < record["fill_rate"] <= 1.0 for record in records if "loss" in record] == [True, True]
  assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out/documents"] == 1


def test_plan_prints_and_writes_and_says_by_its_exit_code_whether_it_fits(run, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  files = ["--json", f"{tmp_path}/plan.json", "--html", f"{tmp_path}/plan.html"]
  code, out, _ = run("plan", "{sparse}", "--topology", "cpu:8", "--mesh.expert", "4", *files)
  assert code == 0 and "fits" in out and "exposed collectives" in out
  written = json.loads((tmp_path / "plan.json").read_text())
  assert written["mesh"] == {"replica": 1, "data": 2, "expert": 4, "context": 1, "model": 1} and written["fits"]
  assert "most expensive operations" in (tmp_path / "plan.html").read_text()
  small = dataclasses.replace(CHIPS["cpu"], hbm_bytes=1000)
  monkeypatch.setitem(CHIPS, "cpu", small)
  code, out, _ = run("plan", "{sparse}", "--topology", "cpu:8", "--mesh.expert", "4")
  assert code == 3 and "does not fit" in out and "try: " in out


@pytest.mark.slow
def test_match_finds_the_width_that_takes_the_dense_step_time_and_writes_what_train_runs(run, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  path = tmp_path / "matched.py"
  fields = ["--matchable", "model.num_layers", "--tolerance", "0.2", "--dense.model.remat", "layer_inputs"]
  code, out, _ = run("match", "{dense}", "{sparse}", "--topology", "cpu:8", *fields, "--out", str(path))
  assert code == 0 and "times the step time of dense" in out
  found = find_experiment(f"{path}:matched")
  assert found.model.moe and found.matchable == ("model.num_layers",)
  # The same time at a step time within a fifth, of a dense model of another size: its steps, not a budget of its own.
  assert full_sequence_steps(found) == pytest.approx(full_sequence_steps(find_experiment(NAMES["dense"])), rel=0.25)


def test_train_trains_evaluates_and_leaves_its_files(places, tmp_path):
  """The whole way from the command line: two steps in a process of its own, which starts itself again."""
  text = ["--data.train", f"{tmp_path}/text.txt", "--data.validation", str(MINE)]
  fields = ["--training.steps", "2", "--training.log-every", "1", "--mesh.data", "1"]
  command = ["train", places["dense"], "--workdir", str(tmp_path / "run"), *text, *fields]
  done = subprocess.run([sys.executable, "-m", "moejax", *command], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "held_out/bits_per_byte" in done.stdout
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [record["step"] for record in records if "loss" in record] == [1, 2]
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert (summary["name"], summary["steps"], summary["tokens"]) == ("dense", 2, 512)
