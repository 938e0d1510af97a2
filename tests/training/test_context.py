"""Context parallelism: sequences that are sharded over devices have the gradients and metrics of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rule_tables import gradients
from training_fixtures import spec_of, tiny

from moejax.config import EinsumDispatch, GroupedDispatch, GroupedQuery, Latent, Mesh, TopKDepths
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.kernels.attention import attention, fused_attention
from moejax.models import attend
from moejax.models.abstract import parameter_name
from moejax.partitioning import make_partitioner
from moejax.training.step import abstract_inputs, make_train_step

CASES = {
  "window and sinks": (False, {"attention": (GroupedQuery(window=5, sinks=True), GroupedQuery(chunk=6))}),
  "latent, logits in chunks": (False, {"attention": (Latent(kv_rank=8, rotary_dim=4),), "logit_chunks": 4}),
  "mixture of heads, modules": (False, {"num_kv_heads": 2, "attention_experts": 4, "multi_token_depth": 2}),
  "capacity": (True, {"dispatch": EinsumDispatch(priority="token"), "group_size": 16}),
  "dropless, shared expert": (True, {"dispatch": GroupedDispatch(), "num_shared_experts": 1}),
}
MESHES = (Mesh(data=1, context=8), Mesh(data=2, context=2, model=2), Mesh(data=1, expert=2, context=4))


@functools.cache
def experiment_of(case, mesh=Mesh(data=1)):  # noqa: B008
  sparse, fields = CASES[case]
  base = tiny(sparse, mesh=mesh)
  model = dataclasses.replace(
    base.model, **({"moe": dataclasses.replace(base.model.moe, **fields)} if sparse else fields)
  )
  multi_token = 0.3 if model.multi_token_depth else 0.0
  losses = dataclasses.replace(base.training.losses, multi_token=multi_token)
  return dataclasses.replace(base, model=model, training=dataclasses.replace(base.training, losses=losses))


@functools.cache
def on_one_device(case):
  experiment = experiment_of(case)
  parameters = jax.device_get(spec_of(experiment).init_state(0).parameters)
  return parameters, gradients(experiment, parameters)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sharded_sequences_have_the_gradients_and_metrics_of_one_device(case, mesh):
  parameters, (expected, expected_metrics) = on_one_device(case)
  found, metrics = gradients(experiment_of(case, mesh), parameters)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  for (path, mine), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    largest = np.abs(other).max() + 1e-9
    np.testing.assert_allclose(mine / largest, other / largest, atol=2e-4, err_msg=parameter_name(path))


@pytest.mark.slow
@pytest.mark.parametrize("windows", [False, True])
def test_keys_and_values_are_gathered_over_context_unless_all_windows_are_short_and_no_activation_else(windows):
  """A part has 16 positions."""
  mesh = Mesh(data=2, context=4)
  experiment = experiment_of("window and sinks", mesh) if windows else tiny(False, mesh=mesh)
  spec = spec_of(dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sequence_length=64)))
  text = make_train_step(spec).lower(*abstract_inputs(spec)).compile().as_text()
  gathers = [line for line in text.splitlines() if " all-gather(" in line and "mesh" not in line.split("=")[0]]
  whole = [line for line in gathers if ",64,8,4]" in line.split(" all-gather(")[0]]
  assert bool(whole) != windows, "keys and values of 64 positions"
  permutes = [line.split(" collective-permute(") for line in text.splitlines() if " collective-permute(" in line]
  assert any(",16,8,4]" in result for result, _ in permutes) == windows, "those of the part before"
  assert not [line for line in gathers if "[8,64,32]" in line.split(" all-gather(")[0]], "the residual stream stays"


@pytest.mark.slow
@pytest.mark.parametrize(("window", "sinks"), [(None, True), (200, True), (400, False)])
@pytest.mark.parametrize("mesh", [Mesh(data=2, context=4), Mesh(data=1, context=4, model=2)], ids=str)
def test_the_fused_kernel_on_parts_of_sequences_equals_plain_attention_on_one_device(monkeypatch, mesh, window, sinks):
  """Outputs and gradients, with documents that end in a part, at its border and in padding. The kernel runs without a
  TPU. A part has 256 positions."""
  keys = jax.random.split(jax.random.key(0), 5)
  q, weight = (jax.random.normal(key, (2, 1024, 4, 16)) for key in keys[:2])
  k, v = (jax.random.normal(key, (2, 1024, 2, 16)) for key in keys[2:4])
  sinks_N = jax.random.normal(keys[4], (4,)) if sinks else None
  segments = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 2, 3, 3, 0, 0]], 128, axis=1))
  weight = weight * (segments > 0)[..., None, None]

  def of(kernel, mesh):
    monkeypatch.setattr(attend, "attention_for", lambda *_: kernel)
    partitioner = make_partitioner(mesh, tiny(False).rules)

    def weighted(q, k, v, sinks_N):
      out = attend.attend(partitioner, q, k, v, segments, window, sinks_N)
      return jnp.sum(out * weight), out

    differentiated = (0, 1, 2, 3) if sinks else (0, 1, 2)
    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, differentiated, has_aux=True))(q, k, v, sinks_N)
    return out * (segments > 0)[..., None, None], *gradients

  found, expected = of(functools.partial(fused_attention, interpret=True), mesh), of(attention, Mesh(data=1))
  for fused, plain in zip(found, expected, strict=True):
    np.testing.assert_allclose(fused, plain, atol=2e-5)


def test_inference_has_whole_sequences_and_a_mixture_of_depths_needs_them():
  experiment = tiny(True, mesh=Mesh(data=2, context=2, model=2))
  spec = spec_of(experiment)
  assert spec.partitioner.shards("sequence") == 2 and spec.partitioner.shards("outer") == 4
  partitioner = inference_model(experiment.model, spec.partitioner).partitioner
  assert partitioner.shards("sequence") == 1 and partitioner.shards("outer") == 2
  dense = tiny(False)
  losses = dataclasses.replace(dense.training.losses, depths=0.1)
  with pytest.raises(UserError, match=r"model\.depths\.kind=top_k needs whole sequences; use \(\) for sequence"):
    dataclasses.replace(
      dense,
      model=dataclasses.replace(dense.model, depths=TopKDepths()),
      training=dataclasses.replace(dense.training, losses=losses),
      mesh=Mesh(data=4, context=2),
    )
  with pytest.raises(UserError, match=r"sequence=32 is not divisible by the 3 shards that mesh \(.*context 3"):
    tiny(False, mesh=Mesh(data=2, context=3))
