"""Splits of TensorFlow datasets as sources, by random access (tfds.data_source) and without TensorFlow."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from moejax.config.data import TFDS
from moejax.data.documents import Document
from moejax.errors import UserError
from moejax.optional import library


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
  """`tfds:NAME@SPLIT`: NAME as tfds.data_source takes it, or the folder of a prepared dataset; SPLIT train by default,
  or any of TFDS's own, as train[:10%]."""

  name: str

  @property
  def place(self) -> str:
    return f"{TFDS}{self._builder.data_path}@{self._split}"

  @property
  def size(self) -> int:
    return int(self._info.num_bytes or len(self._examples))

  @property
  def version(self) -> tuple[int | str, ...]:
    return self._builder.info.full_name, self._split, self._info.num_examples, self.size

  def check(self, text_field: str) -> None:
    next(self.documents(text_field), None)

  def documents(self, text_field: str) -> Iterator[tuple[Document, int]]:
    examples = self._examples
    for i in range(len(examples)):
      example = examples[i]
      if text_field not in example or not isinstance(example[text_field], bytes | str):
        raise UserError(
          f"{self.name!r} has no text {text_field!r} (its features: {', '.join(example)}); set data.text_field"
        )
      text = example[text_field]
      text = text if isinstance(text, str) else text.decode(errors="replace")
      if text:
        yield Document(f"{self._builder.info.full_name}#{self._split}#{i}", text), self.size * (i + 1) // len(examples)

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
        f"{self.name!r} has no split {self._split!r} (its splits: {', '.join(splits)}); name one, or a part of one"
      ) from None

  @functools.cached_property
  def _builder(self) -> Any:
    tfds = library("tensorflow_datasets")
    name = self.name.removeprefix(TFDS).partition("@")[0]
    try:
      if pathlib.Path(name).expanduser().is_dir():
        return tfds.builder_from_directory(str(pathlib.Path(name).expanduser()))
      builder = tfds.builder(name, file_format="array_record")
      builder.download_and_prepare(file_format="array_record")
      return builder
    except Exception as error:  # TFDS raises many kinds: no such dataset, no network, no space
      raise UserError(
        f"{self.name!r} cannot be opened ({_first_line(error)}); name a dataset, or a folder that holds one"
      ) from None

  @functools.cached_property
  def _examples(self) -> Any:
    try:
      return self._builder.as_data_source(split=self._split)
    except Exception as error:
      raise UserError(f"{self.name!r} cannot be read by random access ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]
