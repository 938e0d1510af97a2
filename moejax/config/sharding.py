"""The mesh, and the rules that map logical axes to mesh axes. Every logical axis must have a rule."""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping

from moejax.config import checks
from moejax.errors import UserError

MESH_AXES = ("replica", "data", "expert", "context", "model")

LOGICAL_AXES = (
  # of parameters
  "layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "experts", "expert_embed", "expert_mlp",
  # of activations; heads, mlp, vocab and experts have the same names as in parameters
  "batch", "sequence", "act_embed", "outer", "groups", "group_tokens", "capacity",
)  # fmt: skip

OF_TOKENS = ("sequence", "outer", "groups", "group_tokens")
"""Logical axes along which tokens are counted, without the batch."""

Rules = tuple[tuple[str, tuple[str, ...]], ...]
"""Pairs of a logical axis and the mesh axes that shard it, () for none. If an axis has several, the last one
applies."""

DATA_EXPERT_MODEL: Rules = (
  # Parameters are sharded over data (FSDP) and, outside expert layers, over expert too.
  ("layers", ()),
  ("vocab", ("model",)),
  ("embed", ("data", "expert")),
  ("heads", ("model",)),
  ("kv_heads", ("model",)),
  ("head_dim", ()),
  ("mlp", ("model",)),
  ("experts", ("expert",)),
  ("expert_embed", ("data",)),
  ("expert_mlp", ("model",)),
  ("batch", ("replica", "data", "expert")),
  ("sequence", ("context",)),
  ("act_embed", ("model",)),
  # Table 1 of arXiv 2405.15052: the expert axis shards groups outside the experts and experts inside them, so that
  # each resharding is an all-to-all along the expert axis alone.
  ("outer", ("replica", "data", "context")),
  ("groups", ("expert",)),
  ("group_tokens", ()),
  ("capacity", ()),
)
"""Data-expert-model 3D sharding (arXiv 2405.15052, Table 1), with parameters also sharded over data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
  """Number of devices along each mesh axis."""

  replica: int = 1
  """Number of replicas of the parameters, such as slices connected by the data-center network."""
  data: int | None = None
  """Number of shards of the batch and of the parameters (FSDP). If None, all devices are used."""
  expert: int = 1
  """Number of shards of the experts and, outside expert layers, of the batch (expert parallelism)."""
  context: int = 1
  """Number of shards of each sequence (context parallelism). Attention gathers the keys and values of whole
  sequences."""
  model: int = 1
  """Number of shards of heads and hidden dimensions (tensor parallelism)."""

  def __post_init__(self) -> None:
    checks.positive(self, "replica", "expert", "context", "model")
    if self.data is not None:
      checks.positive(self, "data")

  @property
  def shape(self) -> dict[str, int]:
    """Number of devices by axis, in the order of MESH_AXES. A data axis of None counts as 1."""
    return {name: getattr(self, name) or 1 for name in MESH_AXES}

  @property
  def size(self) -> int:
    """Total number of devices."""
    return math.prod(self.shape.values())

  def resolve(self, device_count: int) -> "Mesh":
    """Returns this mesh with a number instead of None for data, for `device_count` devices.

    Raises:
      UserError: If there are too few devices, or data is None and the mesh cannot use all of them.
    """
    if self.size > device_count:
      raise UserError(f"mesh {self} needs {self.size} devices, but there are {device_count}; lower an axis")
    if self.data is not None:
      return self
    if device_count % self.size:
      raise UserError(f"{device_count} devices are not divisible by mesh {self}; set mesh.data or change another axis")
    return dataclasses.replace(self, data=device_count // self.size)

  def __str__(self) -> str:
    shown = (name for name in MESH_AXES if name != "context" or self.context > 1)
    return " x ".join(f"{name} {getattr(self, name) or '?'}" for name in shown)


@functools.lru_cache
def table(rules: Rules) -> Mapping[str, tuple[str, ...]]:
  """Checks the rules and returns them as a dictionary.

  Raises:
    UserError: If a logical axis or a mesh axis does not exist, or a logical axis has no rule.
  """
  for name, axes in rules:
    if name not in LOGICAL_AXES:
      raise UserError(f"rules: no tensor has a logical axis {name!r}; the logical axes are {', '.join(LOGICAL_AXES)}")
    for axis in axes:
      if axis not in MESH_AXES:
        raise UserError(
          f"rules: {name!r} names an unknown mesh axis {axis!r}; the mesh axes are {', '.join(MESH_AXES)}"
        )
    if len(set(axes)) < len(axes):
      raise UserError(f"rules: {name!r} names a mesh axis twice: {' '.join(axes)}")
  missing = [name for name in LOGICAL_AXES if name not in dict(rules)]
  if missing:
    raise UserError(f"rules: no rule for {', '.join(missing)}; use () for an axis that is not sharded")
  return types.MappingProxyType(dict(rules))


def axes_of(rules: Rules, mesh: Mesh, name: str, size: int | None = None) -> tuple[str, ...]:
  """The mesh axes that shard a dimension with this logical axis.

  Args:
    rules: the rules.
    mesh: the mesh.
    name: the logical axis.
    size: size of the dimension. KV heads are sharded over the first mesh axes of the rule whose product divides their
      number, and replicated over the others, so that a model can have fewer KV heads than the size of the model axis.
  """
  axes = table(rules)[name]
  while name == "kv_heads" and size is not None and size % _devices(mesh, axes):
    axes = axes[:-1]
  return axes


def shards(rules: Rules, mesh: Mesh, name: str, size: int | None = None) -> int:
  """Number of shards of a dimension with this logical axis. The arguments are those of `axes_of`."""
  return _devices(mesh, axes_of(rules, mesh, name, size))


def of_whole_sequences(rules: Rules) -> Rules:
  """The rules without mesh axes that shard sequences, for inference, which computes one token of each."""
  within = table(rules)["sequence"]
  if not within:
    return rules
  kept = {name: tuple(axis for axis in axes if axis not in within) for name, axes in dict(rules).items()}
  return tuple((name, kept[name] if name in OF_TOKENS else axes) for name, axes in dict(rules).items())


def check_dimensions(what: str, dimensions: Mapping[str, int], rules: Rules, mesh: Mesh) -> None:
  """Checks one tensor, given its size by logical axis.

  Raises:
    UserError: If two dimensions are mapped to one mesh axis, or a dimension is not divisible by its mesh axes.
  """
  owner: dict[str, str] = {}
  for name, size in dimensions.items():
    for axis in table(rules)[name]:
      if axis in owner:
        raise UserError(f"{what}: rules map both {owner[axis]!r} and {name!r} to mesh axis {axis!r}")
      owner[axis] = name
    parts = shards(rules, mesh, name, size)
    if size % parts:
      raise UserError(
        f"{what}: {name}={size} is not divisible by the {parts} shards that mesh ({mesh}) gives it "
        f"through {' x '.join(table(rules)[name])}; change one of them"
      )


def _devices(mesh: Mesh, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)
