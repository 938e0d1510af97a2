"""Tokenizers in tokenizer.json files of the Hugging Face `tokenizers` library."""

import functools
import json
import pathlib
import re

import numpy as np

from moejax.data.sentencepiece_tokenizer import SPACE
from moejax.errors import UserError
from moejax.optional import library

_OF_DEEPSEEK = "<\uff5c{}\u2581of\u2581sentence\uff5c>"
BEGINS = (
  "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", _OF_DEEPSEEK.format("begin"), "<|endoftext|>", "</s>"
)  # fmt: skip
ENDS = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", _OF_DEEPSEEK.format("end"), "<|endoftext|>")
PADDINGS = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>")
"""Names of special tokens in tokenizer files, the most common first."""

CONFIG = "tokenizer_config.json"
"""File that names the special tokens of a tokenizer, as transformers writes it."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class JsonTokenizer:
  """The tokenizer of a file. Its begin-of-text and end-of-text tokens are those of tokenizer_config.json in the same
  folder or, where that is missing, those with a common name. If there is no begin-of-text token, one is added after the
  ids of the file."""

  def __init__(self, path: pathlib.Path, sha256: str):
    tokenizers = library("tokenizers")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no specific exceptions
      raise UserError(
        f"data.tokenizer={str(path)!r} is not a valid tokenizer.json ({error}); use another file"
      ) from None
    self._tokenizer.encode_special_tokens = True  # treat the names of special tokens in a text as text
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._content = json.loads(path.read_text())
    if self._content["model"].get("type") in ("WordPiece", "WordLevel"):
      raise UserError(
        f"data.tokenizer={str(path)!r} is a {self._content['model']['type']} model, which loses spaces; use a "
        "tokenizer of bytes or subwords (BPE, Unigram)"
      )
    self.identity = f"tokenizers: {sha256}"
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1

    def special(names: tuple[str, ...]) -> int | None:
      return next((vocabulary[name] for name in names if name in vocabulary), None)

    named = _named(path.parent / CONFIG)
    begin = special((*named["bos_token"], *BEGINS))
    self.begin = size if begin is None else begin
    self.vocab_size = size + (begin is None)
    end, padding = special((*named["eos_token"], *ENDS)), special(PADDINGS)
    self.end = self.begin if end is None else end
    if (begin, end) != (special(BEGINS), special(ENDS)):
      self.identity += f" begin {self.begin} end {self.end}"
    self.padding = self.end if padding is None else padding

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size, np.int32)
    added = {token["id"]: token for token in self._content.get("added_tokens", ())}
    of_bytes = '"ByteLevel"' in json.dumps([self._content.get("pre_tokenizer"), self._content.get("decoder")])
    for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
      if i in added:
        lengths[i] = 0 if added[i]["special"] else len(token.encode())
      elif of_bytes:
        lengths[i] = len(token)  # each character stands for one byte
      else:
        lengths[i] = 1 if _BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())
    lengths[[self.begin, self.end, self.padding]] = 0
    return lengths

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids: np.ndarray) -> str:
    text = self.byte_lengths > 0
    kept = [i for i in np.asarray(ids).tolist() if 0 <= i < len(text) and text[i]]
    return self._tokenizer.decode(kept, skip_special_tokens=False)


def _named(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
  """The begin-of-text and end-of-text tokens that a tokenizer_config.json names. Empty if it names none.

  Raises:
    ValueError: If the file is not a JSON object.
  """
  content = json.loads(path.read_text()) if path.is_file() else {}
  if not isinstance(content, dict):
    raise ValueError(f"{path} is not a JSON object")
  found: dict[str, tuple[str, ...]] = {}
  for field in ("bos_token", "eos_token"):
    token = content.get(field)
    name = token.get("content") if isinstance(token, dict) else token
    found[field] = (name,) if isinstance(name, str) else ()
  return found
