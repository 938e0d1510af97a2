"""Offload to the memory of the host: the same training as without it, with the arrays where they should be."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from training_fixtures import fresh_state, run_steps, spec_of, tiny

from moejax.config import AdamW, Checkpoints, GroupedQuery, LoRA, Mesh, Muon, Precision
from moejax.errors import UserError
from moejax.host_memory import check_host_memory, is_on_host, without_effect
from moejax.models.abstract import parameter_name
from moejax.training.checkpoint import Checkpointer
from moejax.training.memory import argument_bytes
from moejax.training.step import abstract_inputs, make_train_step

CUBE = Mesh(data=2, expert=2, model=2)


def offloading(sparse=False, remat="products", activations=(), moments=False, optimizer=AdamW, saved=(), **fields):
  base = tiny(sparse, **fields)
  of_remat = {"remat": remat, "save_activations": saved, "offload_activations": activations}
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, **of_remat, d_ff=48),
    optimizer=optimizer(learning_rate=3e-3, offload_moments=moments),
  )


@pytest.mark.parametrize("optimizer", [AdamW, LoRA, Muon])
def test_the_arrays_of_the_optimizer_are_on_the_host_and_need_no_memory_of_the_device(optimizer):
  experiment = offloading(moments=True, optimizer=optimizer, mesh=Mesh(data=2))
  state, without = (spec_of(each).abstract_state for each in (experiment, offloading(optimizer=optimizer)))
  assert not any(is_on_host(leaf.sharding) for leaf in jax.tree.leaves((state.step, state.parameters)))
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
    assert is_on_host(leaf.sharding) == (leaf.ndim > 0), parameter_name(path)
  scalars = sum(leaf.dtype.itemsize for leaf in jax.tree.leaves(state.optimizer) if not leaf.shape)
  assert argument_bytes(state.optimizer) == scalars < argument_bytes(without.optimizer) / 100


@dataclasses.dataclass(frozen=True)
class Described:
  """A device with these memories."""

  platform: str
  memories: tuple[str, ...]
  device_kind: str = "mine"

  def addressable_memories(self):
    return [SimpleNamespace(kind=kind) for kind in self.memories]


def test_a_device_without_memory_of_its_host_is_refused_and_a_cpu_is_noted():
  fields = offloading(activations=("attention",), moments=True).offload_fields
  assert fields == ("model.offload_activations", "optimizer.offload_moments") and not offloading().offload_fields
  alone, whole = Described("tpu", ("device",)), Described("tpu", ("device", "pinned_host"))
  with pytest.raises(UserError, match=r"moments: mine has no memory of the kind pinned_host, only device; remove"):
    check_host_memory(fields, alone)
  check_host_memory(fields, whole)
  check_host_memory((), alone)
  assert without_effect(fields, whole) is None is without_effect((), jax.devices()[0])
  assert "save no memory on CPU" in without_effect(fields, jax.devices()[0])


@pytest.mark.parametrize(
  ("remat", "group", "message"),
  [
    (
      "none",
      "attention",
      r"'attention' would have no effect because model\.remat='none'.*to products or dots or atten",
    ),
    (
      "attention",
      "products",
      r"'products' would have no effect because .* set remat to products or selected .*, or remove",
    ),
    ("products", "logits", r"'logits' is not one of attention, products, layer_inputs, queries, .* experts_out$"),
  ],
)
def test_what_remat_does_not_save_by_name_cannot_be_offloaded(remat, group, message):
  with pytest.raises(UserError, match=rf"^model\.offload_activations={message}"):
    offloading(remat=remat, activations=(group,))


B, T, D, N, H, F = 16, 32, 32, 8, 4, 48

GROUPS = [
  ("products", ("attention",)), ("products", ("products",)), ("products", ("layer_inputs",)),
  ("dots", ("attention", "layer_inputs")), ("attention", ("attention",)), ("layer_inputs", ("layer_inputs",)),
]  # fmt: skip


def saved_of_layers(experiment):
  """The arrays that the loop over layers saves for the backward pass: shape without layers, and whether on the host."""
  spec = spec_of(experiment)
  jaxpr = make_train_step(spec).trace(*abstract_inputs(spec)).jaxpr
  found = []

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "scan" and not found:
        stacked = equation.outvars[equation.params["num_carry"] :]
        found.extend((x.aval.shape[1:], x.aval.memory_space == jax.memory.Space.Host) for x in stacked)
      for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          visit(inner)

  visit(jaxpr)
  return found


@pytest.mark.parametrize("value", ["queries", pytest.param("keys_values", marks=pytest.mark.slow)])
def test_queries_and_keys_that_are_saved_are_not_projected_again_with_norms_either(value):
  def products(saved, **fields):
    experiment = offloading(remat="selected" if saved else "layer_inputs", saved=saved)
    spec = spec_of(dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **fields)))
    return str(make_train_step(spec).trace(*abstract_inputs(spec)).jaxpr).count("dot_general[")

  plain, normed, normed_after = ({}, {"qk_norm": True}, {"attention": (GroupedQuery(norm_after_rotary=True),)})
  spared = [products((), **fields) - products((value,), **fields) for fields in (plain, normed, normed_after)]
  assert spared == [1 if value == "queries" else 2] * 3


def test_parts_of_a_model_keep_its_selection():
  """A selection that a part does not read is not refused in it."""
  experiment = offloading(sparse=True, remat="selected", saved=("feed_forward_in", "experts_in"))
  assert experiment.model.last_layer.unread_activations == ("feed_forward_in",)
  with pytest.raises(UserError, match="feed_forward_in would have no effect"):
    dataclasses.replace(experiment, model=experiment.model.last_layer)


@pytest.mark.parametrize(
  "remat", [pytest.param("products", marks=pytest.mark.slow), "dots", pytest.param("attention", marks=pytest.mark.slow)]
)
def test_what_is_saved_does_not_depend_on_the_precision_of_gradients_or_products(remat):
  precisions = (
    {"compute_dtype": "float32"}, {"compute_dtype": "bfloat16"},
    {"compute_dtype": "bfloat16", "gradient_dtype": "compute"},
    {"compute_dtype": "bfloat16", "precision": Precision(attention="int8", feed_forward="int8")},
  )  # fmt: skip
  saved = []
  for fields in precisions:
    experiment = offloading(remat=remat)
    model = dataclasses.replace(experiment.model, **fields)
    saved.append(collections.Counter(saved_of_layers(dataclasses.replace(experiment, model=model))))
  of_dense = {} if remat == "attention" else {((B * T, F), False): 2}
  expected = {((B, T, N, H), False): 4, ((B, T, D), False): 2} | of_dense
  assert saved == [expected] * len(precisions)


@pytest.mark.parametrize(("remat", "activations"), GROUPS)
def test_the_values_that_are_offloaded_and_no_others_leave_the_device(remat, activations):
  before = saved_of_layers(offloading(remat=remat))
  after = saved_of_layers(offloading(remat=remat, activations=activations))
  assert not any(on_host for _, on_host in before)
  assert sorted(shape for shape, _ in before) == sorted(shape for shape, _ in after), "nothing is saved twice"
  of_group = {"attention": {(B, T, N, H)}, "products": {(B, T, F), (B * T, F)}, "layer_inputs": {(B, T, D)}}
  offloaded = {shape for shape, on_host in after if on_host}
  assert all(offloaded & of_group[group] for group in activations)
  kept = {shape for shape, on_host in after if not on_host}
  # The output of attention, which some policies keep on the device, has the shape of the layer's input.
  unique = [group for group in activations if group != "layer_inputs" or remat == "layer_inputs"]
  assert not any(kept & of_group[group] for group in unique)


HEADS, HIDDEN, ROUTED, ROWS = (B, T, N, H), (B * T, F), (1, B * T // 16, 16, 8), (8, 128)
OF_ROUTER = [ROUTED, ROUTED, (*ROUTED[:3], 2)]  # logits, rows of capacity and choices
VALUES = {
  "queries": [HEADS], "keys_values": [HEADS, HEADS], "context": [HEADS], "attention_out": [(B, T, D)],
  "feed_forward_in": [HIDDEN, HIDDEN],
}  # fmt: skip
"""The arrays of a value in a layer, by name."""

SPARSE_VALUES = {
  # In a dense layer and the sparse one after it. The input of the latter is the sum of all outputs before.
  "feed_forward_in": [HIDDEN, HIDDEN],
  "feed_forward_out": [(B * T, D)],
  "expert_rows": [*OF_ROUTER, (*ROWS, D)],
  "experts_in": [*OF_ROUTER, (*ROWS, 16), (*ROWS, 16)],
  "experts_out": [*OF_ROUTER, (1, B * T // 16, 8, 4, D)],
}


@pytest.mark.parametrize(
  ("sparse", "values"), [(False, VALUES), pytest.param(True, SPARSE_VALUES, marks=pytest.mark.slow)]
)
def test_a_value_that_is_selected_is_saved_and_no_other(sparse, values):
  def saved(**fields):
    return collections.Counter(shape for shape, _ in saved_of_layers(offloading(sparse, **fields)))

  inputs = saved(remat="layer_inputs")
  for name, shapes in values.items():
    assert saved(remat="selected", saved=(name,)) - inputs == collections.Counter(shapes), name
  names, every = tuple(values), [shape for shapes in values.values() for shape in shapes]
  if not sparse:
    assert saved(remat="selected", saved=names) - inputs == collections.Counter(every) == saved() - inputs


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"remat": "attention", "saved": ("context",)}, "save_activations=context would have no effect with .*'attention'"),
    ({"remat": "selected"}, "remat='selected' without model.save_activations is the same as 'layer_inputs'"),
    ({"remat": "selected", "saved": ("layer_inputs",)}, "'layer_inputs' is always saved"),
    ({"remat": "selected", "saved": ("router",)}, "save_activations='router' is not one of attention, products, "),
    (
      {"remat": "selected", "saved": ("feed_forward_out",)},
      "=feed_forward_out would have no effect because the backward",
    ),
    ({"remat": "selected", "saved": ("context",), "activations": ("attention",)}, "'attention' would have no effect"),
  ],
)
def test_a_selection_without_effect_is_refused(fields, message):
  with pytest.raises(UserError, match=rf"^model\..*{message}"):
    offloading(**fields)


@pytest.mark.slow
@pytest.mark.parametrize(
  "fields",
  [
    {"sparse": True, "mesh": CUBE, "activations": ("attention", "products", "layer_inputs"), "moments": True},
    {"remat": "layer_inputs", "activations": ("layer_inputs",), "moments": True, "optimizer": Muon},
    {"remat": "selected", "saved": ("context", "feed_forward_out"), "sparse": True, "activations": ("context",)},
  ],
  ids=["MoE on 8 devices", "dense on one device", "selected values"],
)
def test_training_is_the_same_as_without_offload(fields):
  state, losses, _ = run_steps(offloading(**fields), steps=3)
  expected_state, expected_losses, _ = run_steps(offloading(**fields | {"activations": (), "moments": False}), steps=3)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
  for (path, mine), other in zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected_state), strict=True
  ):
    np.testing.assert_allclose(mine, other, atol=1e-5, err_msg=parameter_name(path))


@pytest.mark.parametrize("moments", [True, False])
def test_a_checkpoint_is_restored_with_and_without_offload(tmp_path, moments):
  saved, restored = (offloading(moments=each, mesh=Mesh(data=2)) for each in (moments, not moments))
  state, progress = fresh_state(saved), {"data": None, "train_time_s": 1.0, "tokens": 1}
  checkpointer = Checkpointer(tmp_path / "checkpoints", Checkpoints())
  checkpointer.save(state, 1, progress)
  checkpointer.close()
  found, _ = Checkpointer(tmp_path / "checkpoints", Checkpoints()).restore(1, spec_of(restored).abstract_state)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))
  assert jax.tree.map(lambda leaf: leaf.sharding, found) == spec_of(restored).shardings
