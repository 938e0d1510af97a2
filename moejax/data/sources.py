"""Finds the parts of each entry of data.train or data.validation. Imports neither JAX nor grain, so that errors are
found immediately."""

import glob
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence

from moejax.config.data import SEQIO, STANDARD_LIBRARY, TFDS, Data
from moejax.data.columns import COLUMN_SUFFIXES
from moejax.data.compression import COMPRESSIONS
from moejax.data.documents import READING, SUFFIXES, TEXT_SUFFIXES, Part, Reading, SourceFile, reading_of
from moejax.data.records import RECORD_SUFFIXES
from moejax.data.remote import is_url, list_files
from moejax.data.saved_dataset import of_datasets
from moejax.data.shards import is_packed
from moejax.data.tfds_source import TfdsSplit
from moejax.errors import UserError

_ANY_SUFFIX = (
  f"{', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)} (each also {' or '.join(COMPRESSIONS)}), "
  f"{' or '.join(COLUMN_SUFFIXES)}"
)
_NAME_ONE = f"give a file, a folder, a glob or a URL of {_ANY_SUFFIX}, or {STANDARD_LIBRARY!r}"


def is_text(source: str) -> bool:
  """Whether the source is text instead of packed tokens or a seqio task."""
  return not source.startswith(SEQIO) and not is_packed(source)


def check_sources(data: Data) -> dict[str, tuple[Part, ...]]:
  """Checks every text source and returns its parts. Reads only the first document of files with many documents.

  Raises:
    UserError: If a source is missing or has no readable text, or a file is in both splits. The message gives the source
      and the remedy.
  """
  train, validation = (
    {source: _checked_parts(field, source, data) for source in getattr(data, field) if is_text(source)}
    for field in ("train", "validation")
  )
  places = ({part.place for parts in split.values() for part in parts} for split in (train, validation))
  if both := sorted(set.intersection(*places)):
    raise UserError(
      f"{both[0]} is in data.train and in data.validation ({len(both)} such files), so that validation would measure "
      "memorization; remove it from one of them"
    )
  return train | validation


def check_outside(sources: Sequence[str], directory: pathlib.Path, option: str) -> None:
  """Checks that a directory, which is given by `option`, is not inside a source, since its files would be read as text.

  Raises:
    UserError: If the directory is the folder of a source or inside it.
  """
  here = directory.resolve()
  for source in filter(is_text, filter(None, sources)):
    folder = pathlib.Path(source).expanduser().resolve()
    if folder.is_dir() and here.is_relative_to(folder) and all(map(_visible, here.relative_to(folder).parts)):
      raise UserError(
        f"{option} {directory} is inside the source {source!r}, so its files would be read as text; choose a directory "
        "outside the source"
      )


def documents(source: str, reading: Reading = READING) -> Iterator[str]:
  """Yields the documents of a text source, in the order of its parts.

  Raises:
    UserError: If a part is not found or cannot be read.
  """
  for part in source_parts(source):
    yield from (text for text, _ in part.documents(reading) if isinstance(text, str) and text)


def source_parts(source: str) -> list[Part]:
  """The parts of a text source: files sorted by name, or one split of a dataset.

  Raises:
    UserError: If there are none (see `source_files`).
  """
  return [TfdsSplit(source)] if source.startswith(TFDS) else [*source_files(source)]


def source_files(source: str) -> list[SourceFile]:
  """The files of a source, sorted by name.

  A source is a file, a folder (with its subfolders), a glob (** for any depth), a URL of one of these, or
  python-standard-library. Folders and globs include files with one of SUFFIXES, except hidden files.

  Raises:
    UserError: If there are no files, or no files that can be read as text.
  """
  if source == STANDARD_LIBRARY:
    return _standard_library_files()
  if not source:  # pathlib would interpret it as the current folder
    raise UserError(f"a source is an empty string; {_NAME_ONE}")
  if is_url(source):
    return _remote_files(source)
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    return _local_folder(source, path)
  if path.exists():
    if not path.is_file():
      raise UserError(f"{source!r} is not a regular file; write its content to a file first")
    if not path.name.endswith(SUFFIXES):
      raise UserError(f"file {source!r} is not a supported text file; convert it to {_ANY_SUFFIX}")
    return [SourceFile(path.name, path)]
  if glob.has_magic(source):
    return _glob_files(source, path)
  raise UserError(f"{source!r} does not exist; {_NAME_ONE}")


def _checked_parts(field: str, source: str, data: Data) -> tuple[Part, ...]:
  try:
    parts = source_parts(source)
    if not any(part.size for part in parts):
      raise UserError(
        f"{source!r} is empty"
        + (f" ({len(parts)} files of 0 bytes)" if len(parts) > 1 else "")
        + "; give a source with text"
      )
    for part in parts:
      part.check(reading_of(data))
  except UserError as error:
    raise UserError(f"data.{field}: {error}") from None
  return tuple(parts)


def _remote_files(url: str) -> list[SourceFile]:
  files = of_datasets(
    [
      SourceFile(name, path)
      for name, path in list_files(url)
      if path.name.endswith(SUFFIXES) and all(map(_visible, name.split("/")))
    ]
  )
  if not files:
    raise UserError(f"{url!r} contains no {_ANY_SUFFIX} file; correct the URL")
  return files


def _local_folder(source: str, path: pathlib.Path) -> list[SourceFile]:
  files = of_datasets(
    _folder_files(path, keep_folder=_visible, keep_file=lambda name: _visible(name) and name.endswith(SUFFIXES))
  )
  if not files:
    raise UserError(f"folder {source!r} contains no {_ANY_SUFFIX} file; use another folder")
  return files


def _visible(name: str) -> bool:
  return not name.startswith(".")


def _folder_files(
  root: pathlib.Path, *, keep_folder: Callable[[str], bool], keep_file: Callable[[str], bool]
) -> list[SourceFile]:
  """Files in `root` and its subfolders whose names pass the filters."""
  paths = []
  for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
    folders[:] = filter(keep_folder, folders)
    paths += [pathlib.Path(folder, name) for name in names if keep_file(name)]
  return _by_name(root, paths)


def _raise_unreadable(error: OSError) -> None:
  raise UserError(
    f"folder {error.filename!r} cannot be read ({error.strerror}); make it readable or remove it from the sources"
  )


def _glob_files(source: str, pattern: pathlib.Path) -> list[SourceFile]:
  matches = [pathlib.Path(match) for match in glob.glob(str(pattern), recursive=True)]
  if not matches:
    raise UserError(f"glob {source!r} matches no file; correct the pattern")
  plain = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
  named = [match for match in matches if match.name.endswith(SUFFIXES)]
  files = of_datasets(_by_name(pathlib.Path(*pattern.parts[:plain]), named))
  if not files:
    raise UserError(f"glob {source!r} matches no {_ANY_SUFFIX} file; correct the pattern")
  return files


def _by_name(root: pathlib.Path, paths: list[pathlib.Path]) -> list[SourceFile]:
  """The paths that are files (no folders or broken links), with names relative to `root`, sorted by name."""
  files = [SourceFile(path.relative_to(root).as_posix(), path) for path in set(paths) if path.is_file()]
  return sorted(files, key=lambda file: file.name)


# Files that differ between installations of the same Python version: tests, packages that distributions omit (Debian:
# idlelib, tkinter, ensurepip, distutils, lib2to3), and files that describe the installation.
# fmt: off
_NOT_EVERYWHERE = frozenset((
  "site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test",
  "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo",
))
# fmt: on
_ABOUT_THE_INSTALLATION = ("_sysconfigdata", "_distutils_system_mod", "sitecustomize", "usercustomize")


def _standard_library_files() -> list[SourceFile]:
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  files = _folder_files(
    root,
    keep_folder=lambda name: _visible(name) and name not in _NOT_EVERYWHERE and not name.startswith("config-"),
    keep_file=lambda name: name.endswith(".py") and not name.startswith((".", *_ABOUT_THE_INSTALLATION)),
  )
  if not files:
    raise UserError(
      f"{STANDARD_LIBRARY!r}: this Python has no source files under {str(root)!r}; use a Python that has them, "
      "or give text files"
    )
  # Replace invalid bytes, since an installation may have files that are invalid in their declared encoding.
  return [SourceFile(file.name, file.path, errors="replace") for file in files]
