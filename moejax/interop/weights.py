"""Converts between the tensors of a Hugging Face family and the parameters of moejax.

Hugging Face tensors are matrices [outputs, inputs], one per layer and expert. Parameters of moejax have the inputs
first and one dimension per letter of their names, and may be stacked over layers and experts.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config.model import Model
from moejax.errors import UserError
from moejax.interop.families import EMBEDDING, LAYER, OF_MODEL, OUTPUT, Family, Tensor
from moejax.interop.safetensors import TensorFiles
from moejax.models.abstract import AbstractModel, Parameters

Path = tuple[str | int, ...]

COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that are not weights, because they are derived from the configuration."""


@dataclasses.dataclass(frozen=True)
class Part:
  """The part of a parameter that corresponds to one Hugging Face tensor."""

  theirs: str
  index: tuple[int, ...]
  """Where in the stacks of layers and experts that lead the parameter."""
  shape: tuple[int, ...]
  """Of the part."""
  inputs: int | None
  """Leading dimensions of the part that a product sums over, 0 for a bias; None for what is no part of a product."""

  entries: slice | None = None
  """The entries of their last dimension that are the part. None: all."""
  sharing: int = 1
  """Number of parameters that share their last dimension."""
  pairs: int = 0
  """Last dimensions that are stored as pairs, as in `Tensor.pairs`."""

  @property
  def their_shape(self) -> tuple[int, ...]:
    if self.entries:
      return (*self.shape[:-1], self.shape[-1] * self.sharing)
    if self.inputs is None:
      return self.shape
    if self.inputs == 0:
      return (math.prod(self.shape),)
    return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

  def to_theirs(self, ours: np.ndarray) -> np.ndarray:
    """Their tensor, or the entries of it that are the part, from our part."""
    if self.pairs:
      first, second = np.split(ours[..., -self.pairs :], 2, axis=-1)
      paired = np.stack([first, second], axis=-1).reshape(*ours.shape[:-1], self.pairs)
      ours = np.concatenate([ours[..., : -self.pairs], paired], axis=-1)
    return ours if self.inputs is None else ours.reshape(self.their_shape[::-1]).T

  def to_ours(self, theirs: np.ndarray) -> np.ndarray:
    """Our part from their tensor, without a copy where that can be."""
    if self.entries:
      return theirs[..., self.entries]
    ours = theirs if self.inputs is None else theirs.T.reshape(self.shape)
    if self.pairs:
      paired = ours[..., -self.pairs :]
      ours = np.concatenate([ours[..., : -self.pairs], paired[..., 0::2], paired[..., 1::2]], axis=-1)
    return ours


Layout = dict[Path, list[Part]]
"""The parts of each of our parameters, in the order of their index."""


def layout(model: Model, parameters: Parameters, family: Family) -> Layout:
  """Finds the tensors of a family for each parameter.

  Args:
    model: the model.
    parameters: arrays or their shapes.
    family: the family.

  Raises:
    UserError: If the family has no tensor for a parameter.
  """
  found: Layout = {}
  left: list[str] = []
  for path, shape in _shapes(parameters):
    parts = _parts(model, path, shape, family)
    if parts is None:
      left.append(".".join(map(str, path)))
    else:
      found[path] = parts
  if left:
    raise UserError(f"{family.model_type} has no tensor for the parameter {', '.join(left)}")
  return found


def _shapes(tree: Mapping[Any, Any], path: Path = ()) -> Iterator[tuple[Path, tuple[int, ...]]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _shapes(value, (*path, key))
    else:
      yield (*path, key), tuple(value.shape)


def _parts(model: Model, path: Path, shape: tuple[int, ...], family: Family) -> list[Part] | None:
  """The parts of the parameter at `path`, None where the family has none."""
  name = ".".join(map(str, path))
  if path[0] not in ("layers", "leading"):
    return [_part(OF_MODEL[name], (), shape, str(path[-1]))] if name in OF_MODEL else None
  layers, stacked, inner = _layers(model, path)
  name = ".".join(map(str, inner))
  if name not in family.tensors:
    return None
  entry = family.tensors[name]
  tensor = entry if isinstance(entry, Tensor) else Tensor(entry)
  theirs = LAYER + tensor.name
  experts: Sequence[int | None] = range(shape[1 if stacked else 0]) if "{expert}" in theirs else [None]
  return [
    _part(
      theirs.format(layer=layer, expert=expert),
      (*((i,) if stacked else ()), *(() if expert is None else (expert,))),
      shape[(1 if stacked else 0) + (0 if expert is None else 1) :],
      str(path[-1]),
      tensor,
      _rotary_width(model) if tensor.pairs else 0,
    )
    for i, layer in enumerate(layers)
    for expert in experts
  ]


def _layers(model: Model, path: Path) -> tuple[Sequence[int], bool, Path]:
  """The layers that have the parameter at `path`, whether it is a stack of them, and its path within a layer."""
  if path[0] == "leading":
    return [int(path[1])], False, path[2:]
  first, period = model.leading_layers, model.period
  if path[1] == "blocks":
    return range(first + int(path[2]), model.num_layers, period), True, path[3:]
  return [first + int(path[1]) * period + int(path[3])], False, path[4:]


def _rotary_width(model: Model) -> int:
  """Dimensions of a head with a rotary embedding; 0 if no layer has one."""
  rotaries = (layer.rotary(model) for layer in model.attention)
  return next((rotary.width for rotary in rotaries if rotary is not None), 0)


def _part(
  theirs: str,
  index: tuple[int, ...],
  shape: tuple[int, ...],
  ours: str,
  tensor: Tensor | None = None,
  pairs: int = 0,
) -> Part:
  of_product = {"w": 2 if ours.endswith("_NHD") else 1, "b": 0}
  inputs = None if tensor and tensor.as_ours else of_product.get(ours.partition("_")[0])
  entries: slice | None = None
  sharing = 1
  if tensor and tensor.every:
    entries, sharing = slice(tensor.every[0], None, tensor.every[1]), tensor.every[1]
  elif tensor and tensor.half is not None:
    entries, sharing = slice(tensor.half * shape[-1], (tensor.half + 1) * shape[-1]), 2
  return Part(theirs, index, shape, inputs, entries, sharing, pairs)


def check_files(files: TensorFiles, parts: Iterable[Part], tied: bool, ignored: tuple[str, ...] = ()) -> None:
  """Checks that the files have every tensor of a layout, in its shape, and no other.

  Args:
    files: the tensors of the files.
    parts: the required tensors.
    tied: whether the output projection is the embedding, so that the files may contain it twice.
    ignored: how the names of tensors begin that are not imported.

  Raises:
    UserError: If tensors are missing, unused, or have another shape. The message lists them.
  """
  needed = {part.theirs: part.their_shape for part in parts}
  missing = [name for name in needed if name not in files.places]
  if missing:
    raise UserError(f"the files lack {_some(missing)}; they are incomplete or do not match config.json")
  left = [name for name in files.places if name not in needed and not COMPUTED.fullmatch(name)]
  left = [name for name in left if not name.startswith(ignored)]
  if tied and OUTPUT in left and np.array_equal(files.read(OUTPUT), files.read(EMBEDDING)):
    left.remove(OUTPUT)
  if left:
    raise UserError(f"the files have {_some(left)}, which the model of config.json does not use; nothing was imported")
  for name, shape in needed.items():
    if files.shape(name) != shape:
      raise UserError(f"{name} has the shape {files.shape(name)}, but the model needs {shape}")


def read_parameters(
  files: TensorFiles, model: AbstractModel, family: Family, ignored: tuple[str, ...] = ()
) -> Parameters:
  """The parameters of a model on its mesh, each shard read from the files where it belongs. `ignored` is as in
  `check_files`.

  Raises:
    UserError: as `layout` and `check_files`.
  """
  abstract = model.parameters
  places = layout(model.config, abstract, family)
  check_files(files, (part for parts in places.values() for part in parts), model.config.tie_embeddings, ignored)

  def read(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    parts = {part.index: part for part in places[tuple(key.key for key in path)]}

    def shard(index: Any) -> np.ndarray:
      ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
      out = np.empty([len(each) for each in ranges], leaf.dtype)
      stacks = len(next(iter(parts)))
      for at in np.ndindex(*out.shape[:stacks]):
        part = parts[tuple(ranges[i][n] for i, n in enumerate(at))]
        out[at] = part.to_ours(files.read(part.theirs))[index[stacks:]]
      return out

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

  return jax.tree_util.tree_map_with_path(read, abstract)


def tensors_of(places: Layout) -> dict[str, tuple[int, ...]]:
  """The shapes of their tensors by name."""
  return {part.theirs: part.their_shape for parts in places.values() for part in parts}


def arrays_of(places: Layout, parameters: Parameters) -> Iterator[tuple[str, np.ndarray]]:
  """Their tensors, one after the other in the order of `tensors_of`, from our parameters on their devices."""
  sharing: dict[str, list[tuple[Path, Part]]] = {}
  for path, parts in places.items():
    for part in parts:
      sharing.setdefault(part.theirs, []).append((path, part))
  take = jax.jit(lambda array, index: array[tuple(index)] if index else array)

  def theirs(path: Path, part: Part) -> np.ndarray:
    array: Any = parameters
    for key in path:
      array = array[key]
    return part.to_theirs(np.asarray(take(array, part.index)))

  for name, found in sharing.items():
    pieces = [theirs(*piece) for piece in found]
    if found[0][1].entries is None:
      (whole,) = pieces
    else:
      whole = np.empty(found[0][1].their_shape, pieces[0].dtype)
      for (_, part), piece in zip(found, pieces, strict=True):
        whole[..., part.entries] = piece
    yield name, whole


def _some(names: list[str]) -> str:
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
