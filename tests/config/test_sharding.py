"""The mesh and the rules, before any device is there."""

import pytest

from moejax.config import DATA_EXPERT_MODEL, Mesh
from moejax.config.sharding import LOGICAL_AXES, MESH_AXES, check_dimensions, shards, table
from moejax.errors import UserError


@pytest.mark.parametrize("axis", MESH_AXES)
@pytest.mark.parametrize("devices", [0, -1])
def test_an_axis_has_at_least_one_device(axis, devices):
  with pytest.raises(UserError, match=rf"^mesh\.{axis}={devices} must be above 0$"):
    Mesh(**{axis: devices})


def test_an_open_data_axis_counts_as_one_and_is_shown_as_open():
  mesh = Mesh(replica=2, expert=3, model=4)
  assert mesh.shape == {"replica": 2, "data": 1, "expert": 3, "context": 1, "model": 4}
  assert mesh.size == 24
  assert str(mesh) == "replica 2 x data ? x expert 3 x model 4"
  assert str(Mesh(context=5)) == "replica 1 x data ? x expert 1 x context 5 x model 1"


@pytest.mark.parametrize(
  ("mesh", "devices", "data"),
  [
    (Mesh(), 8, 8),
    (Mesh(), 1, 1),
    (Mesh(expert=2, model=2), 8, 2),
    (Mesh(replica=2, expert=2, model=2), 8, 1),
    (Mesh(data=2), 8, 2),  # devices to spare stay idle: what is set is not changed
    (Mesh(data=2, model=3), 6, 2),
  ],
)
def test_resolving_gives_an_open_data_axis_the_devices_that_are_left(mesh, devices, data):
  resolved = mesh.resolve(devices)
  assert resolved.data == data
  assert (resolved.replica, resolved.expert, resolved.model) == (mesh.replica, mesh.expert, mesh.model)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
  with pytest.raises(
    UserError, match=r"^mesh replica 1 x data 3 x expert 1 x model 4 needs 12 devices, but there are 8; lower an axis$"
  ):
    Mesh(data=3, model=4).resolve(8)


def test_an_open_data_axis_that_would_not_be_whole_is_refused():
  with pytest.raises(
    UserError,
    match=r"^8 devices are not divisible by mesh replica 1 x data \? x expert 3 x model 1; "
    r"set mesh\.data or change another axis$",
  ):
    Mesh(expert=3).resolve(8)


def test_the_default_rules_name_every_logical_axis_once():
  assert sorted(table(DATA_EXPERT_MODEL)) == sorted(LOGICAL_AXES)
  assert len(DATA_EXPERT_MODEL) == len(LOGICAL_AXES)


def test_the_default_rules_are_table_1_of_the_paper_for_tokens_on_their_way_through_the_experts():
  rules = table(DATA_EXPERT_MODEL)
  # Outside the experts O is sharded by data and U by expert, inside E is sharded by expert and U is whole.
  assert (
    rules["outer"] == ("replica", "data", "context")
    and rules["groups"] == ("expert",)
    and rules["experts"] == ("expert",)
  )
  assert rules["expert_mlp"] == ("model",) and rules["act_embed"] == ("model",)
  assert rules["group_tokens"] == rules["capacity"] == ()


def test_of_two_rules_for_one_axis_the_later_counts():
  rules = table((*DATA_EXPERT_MODEL, ("embed", ("data",)), ("embed", ())))
  assert rules["embed"] == () and rules["vocab"] == ("model",)


def test_a_rule_for_an_axis_that_no_tensor_has_names_those_that_tensors_have():
  with pytest.raises(
    UserError, match=r"^rules: no tensor has a logical axis 'embedd'; the logical axes are layers, vocab, embed,"
  ):
    table((*DATA_EXPERT_MODEL, ("embedd", ("data",))))


def test_a_rule_with_an_axis_that_no_mesh_has_names_those_that_meshes_have():
  with pytest.raises(
    UserError,
    match=r"^rules: 'embed' names an unknown mesh axis 'fsdp'; the mesh axes are replica, data, expert, context, ",
  ):
    table((*DATA_EXPERT_MODEL, ("embed", ("fsdp",))))


def test_a_logical_axis_without_a_rule_is_refused_and_not_replicated():
  rules = tuple(rule for rule in DATA_EXPERT_MODEL if rule[0] not in ("mlp", "vocab"))
  with pytest.raises(UserError, match=r"^rules: no rule for vocab, mlp; use \(\) for an axis that is not sharded$"):
    table(rules)


def test_shards_multiply_over_the_mesh_axes_of_a_rule():
  mesh = Mesh(replica=2, data=3, expert=5, model=7)
  parts = {name: shards(DATA_EXPERT_MODEL, mesh, name) for name in ("batch", "embed", "heads", "outer", "sequence")}
  assert parts == {"batch": 30, "embed": 15, "heads": 7, "outer": 6, "sequence": 1}


def test_dimensions_that_divide_pass():
  check_dimensions("w", {"vocab": 14, "embed": 15}, DATA_EXPERT_MODEL, Mesh(data=3, expert=5, model=7))


def test_two_dimensions_on_one_mesh_axis_are_refused_with_both_names():
  with pytest.raises(UserError, match=r"^w: rules map both 'batch' and 'embed' to mesh axis 'data'$"):
    check_dimensions("w", {"batch": 8, "embed": 8}, DATA_EXPERT_MODEL, Mesh())


def test_a_dimension_that_its_mesh_axes_do_not_divide_is_refused_with_size_shards_mesh_and_rule():
  with pytest.raises(
    UserError,
    match=r"^w: embed=10 is not divisible by the 4 shards that mesh \(replica 1 x data 2 x expert 2 x model 1\) gives "
    r"it through data x expert; change one of them$",
  ):
    check_dimensions("w", {"vocab": 7, "embed": 10}, DATA_EXPERT_MODEL, Mesh(data=2, expert=2))
