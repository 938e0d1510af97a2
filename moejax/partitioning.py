"""Maps logical axes to devices: the mesh, PartitionSpecs and sharding constraints. Models use only logical axes.

Flax silently replicates a tensor if its logical axis is misspelled, and silently ignores a mesh axis that is used for
two dimensions. Here, both are errors that name the tensor, its shape, the rule and the mesh.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config.model import Model
from moejax.config.sharding import MESH_AXES, Mesh, Rules, axes_of, check_dimensions, shards, table
from moejax.errors import UserError
from moejax.torus import arrange, networks

Names = tuple[str | None, ...]
"""The logical axis of each dimension of a tensor, or None for a dimension that is never sharded."""


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """A mesh of devices, and the rules that shard tensors over it."""

  mesh: jax.sharding.Mesh
  shape: Mesh
  rules: Rules

  def spec(self, names: Names, shape: Sequence[int], what: str) -> PartitionSpec:
    """The PartitionSpec of a tensor of this shape.

    Raises:
      UserError: If a logical axis is unknown, a mesh axis is used for two dimensions, or a dimension is not divisible
        by its number of shards.
    """
    if len(names) != len(shape):
      raise UserError(f"{what}: {len(names)} logical axes {names} for shape {tuple(shape)}")
    rules = table(self.rules)
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
      raise UserError(f"{what}: no rule for logical axis {unknown[0]!r}; the rules have {', '.join(rules)}")
    named = [(name, size) for name, size in zip(names, shape, strict=True) if name is not None]
    if len(dict(named)) != len(named):
      raise UserError(f"{what}: a logical axis occurs twice in {names}")
    check_dimensions(f"{what} {tuple(shape)}", dict(named), self.rules, self.shape)
    return PartitionSpec(*map(self._entry, names, shape))

  def _entry(self, name: str | None, size: int | None = None) -> str | tuple[str, ...] | None:
    """The entry of one dimension in a PartitionSpec."""
    return _of_axes(axes_of(self.rules, self.shape, name, size)) if name is not None else None

  def sharding(self, names: Names, shape: Sequence[int], what: str) -> NamedSharding:
    """The sharding of a tensor of this shape. See `spec` for errors."""
    return NamedSharding(self.mesh, self.spec(names, shape, what))

  def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of `x` according to the rules. See `spec` for errors."""
    sharding = self.sharding(names, x.shape, "activation " + " x ".join(str(name) for name in names))
    return x if self.mesh.size == 1 else jax.lax.with_sharding_constraint(x, sharding)

  def on_each_device(
    self, function: Callable, inputs: tuple[Any, ...], outputs: Any, exchanging: bool = False
  ) -> Callable:
    """Maps a function over devices (`jax.shard_map`). Each device gets its shard of the arguments.

    Args:
      function: maps arrays to arrays. It must communicate between devices only with the methods below.
      inputs: logical axes of the arguments, with the same structure as the arguments.
      outputs: logical axes of the results, with the same structure as the results.
      exchanging: whether it communicates. If so, JAX does not check that replicated results are equal on all devices,
        because it cannot verify kernels and ragged exchanges.
    """
    if self.mesh.size == 1:
      return function

    def is_names(names: Any) -> bool:
      return isinstance(names, tuple) and all(name is None or isinstance(name, str) for name in names)

    def sharded(*arguments: Any) -> Any:
      what = f"argument of {function.__name__}"
      sizes: dict[str | None, int] = {}

      def own(name: str | None) -> str | tuple[str, ...] | None:
        # Omit axes of one device, along which JAX would treat replicated results as sharded.
        return _of_axes(self.axes(name, sizes.get(name))) if name is not None else None

      def place(names: Names, x: jax.Array) -> PartitionSpec:
        self.spec(names, x.shape, what)  # raises
        sizes.update(zip(names, x.shape, strict=True))
        return PartitionSpec(*map(own, names))

      specs = jax.tree.map(place, inputs, arguments, is_leaf=is_names)
      results = jax.tree.map(lambda names: PartitionSpec(*map(own, names)), outputs, is_leaf=is_names)
      return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=results, check_vma=not exchanging)(
        *arguments
      )

    return sharded

  def axes(self, name: str, size: int | None = None) -> tuple[str, ...]:
    """The mesh axes with more than one device that shard this logical axis (for KV heads, if it has this size)."""
    return tuple(axis for axis in axes_of(self.rules, self.shape, name, size) if self.shape.shape[axis] > 1)

  def index(self, name: str) -> jax.Array:
    """Within `on_each_device`: the index of this device's shard of the logical axis."""
    return jax.lax.axis_index(self.axes(name)) if self.axes(name) else jnp.zeros((), jnp.int32)

  def gather(self, x: jax.Array, name: str, dimension: int, apart: bool = False) -> jax.Array:
    """Within `on_each_device`: all shards of `x`, gathered along `dimension`, which has this logical axis.

    With `apart`, the shards are gathered as they lie in memory, and then transposed. Otherwise XLA for GPU transposes
    parameters before they are gathered, and keeps that copy of all layers.
    """
    if not self.axes(name):
      return x
    if not apart:
      return jax.lax.all_gather(x, self.axes(name), axis=dimension, tiled=True)
    shards = jax.lax.all_gather(x, self.axes(name))
    return jnp.moveaxis(shards, 0, dimension).reshape(*x.shape[:dimension], -1, *x.shape[dimension + 1 :])

  def send(self, x: jax.Array, name: str, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """Within `on_each_device`: the `x` of the sender in the pair (sender, receiver) whose receiver is this device. The
    devices are numbered by their shards of the logical axis. Zeros if no pair has this receiver."""
    return jax.lax.ppermute(x, self.axes(name), pairs)

  def sum_over(self, x: jax.Array, *names: str) -> jax.Array:
    """Within `on_each_device`: the sum of `x` over the devices that shard these logical axes."""
    axes = tuple(axis for name in names for axis in self.axes(name))
    return jax.lax.psum(x, axes) if axes else x

  def sum_to_shards(self, x: jax.Array, name: str, dimension: int) -> jax.Array:
    """Within `on_each_device`: reduce-scatter, which leaves each device with its shard of the sum along `dimension`."""
    axes = self.axes(name)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x

  def shards(self, name: str) -> int:
    """The number of shards of this logical axis."""
    return shards(self.rules, self.shape, name)

  @property
  def device(self) -> jax.Device:
    """The first device of the mesh. All devices have the same type."""
    return self.mesh.devices.flat[0]

  @property
  def networks(self) -> str:
    """The network that each mesh axis uses, or an empty string if there is a single process."""
    return networks(self.mesh.devices, MESH_AXES)

  @property
  def platform(self) -> str:
    """The platform of the devices: cpu, gpu or tpu."""
    return self.device.platform

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array that is replicated on all devices."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch(self) -> NamedSharding:
    """The sharding of [B, T] input."""
    return NamedSharding(self.mesh, PartitionSpec(self._entry("batch"), self._entry("sequence")))

  def compute_dtype(self, model: Model) -> jnp.dtype:
    """The dtype of activations: as configured, else float32 on CPU and bfloat16 on other platforms."""
    if model.compute_dtype != "auto":
      return jnp.dtype(model.compute_dtype)
    return jnp.dtype(jnp.float32 if self.platform == "cpu" else jnp.bfloat16)


def make_partitioner(mesh: Mesh, rules: Rules, devices: Sequence[jax.Device] | None = None) -> Partitioner:
  """Makes a partitioner over `devices` (default: all devices of this program). A smaller mesh uses the first of them.

  Raises:
    UserError: If the mesh needs more devices than are present, or the rules are not valid.
  """
  present = devices is None
  devices = list(devices) if devices is not None else present_devices()
  table(rules)
  resolved = mesh.resolve(len(devices))
  if present:
    _check_every_process(resolved, devices)
  shape = tuple(resolved.shape.values())
  one = resolved.size == 1
  array = np.array(devices[:1]).reshape(shape) if one else arrange(devices[: resolved.size], shape)
  return Partitioner(jax.sharding.Mesh(array, MESH_AXES), resolved, rules)


def _check_every_process(mesh: Mesh, devices: Sequence[jax.Device]) -> None:
  """Raises UserError if a process of this program has no device in the mesh."""
  idle = {device.process_index for device in devices} - {device.process_index for device in devices[: mesh.size]}
  if idle:
    raise UserError(
      f"mesh ({mesh}) uses {mesh.size} of {len(devices)} devices, but none of process {min(idle)}; use more devices, "
      "or "
      "start fewer processes"
    )


def present_devices() -> list[jax.Device]:
  """All devices of this program.

  Raises:
    UserError: If no device of the platform in JAX_PLATFORMS is present.
  """
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:  # JAX raises AssertionError if a platform cannot be initialized
    platforms = jax.config.values["jax_platforms"]
    reason = " ".join(str(error).split()) or "its plugin is not installed or finds no device"
    raise UserError(
      f"JAX finds no device of JAX_PLATFORMS={platforms}: {reason}; use another machine, install moejax[tpu] or "
      "moejax[cuda], or unset JAX_PLATFORMS"
    ) from error


@dataclasses.dataclass(frozen=True)
class LocalRows:
  """The rows of a batch that the devices of this process need. Other processes may need some of them as well."""

  rows: Sequence[int]
  """Ascending."""
  batch_size: int
  """Number of rows over all processes."""


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> LocalRows:
  """The rows of a batch [B, T] that this process must read, for any assignment of the mesh to processes."""
  needed: set[int] = set()
  for index in sharding.addressable_devices_indices_map(shape).values():
    if index is not None:
      needed.update(range(*index[0].indices(shape[0])))
  return LocalRows(sorted(needed), shape[0])


def to_devices(arrays: Any, sharding: NamedSharding, local: LocalRows | None = None) -> Any:
  """Moves arrays from the host to the devices, as global arrays.

  Args:
    arrays: pytree of NumPy arrays.
    sharding: sharding of the global arrays.
    local: the rows of the global arrays that `arrays` contains. None if it contains all rows.
  """

  def place(x: np.ndarray) -> jax.Array:
    shape = (local.batch_size if local else len(x), *x.shape[1:])

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # this process has devices of the mesh
      first, end, _ = index[0].indices(shape[0])
      start = bisect.bisect_left(local.rows, first) if local else first
      return x[(slice(start, start + end - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(place, arrays)


def _of_axes(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
  return axes[0] if len(axes) == 1 else axes or None
