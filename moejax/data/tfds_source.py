"""Splits of TensorFlow datasets as sources. Datasets in ArrayRecord format are read without TensorFlow."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config.data import TFDS
from moejax.data.damage import Damaged
from moejax.data.documents import Document, Reading, split_each
from moejax.data.records import find_field
from moejax.errors import UserError, reason
from moejax.optional import library


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
  """`tfds:NAME@SPLIT`. NAME is a name for tfds.data_source or the folder of a prepared dataset. SPLIT is any split in
  the syntax of TFDS, such as train[:10%]. The default is train."""

  name: str

  @property
  def place(self) -> str:
    return f"{TFDS}{self._builder.data_path}@{self._split}"

  @property
  def size(self) -> int:
    return int(self._info.num_bytes or self._info.num_examples or 1)

  @property
  def version(self) -> tuple[int | str, ...]:
    return self._builder.info.full_name, self._split, self._info.num_examples, self.size

  def check(self, reading: Reading) -> None:
    next(self.documents(reading), None)

  def documents(self, reading: Reading) -> Iterator[tuple[Document, int]]:
    for text, read in split_each(self._texts(reading.text_field), reading):
      if isinstance(text, Damaged) and reading.on_error == "stop":
        raise text
      yield text, read

  def _texts(self, text_field: str) -> Iterator[tuple[Document, int]]:
    total = max(1, self._info.num_examples)
    for i, example in enumerate(self._examples(), 1):
      try:
        text = find_field(example, text_field)
      except KeyError:
        text = None
      if not isinstance(text, bytes | str):
        raise UserError(
          f"{self.name!r} has no text {text_field!r} (its features: {', '.join(example)}); set data.text_field"
        )
      yield text if isinstance(text, str) else self._decoded(text, i), self.size * i // total

  def _decoded(self, text: bytes, number: int) -> str | Damaged:
    try:
      return text.decode()
    except UnicodeDecodeError as error:
      return Damaged(
        f"{self.name!r} example {number}: byte {text[error.start]:#04x} is not utf-8; prepare it again in UTF-8"
      )

  @property
  def _split(self) -> str:
    return self.name.partition("@")[2] or "train"

  @property
  def _info(self) -> Any:
    splits = self._builder.info.splits
    try:
      return splits[self._split]
    except (KeyError, ValueError):
      raise UserError(
        f"{self.name!r} has no split {self._split!r} (its splits: {', '.join(splits)}); use one of them, or a part of "
        "one"
      ) from None

  @functools.cached_property
  def _builder(self) -> Any:
    tfds = library("tensorflow_datasets")
    name = self.name.removeprefix(TFDS).partition("@")[0]
    try:
      if pathlib.Path(name).expanduser().is_dir():
        return tfds.builder_from_directory(str(pathlib.Path(name).expanduser()))
      if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # of a download, which would fill a log
      builder = tfds.builder(name, file_format="array_record")
      builder.download_and_prepare(file_format="array_record")
      return builder
    except Exception as error:  # TFDS raises many types of exceptions
      raise UserError(
        f"{self.name!r} cannot be opened ({reason(error)}); use a dataset that can be prepared on this machine, "
        "or the folder of a prepared dataset"
      ) from None

  def _examples(self) -> Iterator[Mapping[str, Any]]:
    """The examples, in the order in which they are stored."""
    try:
      if self._builder.info.file_format.value == "array_record":
        source = self._builder.as_data_source(split=self._split)
        return (source[i] for i in range(len(source)))
      library("tensorflow")  # other formats require TensorFlow
      tfds = library("tensorflow_datasets")
      one_by_one = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
      return iter(tfds.as_numpy(self._builder.as_dataset(split=self._split, read_config=one_by_one)))
    except UserError as error:
      raise UserError(f"{self.name!r} is not in ArrayRecord, so TensorFlow must read it: {error}") from None
    except Exception as error:
      raise UserError(f"{self.name!r} cannot be read ({reason(error)}); prepare it again") from None
