"""Tokenizers in files of tiktoken ranks (each line: base64 of the bytes, rank)."""

import base64
import functools
import pathlib

import numpy as np

from moejax.optional import library

# The pattern of cl100k_base, which most files of ranks use. The files do not contain a pattern.
PATTERN = (
  r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
  r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


class TiktokenTokenizer:
  """The ranks as ids, followed by begin and end. A file NAME.pattern next to NAME.tiktoken replaces the pattern that
  splits text."""

  def __init__(self, path: pathlib.Path, sha256: str):
    pattern = path.with_suffix(".pattern")
    split_by = pattern.read_text().rstrip("\n") if pattern.exists() else PATTERN
    # The reader of tiktoken caches files by name and would not notice changes.
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    self._ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if not self._ranks:
      raise ValueError("it contains no ranks")
    self._encoding = library("tiktoken").Encoding(
      path.stem, pat_str=split_by, mergeable_ranks=self._ranks, special_tokens={}
    )
    self.identity = f"tiktoken: {sha256} {split_by}"
    size = max(self._ranks.values()) + 1
    self.begin, self.end, self.vocab_size = size, size + 1, size + 2
    self.padding = self.end

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size, np.int32)
    for token, i in self._ranks.items():
      lengths[i] = len(token)
    return lengths

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._encoding.encode_ordinary(text), np.int32)

  def decode(self, ids: np.ndarray) -> str:
    text = self.byte_lengths > 0
    return self._encoding.decode([i for i in np.asarray(ids).tolist() if 0 <= i < len(text) and text[i]])
