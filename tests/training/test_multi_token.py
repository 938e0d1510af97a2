"""Multi-token prediction: its loss is that of a plain loop over documents, on every mesh and in parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_accumulation import check_equal
from training_fixtures import product_flops, random_batch, spec_of, tiny

from moejax.config import GroupedDispatch, Mesh, Router
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.models.attend import context_of
from moejax.models.moe.router_counts import EXPERTS
from moejax.models.multi_token import Tokens, tokens_ahead
from moejax.training.loss import denominators, loss_sums, objective
from moejax.training.step import _gradients, abstract_inputs, make_train_step

LENGTHS = [[12, 1, 7, 2, 10], [32], [3, 3, 3, 3], [1, 2, 1, 2, 20]]
"""Of the documents of each row. What is left of a row is padding."""


def experiment_of(sparse=True, depth=2, parts=1, mesh=None, model=None, **moe):
  base = tiny(sparse)
  fields = {"multi_token_depth": depth} | (model or {})
  if sparse:
    fields["moe"] = dataclasses.replace(base.model.moe, every=1, **moe)
  losses = dataclasses.replace(base.training.losses, multi_token=0.3)
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, **fields),
    training=dataclasses.replace(base.training, losses=losses, gradient_accumulation=parts),
    mesh=mesh or Mesh(data=1),
  )


def packed(experiment, prefix=0):
  """Rows of documents of LENGTHS. The first `prefix` tokens of each are no targets."""
  batch = random_batch(experiment)
  for row in range(len(batch["tokens"])):
    at = 0
    for name in ("segments", "positions", "weights"):
      batch[name][row] = 0
    for number, length in enumerate(LENGTHS[row % len(LENGTHS)], 1):
      batch["segments"][row, at : at + length] = number
      batch["positions"][row, at : at + length] = np.arange(length)
      batch["weights"][row, at + max(0, prefix - 1) : at + length - 1] = 1.0
      at += length
  batch["targets"] = np.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
  return batch


def normalized(x_TD, norm):
  x_TD = np.asarray(x_TD, np.float64)
  return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + norm.epsilon) * np.asarray(norm.scale_D[...])


LONGEST = 32


def alone(length):
  """Segments and positions of one document, which padding follows, so that one program serves all lengths."""
  positions_BT = jnp.arange(LONGEST)[None]
  return (positions_BT < length).astype(jnp.int32), positions_BT


def lengthened(rows):
  """One document, [1, LONGEST, ...]."""
  return np.pad(rows, [(0, LONGEST - len(rows)), *[(0, 0)] * (rows.ndim - 1)])[None]


@functools.cache
def compiled(experiment):
  """The layers of the model, and the block of one of its modules, as functions of a document with this length."""
  model = spec_of(experiment).model

  def layers(parameters, tokens_BT, length):
    return model.module(parameters)(tokens_BT, *alone(length))[0]

  def block(parameters, x_BTD, length, module):
    transformer = model.module(parameters)
    context = context_of(transformer.model, *alone(length))
    return transformer.multi_token[module].block(x_BTD, context, None, None)[0]

  return jax.jit(layers), jax.jit(block, static_argnums=3)


def of_document(experiment, parameters, tokens_T, prefix):
  """The summed cross-entropy and the number of targets of each depth, for one document alone."""
  transformer, (layers, block) = spec_of(experiment).model.module(parameters), compiled(experiment)
  table_VD = np.asarray(transformer.embedding_VD[...], np.float64)
  x_BTD, found = layers(parameters, lengthened(tokens_T), len(tokens_T)), []
  features_TD = np.asarray(x_BTD, np.float64)[0, : len(tokens_T)]
  for depth, module in enumerate(transformer.multi_token, 1):
    length = len(tokens_T) - depth  # positions that have a token `depth` later
    if length < 1:
      found.append((0.0, 0))
      continue
    state_TD = normalized(features_TD[:length], module.state_norm) @ np.asarray(module.w_state_DJ[...])
    token_TD = normalized(table_VD[tokens_T[depth:]], module.token_norm) @ np.asarray(module.w_token_DJ[...])
    x_BTD = lengthened((state_TD + token_TD).astype(np.float32))
    features_TD = np.asarray(block(parameters, x_BTD, length, depth - 1), np.float64)[0, :length]
    logits_TV = normalized(features_TD, module.final_norm) @ table_VD.T
    loss, count = 0.0, 0
    for t in range(length - 1):
      if t + depth + 1 >= prefix:
        loss += np.log(np.exp(logits_TV[t]).sum()) - logits_TV[t, tokens_T[t + depth + 1]]
        count += 1
    found.append((loss, count))
  return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize(("sparse", "prefix"), [(False, 0), (True, 4)])
def test_the_loss_is_that_of_a_loop_over_documents(sparse, prefix):
  moe = {"dispatch": GroupedDispatch(), "group_size": 1} if sparse else {}
  experiment = experiment_of(sparse, **moe)
  spec, batch = spec_of(experiment), packed(experiment, prefix)
  batch = {name: rows[: len(LENGTHS)] for name, rows in batch.items()}
  parameters = spec.init_state(0).parameters

  @jax.jit
  def metrics_of(parameters):
    sums = loss_sums(spec.model.module(parameters), batch)
    return objective(sums, denominators(batch, experiment.model), experiment.model, experiment.training.losses)[1]

  metrics = metrics_of(parameters)
  expected_Z2 = np.zeros((2, 2))
  for row, lengths in enumerate(LENGTHS):
    at = 0
    for length in lengths:
      expected_Z2 += of_document(experiment, parameters, batch["tokens"][row, at : at + length], prefix)
      at += length
  assert (expected_Z2[:, 1] > 10).all()
  for depth in (1, 2):
    loss, count = expected_Z2[depth - 1]
    assert metrics[f"multi_token/targets/depth_{depth}"] == count
    assert float(metrics[f"loss/multi_token/depth_{depth}"]) == pytest.approx(loss / count, rel=1e-5)
  means = expected_Z2[:, 0] / expected_Z2[:, 1]
  assert float(metrics["loss/multi_token"]) == pytest.approx(means.mean(), rel=1e-5)


def test_a_target_counts_only_in_the_document_that_it_is_predicted_from():
  experiment = experiment_of(False)
  batch = {name: jnp.asarray(rows) for name, rows in packed(experiment).items()}
  tokens = Tokens(*(batch[name] for name in ("tokens", "targets", "segments", "positions", "weights")))
  for depth in range(4):
    ahead = tokens_ahead(tokens, depth)
    expected = [sum(max(0, length - depth - 1) for length in lengths) for lengths in LENGTHS * 4]
    np.testing.assert_array_equal(ahead.weights_BT.sum(axis=1), expected)
    real_BT = np.asarray(ahead.weights_BT) > 0
    rows, at = np.nonzero(real_BT)
    np.testing.assert_array_equal(np.asarray(ahead.targets_BT)[real_BT], batch["tokens"][rows, at + depth + 1])
    np.testing.assert_array_equal(np.asarray(ahead.tokens_BT)[real_BT], batch["tokens"][rows, at + depth])
  assert not tokens_ahead(tokens, 40).segments_BT.any()


NOISY = {"router": Router(scores="sigmoid", bias_rate=0.01, jitter=0.3, gumbel=1.0), "group_size": 64}


@functools.cache
def gradients_of(parts, mesh=None):
  experiment = experiment_of(parts=parts, mesh=mesh, **NOISY)
  spec, batch = spec_of(experiment), packed(experiment)
  parameters = spec_of(experiment_of(**NOISY)).init_state(0).parameters
  placed = jax.device_put((parameters, batch), (spec.model.shardings, spec.partitioner.batch))
  function = jax.jit(lambda parameters, batch: _gradients(spec, parameters, batch, jax.random.key(3)))
  return jax.device_get(function(*placed))


@pytest.mark.parametrize(
  ("parts", "mesh"),
  [
    pytest.param(4, None, marks=pytest.mark.nightly),
    pytest.param(2, Mesh(data=2, expert=2, model=1), marks=pytest.mark.slow),
    pytest.param(1, Mesh(replica=2, data=1, expert=4), marks=pytest.mark.nightly),
    pytest.param(1, Mesh(data=2, model=4), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_parts_and_meshes_have_the_gradients_and_metrics_of_one_device(parts, mesh):
  check_equal(gradients_of(parts, mesh), gradients_of(1))


@pytest.mark.slow
def test_every_parameter_of_a_module_is_trained_and_its_metrics_follow_those_of_the_layers():
  gradients, metrics = gradients_of(1)
  modules = gradients["multi_token"]
  small = [path for path, x in jax.tree_util.tree_leaves_with_path(modules) if np.abs(x).max() < 1e-6]
  assert {path[-1].key for path in small} <= {"bias_E"}, "a bias has no gradient"
  assert metrics["router/choices"].shape == (2 + 2, 8)
  experiment = experiment_of(**NOISY)
  tokens = Tokens(
    *(jnp.asarray(packed(experiment)[name]) for name in ("tokens", "targets", "segments", "positions", "weights"))
  )
  real = [int((tokens_ahead(tokens, depth).segments_BT > 0).sum()) for depth in (0, 0, 1, 2)]
  np.testing.assert_array_equal(metrics["router/choices"].sum(axis=1), 2 * np.array(real))
  assert len(set(real)) == 3


@pytest.mark.slow
def test_the_biases_of_the_modules_move_by_their_own_loads():
  experiment = experiment_of(**NOISY)
  state, metrics = make_train_step(spec_of(experiment))(
    spec_of(experiment).init_state(0), packed(experiment), jnp.float32(0.0)
  )
  for depth in range(2):
    bias_E = state.parameters["multi_token"][depth]["block"]["feed_forward"]["bias_E"]
    expected_E = 0.01 * np.sign(1 / 8 - np.asarray(metrics["router/load"][2 + depth]))
    np.testing.assert_allclose(bias_E, expected_E, atol=1e-6)
    assert np.asarray(bias_E).any()


def test_routers_count_the_modules_in_layers_of_their_own():
  experiment = experiment_of()
  spec, batch = spec_of(experiment), packed(experiment)
  sums = jax.eval_shape(lambda parameters: loss_sums(spec.model.module(parameters), batch), spec.model.parameters)
  assert [of_depth[EXPERTS]["choices"].shape for of_depth in sums] == [(2, 8), (1, 8), (1, 8)]


def test_a_traced_step_has_the_products_of_the_formula():
  """Of dense layers, in which every product of a step is counted."""
  for depth in (1, 2):
    experiment = experiment_of(False, depth, model={"layers": "unrolled"})
    spec = spec_of(experiment)
    traced = make_train_step(spec).trace(*abstract_inputs(spec)).jaxpr
    assert product_flops(traced.jaxpr) == tokens_per_step(experiment) * flops_per_token(experiment.model, 32)
