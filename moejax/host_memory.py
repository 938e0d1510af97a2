"""Memory of the host, where a training step can keep arrays that do not fit on its devices.

On TPU and GPU, copies to and from it are asynchronous. On CPU, it is the memory of the device under another name.
"""

from collections.abc import Sequence
from typing import Any

import jax

from moejax.errors import UserError

HOST = "pinned_host"
"""Name of the memory of the host from which devices copy, as in `jax.sharding.Sharding.memory_kind`."""

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host


def is_on_host(sharding: jax.sharding.Sharding) -> bool:
  """Whether arrays with this sharding are in the memory of the host."""
  return sharding.memory_kind == HOST


def check_host_memory(fields: Sequence[str], device: jax.Device) -> None:
  """Raises UserError if there are fields that need the memory of the host, and a device cannot copy to and from it."""
  kinds = [memory.kind for memory in device.addressable_memories()]
  if fields and HOST not in kinds:
    raise UserError(
      f"{' and '.join(fields)}: {device.device_kind} has no memory of the kind {HOST}, only {', '.join(kinds)}; remove "
      f"{'them' if len(fields) > 1 else 'it'}"
    )


def without_effect(fields: Sequence[str], device: jax.Device) -> str | None:
  """A note that fields which need the memory of the host save no memory on CPU. None if they do, or there are none."""
  if not fields or device.platform != "cpu":
    return None
  return f"{' and '.join(fields)} {'save' if len(fields) > 1 else 'saves'} no memory on CPU, which is its own host"


def to_device(tree: Any, after: jax.Array | None = None) -> Any:
  """Within a compiled function: the arrays of a tree, with those that are on the host moved to their devices.

  With `after`, they are not moved before this number is known, so that until then they take no memory of the device.
  """

  def move(x: jax.Array) -> jax.Array:
    if jax.typeof(x).memory_space != _HOST:
      return x
    if after is not None:
      x, _ = jax.lax.optimization_barrier((x, after))
    return jax.device_put(x, _DEVICE)

  return jax.tree.map(move, tree)


def to_host(tree: Any, shardings: Any) -> Any:
  """Within a compiled function: the arrays of a tree, with those whose sharding is on the host moved there."""
  return jax.tree.map(lambda x, sharding: jax.device_put(x, _HOST) if is_on_host(sharding) else x, tree, shardings)
