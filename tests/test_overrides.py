"""Fields from the command line."""

import dataclasses
import re
from dataclasses import replace

import numpy as np
import pytest

from moejax.config import DATA_EXPERT_MODEL, Cosine, DenseRouter, Linear, Muon, TopPRouter
from moejax.config.sharding import LOGICAL_AXES
from moejax.errors import UserError
from moejax.field_hints import ALIASES, OF_A_COMMAND
from moejax.overrides import override, override_pair, print_field_help


def at(value, path: str):
  """The field at a dotted path."""
  for name in path.split("."):
    value = value[int(name)] if name.isdigit() else getattr(value, name)
  return value


@pytest.mark.parametrize(
  ("arguments", "path", "value"),
  [
    (["--model.num-layers", "4"], "model.num_layers", 4),
    (["--model.num_layers", "4"], "model.num_layers", 4),
    (["--model.num-layers=4"], "model.num_layers", 4),
    (["--optimizer.learning-rate", "3e-4"], "optimizer.learning_rate", 3e-4),
    (["--model.tie-embeddings", "False"], "model.tie_embeddings", False),
    (["--training.steps", "200"], "training.steps", 200),
    (["--evaluation.max-tokens", "None"], "evaluation.max_tokens", None),
    (["--model.remat", "dots"], "model.remat", "dots"),
    (["--model.moe.capacity-factor", "1.5"], "model.moe.capacity_factor", 1.5),
    (["--data.train", "a.txt", "b"], "data.train", ("a.txt", "b")),
    (["--data.train", "-"], "data.train", ("-",)),
    (["--data.validation"], "data.validation", ()),
    (["--data.packing", "best_fit"], "data.packing", "best_fit"),
    (["--data.tokenizer", "a.model"], "data.tokenizer", "a.model"),
    (["--mesh.data", "2"], "mesh.data", 2),
    (["--name", "mine"], "name", "mine"),
    (["--training.losses.z", "0.1"], "training.losses.z", 0.1),
    (["--training.budget.parameters", "active"], "training.budget.parameters", "active"),
    (["--model.num-layers", "4", "--model.num-layers", "6"], "model.num_layers", 6),
    (["--training.steps", "1e3"], "training.steps", 1000),
    (["--training.steps", "2.5E3"], "training.steps", 2500),
    (["--training.steps", "1_000"], "training.steps", 1000),
    (["--training.steps=1000.0"], "training.steps", 1000),
    (["--model.qk-norm", "true"], "model.qk_norm", True),
    (["--model.qk-norm", "TRUE"], "model.qk_norm", True),
    (["--model.qk-norm", "1"], "model.qk_norm", True),
    (["--model.tie-embeddings", "false"], "model.tie_embeddings", False),
    (["--model.tie-embeddings", "0"], "model.tie_embeddings", False),
    (["--model.tie-embeddings", "no"], "model.tie_embeddings", False),
    (["--evaluation.max-tokens", "none"], "evaluation.max_tokens", None),
    (["--evaluation.max-tokens", "null"], "evaluation.max_tokens", None),
    (["--evaluation.max-tokens", "1e6"], "evaluation.max_tokens", 1_000_000),
    (["--evaluation.task-data", "none"], "evaluation.task_data", "none"),
    (["--evaluation.task-data", "None"], "evaluation.task_data", None),
    (["--model.logit-cap", "30"], "model.logit_cap", 30.0),
    (["--data.weights", "2"], "data.weights", (2.0,)),
    (["--optimizer.weight-decay", "0"], "optimizer.weight_decay", 0.0),
  ],
)
def test_a_field_is_set_by_its_path_and_typed_and_nothing_else_changes(tiny_moe, arguments, path, value):
  changed = override(tiny_moe, arguments)
  assert at(changed, path) == value and type(at(changed, path)) is type(value)
  *parents, name = path.split(".")
  for depth in range(len(parents), -1, -1):
    owner = at(tiny_moe, ".".join(parents[:depth])) if depth else tiny_moe
    value = replace(owner, **{(*parents, name)[depth]: value})
  assert changed == value


def test_without_arguments_it_is_the_same(tiny_moe, tiny_suite):
  assert override(tiny_moe, []) == tiny_moe
  assert override(tiny_suite, []) == tiny_suite


def test_fields_that_are_only_together_valid_are_set_together(tiny_moe):
  fields = [
    "--model.moe.num-experts",
    "1",
    "--model.moe.experts-per-token",
    "1",
    "--model.moe.router.renormalize",
    "False",
  ]
  changed = override(tiny_moe, fields)
  assert changed.model.moe.num_experts == changed.model.moe.experts_per_token == 1


@pytest.mark.parametrize(
  ("arguments", "rules"),
  [
    (["--rules.embed", "data"], [("embed", ("data",))]),
    (["--rules.embed", "data", "expert"], [("embed", ("data", "expert"))]),
    (["--rules.embed=data"], [("embed", ("data",))]),
    (["--rules.embed"], [("embed", ())]),
    (["--rules.kv-heads", "--rules.embed", "data"], [("kv_heads", ()), ("embed", ("data",))]),
  ],
)
def test_a_rule_is_set_by_its_logical_axis_and_others_stay(tiny_moe, arguments, rules):
  assert dict(override(tiny_moe, arguments).rules) == dict(DATA_EXPERT_MODEL) | dict(rules)


def test_a_rule_and_a_field_are_set_side_by_side(tiny_moe):
  changed = override(tiny_moe, ["--rules.embed", "data", "--model.num-layers", "4", "--rules.mlp"])
  assert (changed.model.num_layers, dict(changed.rules)["embed"], dict(changed.rules)["mlp"]) == (4, ("data",), ())


def complaint(configuration, *arguments) -> str:
  """The one line that answers these arguments."""
  with pytest.raises(UserError) as error:
    override(configuration, arguments)
  assert "\n" not in str(error.value)
  return str(error.value)


def hinted(line: str) -> list[str]:
  """The options that a line names after "did you mean"."""
  return line.rpartition("did you mean ")[2].removesuffix("?").split(" or ")


def all_options(configuration) -> list[str]:
  rules = [f"--rules.{name}" for name in LOGICAL_AXES]
  return [option.replace("_", "-") for option in [*paths(configuration), *rules] if option != "--rules"]


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def slips(option: str, random: np.random.Generator) -> list[str]:
  """The option with one letter changed, left out, doubled, and swapped with the next."""
  place = int(random.choice([i for i in range(2, len(option)) if option[i].isalpha()]))
  begin, letter, end = option[:place], option[place], option[place + 1 :]
  other = str(random.choice([x for x in LETTERS if x != letter]))
  return [begin + other + end, begin + end, begin + letter * 2 + end, begin + end[:1] + letter + end[1:]]


@pytest.mark.parametrize("kind", ["dense", "moe", "suite"])
def test_every_field_with_a_slip_in_it_is_among_the_hinted(tiny_dense, tiny_moe, tiny_suite, kind):
  random = np.random.default_rng(0)
  configuration = {"dense": tiny_dense, "moe": tiny_moe, "suite": tiny_suite}[kind]
  options = {*all_options(tiny_dense if kind == "dense" else tiny_moe)} - {"--name", "--model.moe"}
  missed = []
  for option in sorted(options):
    for slip in map(str, random.permutation(slips(option, random))[:2]):
      if slip in options or slip.startswith("---") or not slip[2:3].isalpha():
        continue
      line = complaint(configuration, slip, "4")
      missed += [(slip, line)] if option not in hinted(line) else []
  assert not missed


@pytest.mark.parametrize("kind", ["moe", "suite"])
def test_every_field_is_hinted_by_its_last_part_alone(tiny_moe, tiny_suite, kind):
  tops = {"--name", "--matchable", "--train", "--tolerance"}
  missed = []
  for option in sorted({*all_options(tiny_moe)} - tops):
    last = f"--{option.rpartition('.')[2].removeprefix('--')}"
    if last in tops or last.removeprefix("--") in ("data", "model"):  # groups, which say so
      continue
    line = complaint({"moe": tiny_moe, "suite": tiny_suite}[kind], last, "4")
    missed += [(last, line)] if option not in hinted(line) else []
  assert not missed


@pytest.mark.parametrize(
  ("argument", "hint"),
  [
    ("--lr", "--optimizer.learning-rate"),
    ("--warmup", "--optimizer.schedule.warmup-fraction"),
    ("--lr-scheduler-type", "--optimizer.schedule.kind"),
    ("--optimizer.lr", "--optimizer.learning-rate"),
    ("--LR", "--optimizer.learning-rate"),
    ("--steps", "--training.steps"),
    ("--max_steps", "--training.steps"),
    ("--batch", "--training.batch-size"),
    ("--bs", "--training.batch-size"),
    ("--seq-len", "--data.sequence-length"),
    ("--n-layers", "--model.num-layers"),
    ("--hidden-size", "--model.d-model"),
    ("--top-k", "--model.moe.experts-per-token"),
    ("--tp", "--mesh.model"),
    ("--work", "--workdir"),
    ("--output_dir", "--workdir"),
    ("--workdri", "--workdir"),
    ("--training.optimizer.learning-rate", "--optimizer.learning-rate"),
  ],
)
def test_names_of_other_frameworks_are_told_the_field_of_this_one(tiny_moe, tiny_suite, argument, hint):
  for configuration in (tiny_moe, tiny_suite):
    assert hinted(complaint(configuration, argument, "4"))[0] == hint


def test_every_name_that_stands_for_a_field_stands_for_one_that_there_is(tiny_moe):
  fields = {option.removeprefix("--").replace("-", "_") for option in all_options(tiny_moe)}
  assert {*ALIASES} - fields == {*OF_A_COMMAND, "optimizer.kind", "optimizer.schedule.kind"}
  # None of them is spelled as a whole field, which would be set and never hinted.
  assert not fields & {alias for aliases in ALIASES.values() for alias in aliases.split()}


def test_where_nothing_is_alike_the_list_of_all_fields_is_named(tiny_moe):
  assert complaint(tiny_moe, "--xyzzy", "4") == "'sparse' has no field 'xyzzy'; `moejax show NAME` lists all fields"
  assert "give the experiment without an option" in complaint(tiny_moe, "--config", "a.yaml")


@pytest.mark.parametrize("argument", ["--model.moe.num-experts", "--model.moe"])
def test_a_field_of_experts_that_are_not_there_is_told_so(tiny_dense, argument):
  with pytest.raises(UserError, match=r"has no field .*; it has no sparse layers; use an MoE experiment$"):
    override(tiny_dense, [argument, "4"])


@pytest.mark.parametrize(
  ("argument", "example"),
  [("--model", "--model.FIELD VALUE"), ("--model.moe", "--model.moe.FIELD VALUE"), ("--rules", "--rules.embed data")],
)
def test_a_group_of_fields_takes_no_value(tiny_moe, argument, example):
  path = argument.removeprefix("--")
  with pytest.raises(UserError) as error:
    override(tiny_moe, [argument, "None"])
  assert str(error.value) == f"{path} is a group of fields; set a field in it, as in {example}"


BAD_VALUES = [
  (["--model.num-layers", "four"], "model.num_layers='four' is not an integer; give one as in --model.num-layers 2"),
  (["--model.num-layers", "4.5"], "model.num_layers='4.5' is not an integer; give one as in --model.num-layers 2"),
  (["--model.num-layers", "1e-3"], "model.num_layers='1e-3' is not an integer; give one as in --model.num-layers 2"),
  (["--model.num-layers", "inf"], "model.num_layers='inf' is not an integer; give one as in --model.num-layers 2"),
  (["--model.num-layers"], "--model.num-layers needs a value: an integer, as in --model.num-layers 2"),
  (["--mesh.data", "two"], "mesh.data='two' is not an integer or None; give one as in --mesh.data 8"),
  (["--data.prefetch", "1", "2"], "--data.prefetch takes one value but got 2: 1 2; give one"),
  (
    ["--optimizer.gradient-clip", "inf"],
    "optimizer.gradient_clip='inf' is not a finite number; give one as in --optimizer.gradient-clip 1.0",
  ),
  (
    ["--model.tie-embeddings", "maybe"],
    "model.tie_embeddings='maybe' is not True or False; give one as in --model.tie-embeddings True",
  ),
  (
    ["--model.remat", "all"],
    "model.remat='all' is not one of none, products, dots, attention, layer_inputs, selected; give one as in "
    "--model.remat none",
  ),
  (
    ["--model.remat", "dotz"],
    "model.remat='dotz' is not one of none, products, dots, attention, layer_inputs, selected; did you mean dots?",
  ),
  (["4", "--model.num-layers"], "unexpected argument '4'; fields are set as --PATH VALUE, as in --model.num-layers 4"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES, ids=[" ".join(given) for given, _ in BAD_VALUES])
def test_a_wrong_value_is_one_line_with_what_is_right(tiny_dense, capsys, arguments, message):
  assert complaint(tiny_dense, *arguments) == message
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("--training.checkpoints.every", "0"),
    ("--training.losses.z", "-1"),
    ("--training.budget.tokens-per-parameter", "0"),
    ("--model.moe.capacity-factor", "0"),
    ("--model.moe.router.scale", "-1"),
    ("--optimizer.beta1", "1"),
    ("--mesh.expert", "0"),
  ],
)
def test_a_value_out_of_range_is_told_with_the_whole_path(tiny_moe, option, value):
  path = option.removeprefix("--").replace("-", "_")
  assert complaint(tiny_moe, option, value).startswith(f"{path}={type(at(tiny_moe, path))(value)} must be ")


def test_a_router_is_set_with_the_fields_of_its_kind(tiny_moe, tiny_suite):
  """Nothing is checked in between: expert choice alone would not fit, nor top-p without a threshold."""
  fields = ["--model.moe.router.kind", "top_p", "--model.moe.router.threshold", "0.9"]
  moe = override(tiny_moe, [*fields, "--model.moe.router.scale", "2"]).model.moe
  assert moe.router == TopPRouter(threshold=0.9, scale=2.0)
  assert override(tiny_moe, ["--model.moe.router=top_p", *fields[2:]]).model.moe.router == TopPRouter(threshold=0.9)
  everyone = override(tiny_suite, ["--model.moe.router.kind", "top_p", "--model.moe.router.threshold", "0.9"])
  kinds = {member.model.moe.router.kind for member in everyone.members if member.model.moe}
  assert kinds == {"top_p"}
  E = tiny_moe.model.moe.num_experts
  dense = override(tiny_moe, ["--model.moe.router", "dense", "--model.moe.experts-per-token", str(E),
                              "--training.losses.load-balance", "0"])  # fmt: skip
  assert dense.model.moe.router == DenseRouter()
  assert complaint(tiny_moe, "--model.moe.router.kind", "top_p").startswith(
    "model.moe.router.threshold is missing; add it, as in --model.moe.router.threshold VALUE"
  )
  assert complaint(tiny_moe, *fields, "--model.moe.router.bias-rate", "1") == (
    "'sparse' has no field 'model.moe.router.bias_rate', but router top_k has it: add --model.moe.router.kind top_k"
  )
  assert complaint(tiny_moe, "--model.moe.dispatch.receive-factor", "2").endswith(
    "but dispatch grouped has it: add --model.moe.dispatch.kind grouped"
  )


def test_a_kind_is_set_by_its_name_and_keeps_what_all_kinds_have(tiny_moe, tiny_suite):
  fields = ["--optimizer.kind", "Muon", "--optimizer.iterations", "3", "--optimizer.learning-rate", "0.5"]
  changed = override(tiny_moe, [*fields, "--optimizer.schedule.kind", "Linear"])
  assert changed.optimizer == Muon(learning_rate=0.5, iterations=3, schedule=Linear())
  assert replace(changed, optimizer=tiny_moe.optimizer) == tiny_moe
  assert {member.optimizer for member in override(tiny_suite, fields).members} == {
    replace(changed.optimizer, schedule=Cosine())
  }
  assert "'sparse' has no field 'optimizer.epsilon'" in complaint(tiny_moe, *fields, "--optimizer.epsilon", "1")
  line = complaint(tiny_moe, "--optimizer.kind", "adamw")
  assert line.startswith("optimizer.kind='adamw' is not one of AdamW, Lion, Muon") and line.endswith("mean AdamW?")


TEXTS = (
  "name", "data.train", "data.validation", "data.text_field", "data.tokenizer", "evaluation.tasks",
  "evaluation.task_data",
)  # fmt: skip


def test_every_field_refuses_a_value_of_another_type_and_two_where_one_is_due(tiny_moe, tiny_suite):
  """Text is any text, so that its fields are only told when there is none or more than one."""
  for option in all_options(tiny_moe):
    path = option.removeprefix("--").replace("-", "_")
    if path.startswith("rules."):
      assert "mesh axis '?!'" in complaint(tiny_moe, option, "?!")
      continue
    now = at(tiny_moe, path)
    if path not in TEXTS:
      for configuration in (tiny_moe, tiny_suite):
        line = complaint(configuration, option, "?!")
        assert line.startswith(("matchable='?!' is ", f"{path}='?!' is not ")) and "; " in line, line
    if not isinstance(now, tuple):
      assert option in complaint(tiny_moe, option) and option in complaint(tiny_moe, option, "1", "2")


def test_a_configurations_own_complaint_comes_as_it_is_however_narrow_the_terminal(tiny_dense, monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")
  with pytest.raises(UserError) as error:
    override(tiny_dense, ["--mesh.data", "3"])
  assert str(error.value) == (
    "training.batch_size / gradient_accumulation: batch=8 is not divisible by the 3 shards that mesh "
    "(replica 1 x data 3 x expert 1 x model 1) gives it through replica x data x expert; change one of them"
  )


def test_a_field_of_an_experiment_is_set_in_every_member_of_a_suite(tiny_suite):
  changed = override(tiny_suite, ["--training.steps", "5", "--rules.embed", "data", "--tolerance", "0.5"])
  assert changed.tolerance == 0.5 and [member.name for member in changed.members] == ["dense", "sparse", "wide"]
  assert {member.training.steps for member in changed.members} == {5}
  assert {dict(member.rules)["embed"] for member in changed.members} == {("data",)}


def test_a_rule_of_one_member_is_set_by_its_place(tiny_suite):
  changed = override(tiny_suite, ["--pairs.0.dense.rules.embed", "data"])
  assert [dict(member.rules)["embed"] for member in changed.members] == [("data",), *[("data", "expert")] * 2]


def test_data_of_a_suite_is_changed_in_all_members_at_once(tiny_suite):
  changed = override(tiny_suite, ["--data.train", "a.txt", "--data.seed", "3"])
  assert {(member.data.train, member.data.seed) for member in changed.members} == {(("a.txt",), 3)}


def test_a_field_of_one_member_is_set_by_its_place(tiny_suite):
  changed = override(tiny_suite, ["--pairs.0.candidates.1.model.moe.d-ff", "32", "--train", "matched"])
  assert [member.model.moe.d_ff for member in changed.members[1:]] == [8, 32]
  assert changed.train == "matched" and changed.members[0] == tiny_suite.members[0]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--pairs.3.dense.name", "x"], "'suite' has no field 'pairs.3.dense.name'; did you mean --pairs.0.dense.name"),
    (["--d-ff", "8"], "'suite' has no field 'd_ff'; did you mean --model.d-ff or --model.moe.d-ff?"),
    (["--tolerence", "0.1"], "'suite' has no field 'tolerence'; did you mean --tolerance"),
    (["--tolerance", "2"], "suite.tolerance=2.0 must lie between 0.0 and 1.0"),
    (
      ["--pairs.0.dense.data.seed", "5"],
      "candidate 'sparse' does not read the same data as 'dense'; use the same data",
    ),
    (["--model.num-layer", "2"], "'dense' has no field 'model.num_layer'; did you mean --model.num-layers"),
  ],
)
def test_what_is_wrong_with_a_suite(tiny_suite, arguments, message):
  with pytest.raises(UserError) as error:
    override(tiny_suite, arguments)
  assert str(error.value).startswith(message)


def paths(configuration, path: str = "") -> list[str]:
  """Dotted options of every leaf."""
  return [
    option
    for field in dataclasses.fields(configuration)
    for value in [getattr(configuration, field.name)]
    for option in _below(value, f"{path}{field.name}")
  ]


def _below(value, path: str) -> list[str]:
  if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
    return [option for i, item in enumerate(value) for option in paths(item, f"{path}.{i}.")]
  return paths(value, f"{path}.") if dataclasses.is_dataclass(value) else [f"--{path}"]


def test_of_a_pair_the_dense_experiment_has_its_own_fields(tiny_dense, tiny_moe):
  arguments = ["--dense.mesh.data", "4", "--mesh.data", "2", "--model.moe.d-ff", "16", "--dense.rules.embed", "data"]
  dense, moe = override_pair(tiny_dense, tiny_moe, arguments)
  assert (dense.mesh.data, moe.mesh.data, moe.model.moe.d_ff) == (4, 2, 16)
  assert (dict(dense.rules)["embed"], dict(moe.rules)["embed"]) == (("data",), ("data", "expert"))
  with pytest.raises(UserError, match=r"'dense' has no field 'model\.moe\.d_ff'"):
    override_pair(tiny_dense, tiny_moe, ["--dense.model.moe.d-ff", "16"])


def printed_help(capsys, configuration, command: str) -> str:
  """Its words, without the boxes."""
  print_field_help(configuration, command)
  return " ".join(re.sub(r"[│─-]{3,}|│", " ", capsys.readouterr().out).split())


def test_the_help_has_every_field_with_its_meaning_and_value(tiny_moe, capsys):
  words = printed_help(capsys, tiny_moe, "moejax train sparse")
  options = {option.replace("_", "-") for option in paths(tiny_moe)} - {"--rules"}
  options |= {f"--rules.{name.replace('_', '-')}" for name in LOGICAL_AXES}
  assert options <= set(words.split())
  assert "moejax train sparse" in words
  assert "--rules.embed [STR [STR ...]] Mesh axes that shard this logical axis. (default: data expert)" in words
  assert "--model.num-layers INT Number of transformer layers (L). (default: 2)" in words
  assert "--model.moe.d-ff INT Hidden dimension of one expert (F). (default: 8)" in words


def test_the_help_of_a_suite_says_how_a_field_is_set_in_all_members_and_in_one(tiny_suite, capsys):
  words = printed_help(capsys, tiny_suite, "moejax compare suite")
  assert "A field of an experiment, as in --training.steps 200, is set in every member" in words
  assert {"--tolerance", "--measurement.rounds", "--pairs.0.dense.training.steps"} <= set(words.split())
  assert "--pairs.0.candidates.1.model.moe.d-ff INT Hidden dimension of one expert (F). (default: 16)" in words
