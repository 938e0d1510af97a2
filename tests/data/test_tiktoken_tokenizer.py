"""Ranks of tiktoken."""

import base64

import numpy as np
import pytest

from moejax.data.tokenizers import make_tokenizer
from moejax.errors import UserError

pytest.importorskip("tiktoken", reason="of the extra `data`")
TOKENS = [bytes([i]) for i in range(256)] + [b"th", b"the", b" c", b" ca", b" cat", b"er"]


def write(path, tokens=TOKENS):
  path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
  return path


@pytest.fixture
def tokenizer(tmp_path):
  return make_tokenizer(str(write(tmp_path / "a.tiktoken")))


def test_texts_are_merged_by_rank(tokenizer):
  assert tokenizer.encode("the cat").tolist() == [257, 260]


@pytest.mark.parametrize("text", ["the cat", "  two  spaces\n\r\n", "漢字 🙂 größer", "<|endoftext|> is text", ""])
def test_encoding_loses_nothing_and_byte_lengths_count_all_of_it(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_specials_follow_the_ranks(tokenizer):
  assert (tokenizer.begin, tokenizer.end, tokenizer.padding, tokenizer.vocab_size) == (262, 263, 263, 264)
  assert tokenizer.byte_lengths[262:].tolist() == [0, 0]
  assert tokenizer.decode([262, 257, 263, 999, -1]) == "the"


def test_a_pattern_beside_the_ranks_splits_the_text_and_is_part_of_the_identity(tokenizer, tmp_path):
  path = write(tmp_path / "b.tiktoken")
  assert make_tokenizer(str(path)).identity == tokenizer.identity
  (tmp_path / "b.pattern").write_text(r"\p{L}| ?\P{L}+" + "\n")
  other = make_tokenizer(str(path))
  assert other.encode("the").tolist() == [ord("t"), ord("h"), ord("e")]
  assert other.identity != tokenizer.identity


def test_changed_ranks_are_read_again(tmp_path):
  path = write(tmp_path / "a.tiktoken")
  first = make_tokenizer(str(path))
  second = make_tokenizer(str(write(path, TOKENS[:-1])))
  assert (first.vocab_size, second.vocab_size) == (264, 263) and first.identity != second.identity


@pytest.mark.parametrize("content", ["", "no ranks at all\n", "YQ== x\n"])
def test_a_file_that_holds_no_ranks_is_named(tmp_path, content):
  (tmp_path / "a.tiktoken").write_text(content)
  with pytest.raises(UserError, match=r"a\.tiktoken' is not a \.tiktoken tokenizer \(.*\); use another file"):
    make_tokenizer(str(tmp_path / "a.tiktoken"))
