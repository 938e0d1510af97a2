"""Where tensors go on eight simulated devices."""

import re
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import DATA_EXPERT_MODEL, Mesh
from moejax.errors import UserError
from moejax.partitioning import Partitioner, make_partitioner

P = PartitionSpec


@pytest.fixture(scope="module")
def cube() -> Partitioner:
  """2 x 2 x 2 devices along data, expert and model."""
  return make_partitioner(Mesh(data=2, expert=2, model=2), DATA_EXPERT_MODEL)


OUTER = ("replica", "data", "context")


@pytest.fixture(scope="module")
def single() -> Partitioner:
  return make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL)


@pytest.mark.parametrize(
  ("mesh", "shape"),
  [
    (Mesh(), (1, 8, 1, 1, 1)),
    (Mesh(expert=2, model=2), (1, 2, 2, 1, 2)),
    (Mesh(replica=2, expert=2), (2, 2, 2, 1, 1)),
    (Mesh(context=4), (1, 2, 1, 4, 1)),
    (Mesh(data=1), (1, 1, 1, 1, 1)),
    (Mesh(data=2, model=2), (1, 2, 1, 1, 2)),  # half of the devices stay idle
  ],
)
def test_the_mesh_has_the_five_axes_and_as_many_devices_as_it_says(mesh, shape):
  partitioner = make_partitioner(mesh, DATA_EXPERT_MODEL)
  assert partitioner.mesh.axis_names == ("replica", "data", "expert", "context", "model")
  assert partitioner.mesh.devices.shape == shape == tuple(partitioner.shape.shape.values())
  assert len(set(partitioner.mesh.devices.flat)) == np.prod(shape)


def test_the_devices_may_be_named():
  devices = jax.devices()[4:6]
  partitioner = make_partitioner(Mesh(), DATA_EXPERT_MODEL, devices)
  assert partitioner.shape.data == 2 and set(partitioner.mesh.devices.flat) == set(devices)


def test_a_mesh_that_needs_more_devices_than_there_are_is_refused():
  with pytest.raises(UserError, match=r"needs 16 devices, but there are 8; lower an axis$"):
    make_partitioner(Mesh(data=16), DATA_EXPERT_MODEL)


def test_rules_that_are_not_well_formed_are_refused():
  with pytest.raises(UserError, match=r"^rules: no rule for layers; "):
    make_partitioner(Mesh(), DATA_EXPERT_MODEL[1:])


@pytest.mark.parametrize(
  ("names", "shape", "spec"),
  [
    (("vocab", "embed"), (264, 16), P("model", ("data", "expert"))),
    (("embed", "kv_heads", "head_dim"), (16, 2, 4), P(("data", "expert"), "model", None)),
    (("layers", "embed", "mlp"), (3, 16, 24), P(None, ("data", "expert"), "model")),
    (("experts", "expert_embed", "expert_mlp"), (4, 16, 8), P("expert", "data", "model")),
    (("batch", "sequence", "act_embed"), (8, 5, 16), P(("replica", "data", "expert"), "context", "model")),
    # Table 1 of arXiv 2405.15052, with replica beside data: tokens, masks, and rows at their experts.
    (("outer", "groups", "group_tokens", "act_embed"), (2, 4, 7, 16), P(OUTER, "expert", None, "model")),
    (("outer", "groups", "group_tokens", None, "capacity"), (2, 4, 7, 3, 5), P(OUTER, "expert")),
    (("outer", "experts", None, "capacity", "act_embed"), (2, 4, 7, 5, 16), P(OUTER, "expert", None, None, "model")),
    ((None, "heads"), (3, 4), P(None, "model")),
    ((), (), P()),
  ],
)  # fmt: skip
def test_specs_follow_the_rules(cube, names, shape, spec):
  padded = P(*spec, *[None] * (len(names) - len(spec)))
  assert cube.spec(names, shape, "x") == padded
  assert cube.sharding(names, shape, "x") == NamedSharding(cube.mesh, padded)


@pytest.mark.parametrize(
  ("names", "shape", "message"),
  [
    (("embedd",), (16,), "parameter w: no rule for logical axis 'embedd'; the rules have layers, vocab, embed, "),
    (
      ("batch", "embed"),
      (8, 16),
      "parameter w (8, 16): rules map both 'batch' and 'embed' to mesh axis 'data'",
    ),
    (
      ("embed", "mlp"),
      (16, 9),
      "parameter w (16, 9): mlp=9 is not divisible by the 2 shards that mesh (replica 1 x data 2 x expert 2 x model 2) "
      "gives it through model; change one of them",
    ),
    (
      ("embed",),
      (6,),
      "parameter w (6,): embed=6 is not divisible by the 4 shards that mesh (replica 1 x data 2 x expert 2 x model 2) "
      "gives it through data x expert; change one of them",
    ),
    (("embed", "embed"), (16, 16), "parameter w: a logical axis occurs twice in ('embed', 'embed')"),
    (("embed",), (16, 16), "parameter w: 1 logical axes ('embed',) for shape (16, 16)"),
  ],
  ids=["unknown name", "one mesh axis twice", "not divisible", "not divisible by a product", "a name twice", "rank"],
)
def test_what_cannot_be_placed_is_refused_with_parameter_shape_rule_and_mesh(cube, names, shape, message):
  for place in (cube.spec, cube.sharding):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
      place(names, shape, "parameter w")


def test_constrain_refuses_what_cannot_be_placed_on_one_device_as_on_eight(cube, single):
  with pytest.raises(UserError, match=r"^activation batch x embedd: no rule for logical axis 'embedd'; "):
    single.constrain(jnp.zeros((8, 16)), "batch", "embedd")
  with pytest.raises(UserError, match=r"^activation batch x None \(7, 3\): batch=7 is not divisible by the 4 shards"):
    cube.constrain(jnp.zeros((7, 3)), "batch", None)


def test_on_one_device_a_constraint_is_nothing(single):
  x = jnp.ones((3, 5))
  assert single.constrain(x, "batch", None) is x


def test_a_constraint_places_each_part_on_its_device(cube):
  x = jnp.arange(8.0 * 6).reshape(8, 6)
  placed = jax.jit(lambda x: cube.constrain(x, "batch", "act_embed"))(x)
  assert placed.sharding.is_equivalent_to(cube.sharding(("batch", "act_embed"), x.shape, "x"), x.ndim)
  shards = {shard.device: shard for shard in placed.addressable_shards}
  for (_, data, expert, _, model), device in np.ndenumerate(cube.mesh.devices):
    rows = slice(2 * (2 * data + expert), 2 * (2 * data + expert) + 2)
    np.testing.assert_array_equal(shards[device].data, x[rows, 3 * model : 3 * model + 3])


def scaled_sums(x_BTD: jax.Array, scale_BT: jax.Array) -> jax.Array:
  """Each row needs nothing of another row."""
  return jnp.cumsum(x_BTD, axis=1) * scale_BT[..., None]


@pytest.fixture
def arguments() -> tuple[jax.Array, jax.Array]:
  x, scale = np.random.default_rng(0).normal(size=(2, 8, 5, 4)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(scale[..., 0])


NAMES = (("batch", "sequence", "act_embed"), ("batch", "sequence"))


def test_on_each_device_gives_what_the_plain_function_gives_from_local_shares(cube, arguments):
  seen = []

  def watched(*shares):
    seen.append([share.shape for share in shares])
    return scaled_sums(*shares)

  result = jax.jit(cube.on_each_device(watched, NAMES, NAMES[0]))(*arguments)
  np.testing.assert_array_equal(result, scaled_sums(*arguments))
  assert seen == [[(2, 5, 2), (2, 5)]]
  assert result.sharding.is_equivalent_to(cube.sharding(NAMES[0], result.shape, "x"), 3)


def test_on_each_device_is_differentiable_as_the_plain_function(cube, arguments):
  def loss(function):
    return jax.grad(lambda *given: jnp.sum(jnp.sin(function(*given))), argnums=(0, 1))

  sharded = jax.jit(loss(cube.on_each_device(scaled_sums, NAMES, NAMES[0])))(*arguments)
  for found, expected in zip(sharded, loss(scaled_sums)(*arguments), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # sums over devices in another order


def test_shards_are_gathered_numbered_and_added_up_by_the_names_of_their_dimensions(cube):
  x_BD = jnp.arange(8.0 * 6).reshape(8, 6)

  def crossing(x_bd):
    whole_bD = cube.gather(x_bd, "act_embed", 1)
    number = cube.index("act_embed")
    total_bd = cube.sum_over(x_bd, "outer", "groups")  # data and expert, which share the batch
    parts_bd = cube.sum_to_shards(whole_bD * (number + 1.0), "act_embed", 1)
    unshared = cube.gather(x_bd, "sequence", 0), cube.sum_over(x_bd, "sequence"), cube.index("sequence")[None]
    return whole_bD, number[None], total_bd, parts_bd, *unshared

  own, of_batch = ("batch", "act_embed"), ("batch", None)
  outputs = (of_batch, ("act_embed",), (None, "act_embed"), own, own, own, ("sequence",))
  found = jax.jit(cube.on_each_device(crossing, (own,), outputs, exchanging=True))(x_BD)
  expected = (x_BD, [0, 1], x_BD.reshape(4, 2, 6).sum(axis=0), 3 * x_BD, x_BD, x_BD, [0])
  for mine, other in zip(found, expected, strict=True):
    np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_shards_that_are_gathered_as_they_lie_in_memory_are_those_that_are_gathered_in_place(cube, dimension):
  x_BHD = jnp.arange(8.0 * 6 * 4).reshape(8, 6, 4)
  own = tuple("batch" if axis == dimension else None for axis in range(3))

  def losses(apart, x_bhd):
    def whole(x_bhd):
      return cube.on_each_device(lambda x: cube.gather(x, "batch", dimension, apart), (own,), (None,) * 3, True)(x_bhd)

    return whole(x_bhd), jax.grad(lambda x: jnp.sum(jnp.sin(whole(x))))(x_bhd)

  x_BHD = jnp.moveaxis(x_BHD, 0, dimension)
  for found, expected in zip(
    *(jax.jit(losses, static_argnums=0)(apart, x_BHD) for apart in (True, False)), strict=True
  ):
    np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(losses(True, x_BHD)[0], x_BHD)


def test_axes_of_one_device_shard_nothing(cube, single):
  assert cube.axes("batch") == ("data", "expert") and cube.axes("experts") == ("expert",)
  assert single.axes("batch") == single.axes("experts") == ()


def test_on_each_device_is_the_function_itself_on_one_device(single):
  assert single.on_each_device(scaled_sums, NAMES, NAMES[0]) is scaled_sums


def test_on_each_device_refuses_what_cannot_be_placed(cube):
  sharded = cube.on_each_device(scaled_sums, NAMES, NAMES[0])
  with pytest.raises(
    UserError, match=r"^argument of scaled_sums \(6, 5, 4\): batch=6 is not divisible by the 4 shards"
  ):
    sharded(jnp.zeros((6, 5, 4)), jnp.zeros((6, 5)))


def test_shards_are_the_parts_of_a_dimension(cube, single):
  parts = {name: cube.shards(name) for name in ("batch", "embed", "heads", "outer", "groups", "sequence")}
  assert parts == {"batch": 4, "embed": 4, "heads": 2, "outer": 2, "groups": 2, "sequence": 1}
  assert single.shards("batch") == 1


def test_the_batch_and_what_is_replicated(cube):
  tokens = jax.device_put(jnp.arange(32).reshape(8, 4), cube.batch)
  assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 4)}
  copies = jax.device_put(jnp.arange(32).reshape(8, 4), cube.replicated)
  assert [shard.data.shape for shard in copies.addressable_shards] == [(8, 4)] * 8


def test_an_own_rule_replaces_the_default_one():
  rules = (*DATA_EXPERT_MODEL, ("embed", ()), ("sequence", ("model",)), ("act_embed", ()))
  partitioner = make_partitioner(Mesh(data=4, model=2), rules)
  assert partitioner.spec(("vocab", "embed"), (264, 7), "w") == P("model", None)
  assert partitioner.batch.spec == P(("replica", "data", "expert"), "model")


@pytest.mark.parametrize(
  ("platform", "setting", "dtype"),
  [("cpu", "auto", "float32"), ("tpu", "auto", "bfloat16"), ("gpu", "auto", "bfloat16"),
   ("cpu", "bfloat16", "bfloat16"), ("tpu", "float32", "float32")],
)  # fmt: skip
def test_activations_are_float32_on_cpu_and_bfloat16_elsewhere_unless_set(tiny_dense, platform, setting, dtype):
  mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
  partitioner = Partitioner(mesh, Mesh(), DATA_EXPERT_MODEL)  # type: ignore[arg-type]
  assert partitioner.compute_dtype(replace(tiny_dense.model, compute_dtype=setting)) == jnp.dtype(dtype)


def test_broadcasting_over_unlike_ranks_raises_in_tests():
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.ones(3)
