"""Reads and writes safetensors files: a length, a JSON header, and the bytes. They cannot contain code.

Files are memory-mapped and written tensor by tensor, so that at most one tensor is in memory at a time.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.config.checks import LARGEST_INTEGER
from moejax.errors import UserError
from moejax.files import replacing, write_json

DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
"""Types of weights by the names of the format."""

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes, as the format has it."""


@dataclasses.dataclass(frozen=True)
class TensorFiles:
  """The tensors of all files of a folder."""

  places: Mapping[str, tuple[pathlib.Path, int, np.dtype, tuple[int, ...]]]
  """File, first byte, type and shape of each tensor."""

  def shape(self, name: str) -> tuple[int, ...]:
    return self.places[name][3]

  def read(self, name: str) -> np.ndarray:
    """A tensor as it lies in its file, mapped into memory."""
    path, begin, dtype, shape = self.places[name]
    if not math.prod(shape):
      return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", begin, shape)

  def within(self, prefix: str) -> "TensorFiles":
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    found = {name: place for name, place in self.places.items() if name.startswith(prefix)}
    return TensorFiles({name.removeprefix(prefix): place for name, place in found.items()})


def open_folder(folder: pathlib.Path) -> TensorFiles:
  """The tensors of a model's folder.

  Raises:
    UserError: there are none, a file is damaged, or the index names other tensors than the files have.
  """
  paths = sorted(folder.glob("*.safetensors"))
  indexed = _indexed(folder)
  if indexed:
    paths = sorted({folder / file for file in indexed.values()})
  if not paths:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    raise UserError(
      f"{folder} has no .safetensors file"
      + (f"; {pickled[0]} is a pickle file, which moejax does not load; convert it to safetensors" if pickled else "")
    )
  places: dict[str, tuple[pathlib.Path, int, np.dtype, tuple[int, ...]]] = {}
  for path in paths:
    for name, place in _header(path).items():
      if name in places:
        raise UserError(f"{name} is in both {places[name][0].name} and {path.name}; delete one of them")
      places[name] = (path, *place)
  if indexed and (others := sorted(set(indexed) ^ set(places))):
    raise UserError(f"{folder / INDEX} and the files do not have the same tensors: {_some(others)}; download it again")
  return TensorFiles(places)


def _indexed(folder: pathlib.Path) -> dict[str, str]:
  """The file of each tensor by the folder's index, empty where there is none."""
  path = folder / INDEX
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())["weight_map"]
    if not all(isinstance(file, str) and pathlib.PurePath(file).name == file for file in found.values()):
      raise ValueError("weight_map names files of another folder")
    return found
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{path} is not an index of tensors ({error}); download it again") from None


def _header(path: pathlib.Path) -> dict[str, tuple[int, np.dtype, tuple[int, ...]]]:
  """First byte, type and shape of each tensor of a file, which must fill it."""
  damaged = f"{path} is not a complete safetensors file"
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise UserError(f"{damaged}: its header would have {length} bytes; download it again")
      header = json.loads(file.read(length))
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"{damaged} ({error}); download it again") from None
  places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
  try:
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
      if kind not in DTYPES:
        raise UserError(f"{path}: {name} has dtype={kind}; moejax reads {', '.join(DTYPES)}")
      if not all(type(number) is int and 0 <= number <= LARGEST_INTEGER for number in (*shape, first, last)):
        raise UserError(f"{damaged}: {name} has shape={shape} and data_offsets={[first, last]}; download it again")
      dtype = np.dtype(DTYPES[kind])
      if last - first != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{damaged}: {name} of shape {shape} has {last - first} bytes; download it again")
      places[name] = (8 + length + first, dtype, shape)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"{damaged} ({error!r} in its header); download it again") from None
  end = 8 + length
  for name, (begin, dtype, shape) in sorted(places.items(), key=lambda item: (item[1][0], math.prod(item[1][2]))):
    if begin != end:
      raise UserError(f"{damaged}: {name} begins at byte {begin} instead of {end}; download it again")
    end += math.prod(shape) * dtype.itemsize
  if end != size:
    raise UserError(f"{damaged}: it has {size} bytes instead of {end}; download it again")
  return places


def write_folder(
  folder: pathlib.Path,
  tensors: Sequence[tuple[str, tuple[int, ...]]],
  arrays: Iterator[np.ndarray],
  dtype: str,
  bytes_per_file: int = 5 * 10**9,
) -> None:
  """Writes tensors as one or several files, with an index where they are several.

  Args:
    folder: where.
    tensors: name and shape of each.
    arrays: the tensors in this order, each made when it is its turn.
    dtype: type of all of them, by the format's name.
    bytes_per_file: a file has more only if one tensor has.
  """
  size = np.dtype(DTYPES[dtype]).itemsize
  groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
  filled = 0
  for name, shape in tensors:
    length = math.prod(shape) * size
    if groups[-1] and filled + length > bytes_per_file:
      groups.append([])
      filled = 0
    groups[-1].append((name, shape))
    filled += length
  count = len(groups)
  names = [f"model-{i:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for i in range(1, count + 1)]
  for file, group in zip(names, groups, strict=True):
    _write(folder / file, group, arrays, dtype)
  if count > 1:
    total = sum(math.prod(shape) * size for _, shape in tensors)
    weight_map = {name: file for file, group in zip(names, groups, strict=True) for name, _ in group}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write(
  path: pathlib.Path, tensors: Sequence[tuple[str, tuple[int, ...]]], arrays: Iterator[np.ndarray], dtype: str
) -> None:
  kind = np.dtype(DTYPES[dtype])
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  begin = 0
  for name, shape in tensors:
    end = begin + math.prod(shape) * kind.itemsize
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    begin = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with replacing(path) as part, part.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in tensors:
      array = next(arrays)
      assert array.shape == shape, (name, array.shape, shape)
      file.write(np.ascontiguousarray(_converted(array, kind, name)).tobytes())


def _converted(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  with np.errstate(over="ignore"):
    converted = array.astype(dtype)
  if not np.array_equal(np.isfinite(converted), np.isfinite(array)):
    largest = np.max(np.abs(array[np.isfinite(array)]))
    raise UserError(f"{name} has the value {largest:.6g}, which is too large for {dtype}; use --dtype bfloat16")
  return converted


def _some(names: Sequence[str]) -> str:
  """The first names, and how many more there are."""
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
