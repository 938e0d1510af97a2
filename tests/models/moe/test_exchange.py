"""Rows to the devices of their experts and back, on simulated devices, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.models.moe.exchange import exchange, plan_transfers

DEVICES, EXPERTS, TOKENS, WIDTH = 4, 8, 12, 3
MESH = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("expert",))
AXIS, LONGEST = ("expert",), TOKENS


def on_devices(function, outputs):
  return jax.jit(
    jax.shard_map(function, mesh=MESH, in_specs=(P("expert"), P("expert")), out_specs=outputs, check_vma=False)
  )


def sizes(seed=0, favorite=None):
  """sizes_QE: rows of each device for each expert, 12 at most."""
  random = np.random.default_rng(seed)
  probs = np.ones(EXPERTS) / EXPERTS if favorite is None else 0.8 * np.eye(EXPERTS)[favorite] + 0.2 / EXPERTS
  return np.stack([random.multinomial(TOKENS - q, probs) for q in range(DEVICES)]).astype(np.int32)


def rows_of(sizes_QE):
  """x_QRD: each row says its device, its expert and its place there; NaN where there is none."""
  x_QRD = np.full((DEVICES, TOKENS, WIDTH), np.nan, np.float32)
  for q, sizes_E in enumerate(sizes_QE):
    rows = [(q, e, i) for e, size in enumerate(sizes_E) for i in range(size)]
    x_QRD[q, : len(rows)] = rows
  return x_QRD


def there_and_back(x_RD, sizes_E, room):
  plan = plan_transfers(sizes_E[0], AXIS, room)
  received = exchange(x_RD[0], plan.to_experts, plan.to_tokens, room, LONGEST, AXIS)
  returned = exchange(received, plan.to_tokens, plan.to_experts, TOKENS, LONGEST, AXIS)
  return received[None], returned[None], plan.sizes_e[None], plan.dropped[None]


@pytest.mark.parametrize("favorite", [None, 5])
def test_rows_arrive_sorted_by_expert_and_return_to_where_they_were(favorite):
  sizes_QE, room = sizes(favorite=favorite), DEVICES * TOKENS
  x_QRD = rows_of(sizes_QE)
  run = on_devices(functools.partial(there_and_back, room=room), (P("expert"),) * 4)
  received, returned, sizes_Pe, dropped = run(x_QRD, sizes_QE)
  per_device = EXPERTS // DEVICES
  np.testing.assert_array_equal(sizes_Pe, sizes_QE.sum(axis=0).reshape(DEVICES, per_device))
  for p in range(DEVICES):
    experts = range(p * per_device, (p + 1) * per_device)
    expected = [(q, e, i) for e in experts for q in range(DEVICES) for i in range(sizes_QE[q, e])]
    np.testing.assert_array_equal(received[p][: len(expected)], np.array(expected).reshape(-1, WIDTH))
    np.testing.assert_array_equal(received[p][len(expected) :], 0)
  real = ~np.isnan(x_QRD[..., 0])
  np.testing.assert_array_equal(returned[real], x_QRD[real])
  assert not np.asarray(dropped).any()


def test_what_finds_no_room_is_dropped_counted_and_comes_back_as_zeros():
  sizes_QE, room = sizes(favorite=5), 20
  x_QRD = rows_of(sizes_QE)
  _, returned, sizes_Pe, dropped = on_devices(functools.partial(there_and_back, room=room), (P("expert"),) * 4)(
    x_QRD, sizes_QE
  )
  arriving = sizes_QE.sum(axis=0).reshape(DEVICES, -1).sum(axis=1)
  assert arriving.max() > room > arriving.min()
  np.testing.assert_array_equal(sizes_Pe.sum(axis=1), np.minimum(arriving, room))
  assert int(dropped.sum()) == int(np.maximum(arriving - room, 0).sum())
  real = ~np.isnan(x_QRD[..., 0])
  came_back = (np.asarray(returned) == x_QRD).all(axis=-1) & real
  assert int((real & ~came_back).sum()) == int(dropped.sum())
  assert not np.asarray(returned)[real & ~came_back].any()


def test_the_gradient_of_an_exchange_is_its_reverse():
  sizes_QE, room = sizes(), DEVICES * TOKENS
  x_QRD = np.nan_to_num(rows_of(sizes_QE))
  weight = np.random.default_rng(1).normal(size=(room, WIDTH)).astype(np.float32)

  def gradient(x_RD, sizes_E):
    def loss(x_RD):
      plan = plan_transfers(sizes_E[0], AXIS, room)
      received = exchange(x_RD[0], plan.to_experts, plan.to_tokens, room, LONGEST, AXIS)
      return jnp.sum(received * (weight + jax.lax.axis_index(AXIS)))

    return jax.grad(loss)(x_RD)

  found = on_devices(gradient, P("expert"))(x_QRD, sizes_QE)
  received, *_ = on_devices(functools.partial(there_and_back, room=room), (P("expert"),) * 4)(
    rows_of(sizes_QE), sizes_QE
  )
  for p, rows in enumerate(np.asarray(received)):
    for r, (q, e, i) in enumerate(rows.astype(int)[: int(sizes_QE.sum(axis=0).reshape(DEVICES, -1).sum(axis=1)[p])]):
      place = int(sizes_QE[q, :e].sum()) + i
      np.testing.assert_allclose(found[q, place], weight[r] + p, rtol=1e-6)
