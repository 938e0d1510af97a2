"""Fields from the command line."""

import dataclasses
import io
import re
import sys
from dataclasses import replace

import pytest

from moejax.config import DATA_EXPERT_MODEL
from moejax.config.sharding import LOGICAL_AXES
from moejax.errors import UserError
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


@pytest.mark.parametrize(
  ("argument", "hint"),
  [
    ("--model.num-layer", "; did you mean --model.num-layers or "),
    ("--num-layers", "; did you mean --model.num-layers or "),
    ("--rule.embed", "; did you mean --rules.embed or "),
    ("--training.batchsize", "; did you mean --training.batch-size"),
    ("--rules.nonsense", "; did you mean --rules.sequence or "),
    ("--pairs.0.dense.name", ""),
    ("--frobnicate", ""),
  ],
)
def test_an_unknown_field_is_told_the_nearest(tiny_dense, argument, hint):
  with pytest.raises(UserError) as error:
    override(tiny_dense, [argument, "4"])
  path = argument.removeprefix("--").replace("-", "_")
  assert str(error.value).startswith(f"'dense' has no field {path!r}{hint}")
  assert "--model.moe" not in str(error.value)


@pytest.mark.parametrize("argument", ["--model.moe.num-experts", "--model.moe"])
def test_a_field_of_experts_that_are_not_there_is_told_so(tiny_dense, argument):
  with pytest.raises(UserError, match=r"has no field .*; it has no sparse layers: start from an MoE experiment$"):
    override(tiny_dense, [argument, "4"])


@pytest.mark.parametrize(
  ("argument", "example"),
  [("--model", "--model.FIELD VALUE"), ("--model.moe", "--model.moe.FIELD VALUE"), ("--rules", "--rules.embed data")],
)
def test_a_group_of_fields_takes_no_value(tiny_moe, argument, example):
  path = argument.removeprefix("--")
  with pytest.raises(UserError) as error:
    override(tiny_moe, [argument, "None"])
  assert str(error.value) == f"{path} is a group of fields; set one of them, as in {example}"


BAD_VALUES = [
  (["--model.num-layers", "four"], "--model.num-layers: invalid literal for int() with base 10: 'four'"),
  (["--model.num-layers", "4.5"], "--model.num-layers: invalid literal for int() with base 10: '4.5'"),
  (["--model.num-layers"], "Missing value for argument '--model.num-layers'. Expected 1 values."),
  (["--mesh.data", "two"], "--mesh.data: no type matching {None}|INT could be instantiated from ['two']."),
  (["--data.prefetch", "1", "2"], "Unrecognized options: 2"),
  (
    ["--model.tie-embeddings", "maybe"],
    "invalid choice 'maybe' for argument '--model.tie-embeddings'. Expected one of ('True', 'False').",
  ),
  (
    ["--model.remat", "all"],
    "invalid choice 'all' for argument '--model.remat'. "
    "Expected one of ('none', 'products', 'dots', 'attention', 'layer_inputs').",
  ),
  (["4", "--model.num-layers"], "unexpected argument '4'; fields are set as --PATH VALUE, as in --model.num-layers 4"),
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES, ids=[" ".join(given) for given, _ in BAD_VALUES])
def test_a_wrong_value_is_one_line_whatever_box_the_parser_draws(
  tiny_dense, monkeypatch, capsys, encoding, arguments, message
):
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
  with pytest.raises(UserError) as error:
    override(tiny_dense, arguments)
  assert str(error.value) == message
  assert capsys.readouterr().err == ""


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
    (["--tolerence", "0.1"], "'suite' has no field 'tolerence'; did you mean --tolerance"),
    (["--tolerance", "2"], "suite.tolerance=2.0 must lie between 0.0 and 1.0"),
    (["--pairs.0.dense.data.seed", "5"], "candidate 'sparse' reads other data than 'dense'; use the same data"),
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
    for option in (
      paths(value, f"{path}{field.name}.") if dataclasses.is_dataclass(value) else [f"--{path}{field.name}"]
    )
  ]


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
  assert "--rules.embed [STR [STR ...]] Mesh axes that shard it. (default: data expert)" in words
  assert "--model.num-layers INT Transformer layers (L). (default: 2)" in words
  assert "--model.moe.d-ff INT Hidden width of one expert. (default: 8)" in words


def test_the_help_of_a_suite_says_how_a_field_is_set_in_all_members_and_in_one(tiny_suite, capsys):
  words = printed_help(capsys, tiny_suite, "moejax compare suite")
  assert "A field of an experiment, as in --training.steps 200, is set in every member" in words
  assert {"--tolerance", "--measurement.rounds", "--pairs.0.dense.training.steps"} <= set(words.split())
  assert "--pairs.0.candidates.1.model.moe.d-ff INT Hidden width of one expert. (default: 16)" in words
