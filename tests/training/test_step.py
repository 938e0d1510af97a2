"""The train step: the same on every mesh and in parts, and what its compiled program exchanges."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fixtures import fresh_state, initial_state, random_batch, run_steps, spec_of, step_of, tiny

from moejax.config import GroupedDispatch, Losses, Mesh, Router, Training
from moejax.models.abstract import parameter_name
from moejax.models.moe.router_metrics import router_metrics
from moejax.training.loss import denominators, loss_sums
from moejax.training.step import abstract_inputs, make_train_step

CUBE, EXPERTS, REPLICAS = Mesh(data=2, expert=2, model=2), Mesh(data=1, expert=8), Mesh(replica=2, data=2, expert=2)
NARROW = Mesh(data=1, expert=2, model=4)
MESHES = [Mesh(data=d, expert=e, model=8 // d // e) for d in (1, 2, 4, 8) for e in (1, 2, 4, 8) if 8 % (d * e) == 0]


def on_meshes(ways: dict[str, tuple[Mesh, ...]], slow: dict[str, tuple[Mesh, ...]]) -> pytest.MarkDecorator:
  """Parametrises a test by `way` and `mesh`: these ones, in the slow suite those, and every night all."""

  def marks(way: str, mesh: Mesh) -> tuple[pytest.MarkDecorator, ...]:
    return () if mesh in ways[way] else (pytest.mark.slow if mesh in slow.get(way, ()) else pytest.mark.nightly,)

  every = [pytest.param(way, mesh, marks=marks(way, mesh)) for way in ways for mesh in (*MESHES, REPLICAS)]
  return pytest.mark.parametrize(("way", "mesh"), every, ids=str)


@functools.cache
def on_one_device(sparse):
  return run_steps(tiny(sparse))


@on_meshes({"dense model": (REPLICAS,), "MoE": (CUBE,)}, {"MoE": (EXPERTS, REPLICAS)})
def test_eight_devices_train_as_one_does_on_every_mesh(way, mesh):
  state, losses, _ = run_steps(tiny(way == "MoE", mesh=mesh))
  expected_state, expected_losses, _ = on_one_device(way == "MoE")
  # Sums over shards round differently: float32 holds 7 digits, and Adam's first steps divide by tiny second moments.
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
  for (path, mine), other in zip(
    jax.tree_util.tree_leaves_with_path(state.parameters), jax.tree.leaves(expected_state.parameters), strict=True
  ):
    np.testing.assert_allclose(mine, other, atol=3e-4, err_msg=parameter_name(path))


def test_training_moves_parameters_far_beyond_that_tolerance():
  before = spec_of(tiny(True)).init_state(0).parameters
  after = on_one_device(True)[0].parameters
  moved = [float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
  assert min(moved) > 3e-3


def test_the_fill_rate_is_the_part_of_the_batch_that_is_no_padding():
  # The last of 16 rows of 32 is padded from 20 on.
  assert on_one_device(False)[2]["fill_rate"] == pytest.approx(1 - 12 / (16 * 32))


def dispatched(mesh=None, steps_of=run_steps, **fields):
  """The tiny MoE with other fields of its sparse layers, after some steps."""
  experiment = tiny(True, **({"mesh": mesh} if mesh else {}))
  moe = dataclasses.replace(experiment.model.moe, **fields)
  return steps_of(dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe)))


@functools.cache
def dispatched_on_one_device(dispatch):
  return dispatched(dispatch=dispatch)


WAYS = {
  "to the experts": {"dispatch": "grouped"},
  "to all devices": {"dispatch": GroupedDispatch(exchange="all_gather")},
  # The tokens of a device do not divide into three.
  "to the experts in chunks": {"dispatch": GroupedDispatch(exchange_chunks=3)},
  "to all devices in chunks": {"dispatch": GroupedDispatch(exchange="all_gather", exchange_chunks=3)},
  "dense": {"dispatch": "dense"},
}


@on_meshes(
  dict.fromkeys(WAYS, ()),
  {
    "to the experts": (CUBE, EXPERTS),
    "to all devices": (NARROW,),
    "to the experts in chunks": (CUBE,),
    "to all devices in chunks": (NARROW,),
    "dense": (CUBE,),
  },
)
def test_every_dispatch_trains_on_every_mesh_as_on_one_device(way, mesh):
  on_one = "dense" if way == "dense" else "grouped"
  fields = {"dispatch": on_one} if mesh.expert == 1 else WAYS[way]  # without an expert axis nothing is exchanged
  state, losses, metrics = dispatched(mesh, **fields)
  expected_state, expected_losses, _ = dispatched_on_one_device(on_one)
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
  assert not metrics["router/dropped_fraction"].any()
  for (path, mine), other in zip(
    jax.tree_util.tree_leaves_with_path(state.parameters), jax.tree.leaves(expected_state.parameters), strict=True
  ):
    np.testing.assert_allclose(mine, other, atol=3e-4, err_msg=parameter_name(path))


@pytest.mark.parametrize(
  "factor", [pytest.param(1.0, marks=pytest.mark.nightly), pytest.param(0.5, marks=pytest.mark.slow)]
)
def test_a_receive_buffer_drops_what_is_beyond_its_factor_of_a_balanced_load(factor):
  _, losses, metrics = dispatched(Mesh(data=1, expert=8), dispatch=GroupedDispatch(receive_factor=factor))
  # A device has one expert and room for the factor times the two choices of each of its 64 tokens; 500 tokens are real.
  arriving_E = np.round(np.asarray(metrics["router/load"][0]) * 2 * 500)
  dropped = np.maximum(arriving_E - factor * 2 * 64, 0).sum() / (2 * 500)
  assert float(metrics["router/dropped_fraction"][0]) == pytest.approx(dropped, abs=1e-6)
  assert np.isfinite(losses).all() and dropped > 0


@pytest.mark.slow
def test_noise_is_the_same_on_every_mesh():
  def loss(mesh, router):
    moe = dataclasses.replace(tiny(True).model.moe, dispatch="dense", router=router)
    experiment = tiny(True, mesh=mesh, model=dataclasses.replace(tiny(True).model, moe=moe))
    spec, batch = spec_of(experiment), random_batch(experiment)
    keys_B = jax.random.split(jax.random.key(1), len(batch["tokens"]))
    state = initial_state(experiment.model, experiment.optimizer, 0)
    placed = jax.device_put((state.parameters, batch), (spec.shardings.parameters, spec.partitioner.batch))
    (sums,) = jax.jit(lambda parameters, rows: loss_sums(spec.model.module(parameters), rows, keys_B))(*placed)
    return float(sums["text"]["loss"])

  noisy = Router(jitter=0.5, gumbel=1.0)
  on_one = loss(Mesh(data=1), noisy)
  assert loss(CUBE, noisy) == pytest.approx(on_one, rel=2e-5) != pytest.approx(loss(Mesh(data=1), Router()), rel=1e-4)


@pytest.mark.slow
def test_noise_differs_from_step_to_step_and_is_that_of_the_step():
  experiment = tiny(True)

  def losses_of(router):
    """Of two steps that change no parameter, and of the second alone."""
    moe = dataclasses.replace(experiment.model.moe, dispatch="dense", router=router)
    changed = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe))
    step, batch, losses = step_of(changed), random_batch(changed), []
    for first in (0, 1):
      state = fresh_state(changed)
      state = dataclasses.replace(state, step=state.step + first)
      for _ in range(2 - first):
        state, metrics = step(state, batch, jnp.float32(0.0))
        losses.append(float(metrics["loss"]))
    return losses

  first, second, again = losses_of(Router(jitter=0.5, gumbel=1.0))
  assert abs(first - second) > 1e-5 and second == again


def test_the_bias_of_a_router_moves_by_its_rate_and_by_no_gradient():
  experiment = tiny(True)
  moe = dataclasses.replace(experiment.model.moe, router=Router(bias_rate=0.25))
  spec = spec_of(dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe)))
  state, metrics = make_train_step(spec)(spec.init_state(0), random_batch(experiment), jnp.float32(1e-2))
  bias_LE = state.parameters["layers"]["blocks"][1]["feed_forward"]["bias_E"]
  np.testing.assert_allclose(bias_LE, 0.25 * np.sign(1 / 8 - np.asarray(metrics["router/load"])), atol=1e-6)
  assert np.asarray(bias_LE).any()


@pytest.mark.slow
def test_parts_of_a_batch_have_noise_of_their_own():
  experiment = tiny(True)
  moe = dataclasses.replace(experiment.model.moe, dispatch="dense", router=Router(gumbel=1.0))
  experiment = dataclasses.replace(
    experiment,
    model=dataclasses.replace(experiment.model, moe=moe),
    training=dataclasses.replace(experiment.training, gradient_accumulation=2),
  )
  half = {name: rows[:8] for name, rows in random_batch(experiment).items()}
  batch = {name: np.concatenate([rows, rows]) for name, rows in half.items()}
  _, metrics = step_of(experiment)(fresh_state(experiment), batch, jnp.float32(0.0))
  counts_E = np.asarray(metrics["router/load"][0]) * 2 * (batch["segments"] > 0).sum()
  np.testing.assert_allclose(counts_E, np.round(counts_E), atol=1e-2)
  assert (np.round(counts_E) % 2).any(), "equal halves chose equally: each count is twice that of a half"


def test_auxiliary_losses_are_means_over_layers_and_norms_those_of_the_new_parameters():
  experiment = tiny(True)
  moe = dataclasses.replace(experiment.model.moe, every=1)
  experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe))
  spec, batch = spec_of(experiment), random_batch(experiment)
  state = fresh_state(experiment)
  before = jax.device_get(state.parameters)
  measured = jax.jit(lambda parameters: loss_sums(spec.model.module(parameters), batch))(before)
  (sums,), (by,) = measured, denominators(batch, experiment.model)
  auxiliary = router_metrics(sums, by.tokens, by.chosen, experiment.model)
  after, metrics = step_of(experiment)(state, batch, jnp.float32(0.01))
  for name, loss_L in auxiliary.losses.items():
    assert loss_L.shape == (2,) and float(metrics[f"loss/{name}"]) == pytest.approx(float(loss_L.mean()), rel=1e-4)
  norms = [float(optax.tree.norm(parameters)) for parameters in (before, jax.device_get(after.parameters))]
  assert float(metrics["param_norm"]) == pytest.approx(norms[1], rel=1e-5) != pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_five_steps_on_one_batch_lower_the_loss(sparse):
  losses = on_one_device(sparse)[1]
  assert losses[-1] < losses[0] - 0.3


def test_the_step_is_clipped_adamw_with_decay_on_matrices_alone():
  experiment = tiny(False)
  experiment = dataclasses.replace(
    experiment, optimizer=dataclasses.replace(experiment.optimizer, gradient_clip=0.5, weight_decay=0.3)
  )
  spec = spec_of(experiment)
  state = fresh_state(experiment)
  before = jax.device_get(state.parameters)
  gradients = _gradients(spec, before, random_batch(experiment))
  assert float(optax.tree.norm(gradients)) > 0.5
  after, _ = make_train_step(spec)(state, random_batch(experiment), jnp.float32(0.01))
  matrices = jax.tree.map(lambda names: len(set(names) - {"layers"}) > 1, spec.model.names, is_leaf=_is_names)
  assert {len(set(names) - {"layers"}) for names in jax.tree.leaves(spec.model.names, is_leaf=_is_names)} > {1}
  config = experiment.optimizer
  reference = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(0.01, b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=0.3, mask=matrices),
  )
  updates, _ = jax.jit(reference.update)(gradients, reference.init(before), before)
  expected = optax.apply_updates(before, updates)
  for mine, other in zip(jax.tree.leaves(after.parameters), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(mine, other, atol=2e-5)


def test_a_gradient_below_the_limit_is_not_scaled():
  """Adam's update hardly depends on the scale of a gradient, but its moments do."""
  experiment = tiny(False)
  experiment = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, gradient_clip=1e3))
  spec = spec_of(experiment)
  state, batch = fresh_state(experiment), random_batch(experiment)
  gradients = _gradients(spec, jax.device_get(state.parameters), batch)
  norm = float(optax.tree.norm(gradients))
  assert norm < 1e3
  after, metrics = make_train_step(spec)(state, batch, jnp.float32(0.01))
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
  first_moments = optax.tree.get(after.optimizer, "mu")
  for moment, gradient in zip(jax.tree.leaves(first_moments), jax.tree.leaves(gradients), strict=True):
    np.testing.assert_allclose(moment, (1 - experiment.optimizer.beta1) * gradient, rtol=1e-3, atol=1e-6)


def test_the_z_loss_is_the_mean_squared_normalizer_of_the_targets_that_count():
  experiment = tiny(False)
  spec = spec_of(experiment)
  state, batch = fresh_state(experiment), random_batch(experiment)
  batch["weights"][0, :7] = 0.0  # beside padding and the last token of each document
  batch["weights"][1] *= 0.5

  @jax.jit
  def logits(parameters):
    model = spec.model.module(parameters)
    x_BTD, _ = model(*(batch[name] for name in ("tokens", "segments", "positions")))
    return model.logits(x_BTD.reshape(-1, 32))

  normalizer_M = np.log(np.exp(np.asarray(logits(state.parameters), np.float64)).sum(axis=-1))
  weights_M = batch["weights"].reshape(-1)
  expected = np.sum(normalizer_M**2 * weights_M) / weights_M.sum()
  assert expected != pytest.approx(np.mean(normalizer_M**2), rel=1e-4), "it is the same with padding"
  _, metrics = step_of(experiment)(state, batch, jnp.float32(0.01))
  assert float(metrics["loss/z"]) == pytest.approx(expected, rel=1e-5)


def test_a_coefficient_whose_loss_no_layer_returns_is_an_error():
  experiment = tiny(True)
  spec = spec_of(experiment)
  broken = dataclasses.replace(tiny(False), name="broken")
  training: Training = dataclasses.replace(broken.training)
  object.__setattr__(training, "losses", Losses(load_balance=0.5))  # past the experiment's own check
  object.__setattr__(broken, "training", training)
  spec = spec_of(broken)
  with pytest.raises(ValueError, match=r"load_balance=0\.5, but no layer returns that loss"):
    make_train_step(spec).lower(*abstract_inputs(spec))


def test_the_balance_coefficient_reaches_the_routers_gradient():
  experiment, gradients = tiny(True), []
  one_layer = {"num_layers": 1, "moe": dataclasses.replace(experiment.model.moe, every=1)}
  experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **one_layer))
  for coefficient in (0.0, 10.0):
    losses = dataclasses.replace(experiment.training.losses, load_balance=coefficient)
    changed = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, losses=losses))
    spec = spec_of(changed)
    found = _gradients(spec, fresh_state(changed).parameters, random_batch(changed))
    gradients.append(found["layers"]["blocks"][0]["feed_forward"]["w_router_DE"])
  assert float(jnp.abs(gradients[1] - gradients[0]).max()) > 10 * float(jnp.abs(gradients[0]).max())


def test_both_reshards_compile_to_all_to_alls_over_expert_and_no_expert_weight_is_gathered_over_it():
  experiment = tiny(True, mesh=Mesh(data=2, expert=4))
  spec = spec_of(
    dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat="products", layers="scanned"))
  )
  program = make_train_step(spec).lower(*abstract_inputs(spec)).compile().as_text()
  expert_groups, data_groups = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]
  exchanges = _collectives(program, "all-to-all", "dispatch|combine|experts")
  # Dispatch and combine, forwards and backwards, and nothing again; inside a data shard, which they never leave.
  assert [_groups(line) for line in exchanges] == [expert_groups] * 4, exchanges
  # Experts' weights, [E, 32, 16] and [E, 16, 32]: a device has 2 of the 8 experts, and gathers their shards over data.
  gathers = re.findall(r"= f32\[(?:1,)?(\d+),(?:32,16|16,32)\]\S* all-gather\(.*", program)
  lines = [line for line in program.splitlines() if re.search(r"= f32\[(1,)?\d+,(32,16|16,32)\]\S* all-gather\(", line)]
  assert set(gathers) == {"2"} and all(_groups(line) == data_groups for line in lines), lines
  assert not _collectives(program, "all-gather", "router"), "a device routes its own tokens"
  sums = [line for line in _collectives(program, "all-reduce", "router") if "/while/body/" in line]
  assert not [line for line in sums if "transpose(" not in line], "no layer waits for other devices' routers"


def _collectives(program, kind, scopes):
  """Lines of a compiled program with this collective, from these scopes of the model."""
  return [
    line
    for line in program.splitlines()
    if re.search(rf"= .* {kind}(-start)?\(", line) and re.search(rf'op_name="[^"]*/({scopes})/', line)
  ]


def _groups(line):
  """Which devices exchange with each other, from an HLO line: explicit, in iota form, or by axes of a mesh."""
  explicit = re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", line)
  if explicit:
    return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", explicit.group(1))]
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
  if iota:
    rows, columns, shape, order = iota.groups()
    return _iota(shape, order).reshape(int(rows), int(columns)).tolist()
  axes, used = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line).groups()
  ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", line)
  names, sizes = re.findall(r"'(\w+)'", axes), [int(size) for size in re.findall(r"=(\d+)", axes)]
  devices = (_iota(*ids.groups()) if ids else np.arange(8)).reshape(sizes)
  together = [names.index(name) for name in re.findall(r"'(\w+)'", used)]
  apart = [axis for axis in range(len(names)) if axis not in together]
  size = int(np.prod([sizes[axis] for axis in together]))
  return sorted(sorted(row) for row in devices.transpose(apart + together).reshape(-1, size).tolist())


def _iota(shape, order):
  devices = np.arange(8).reshape([int(n) for n in shape.split(",")])
  return devices.transpose([int(n) for n in order.split(",")]) if order else devices


def _gradients(spec, parameters, batch):
  from moejax.training.step import _gradients as gradients

  return jax.device_get(jax.jit(lambda parameters, batch: gradients(spec, parameters, batch)[0])(parameters, batch))


def _is_names(value):
  return isinstance(value, tuple)
