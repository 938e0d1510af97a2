import os
import pathlib
import random

import numpy as np
import pytest

from moejax.data.tokenizers import ByteTokenizer, encoded, make_tokenizer
from moejax.errors import UserError


def test_ids_are_the_utf8_bytes_without_specials():
  np.testing.assert_array_equal(ByteTokenizer().encode("aé"), [97, 0xC3, 0xA9])
  assert ByteTokenizer().encode("").shape == (0,)


@pytest.mark.parametrize("text", ["", "plain\n", "naïve — 漢字 🙂", "\0\x7f"])
def test_decode_returns_the_text(text):
  tokenizer = ByteTokenizer()
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_leaves_specials_and_unknown_ids_out_and_survives_half_a_character():
  tokenizer = ByteTokenizer()
  ids = [tokenizer.begin, 104, tokenizer.padding, 105, tokenizer.end, 400, -1]
  assert tokenizer.decode(ids) == "hi"
  assert tokenizer.decode([104, 0xC3]) == "h�"


def test_byte_lengths_count_every_byte_of_the_text_and_nothing_for_specials():
  tokenizer = ByteTokenizer()
  text = "Größe 🙂"
  assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,) == (259,)
  assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())
  assert tokenizer.byte_lengths[[tokenizer.padding, tokenizer.begin, tokenizer.end]].tolist() == [0, 0, 0]
  assert sorted([tokenizer.padding, tokenizer.begin, tokenizer.end]) == [256, 257, 258]


REAL = {
  "mistral_v3_spm.model": ("sentencepiece", 32_768, 1),
  "olmo_gpt-neox-dolma-v1_5.json": ("tokenizers", 50_280, 0),
  "gpt2_tokenizer.json": ("tokenizers", 50_257, 0),
}
"""Tokenizers that others trained: the library of each, its ids, and the bytes that it puts before a text."""


def real(name):
  shared = os.environ.get("MOEJAX_SHARED_DATA")
  if not shared:
    pytest.skip("MOEJAX_SHARED_DATA does not name the folder of real tokenizers")
  pytest.importorskip(REAL[name][0], reason="of the extra `data`")
  return str(pathlib.Path(shared, "tokenizers", name))


@pytest.mark.parametrize("name", REAL)
def test_a_tokenizer_that_others_trained_gives_the_text_back_and_counts_its_bytes(name):
  tokenizer = make_tokenizer(real(name))
  _, size, bytes_before = REAL[name]
  assert tokenizer.vocab_size == size
  text = (pathlib.Path(__file__).read_text() + "naïve — 漢字 🙂 <s> </s> <|endoftext|>\n\n  ") * 3
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) + bytes_before
  assert not {tokenizer.begin, tokenizer.end} & set(ids.tolist())


LONG = {
  "words": "the cat of the house, and größer.\n\n  The mouse!\tEnd" * 300,
  "one letter": "a" * 9000,
  "spaces": "x" + " " * 9000 + "y",
  "line ends": "\n" * 9000 + "x",
  "no spaces": "漢字🙂größer" * 900,
  "everything": "".join(random.Random(0).choices("ab \n\t\rß漢字🙂.,'1", k=9000)),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("name", ["bytes", *REAL])
def test_a_long_text_is_encoded_in_parts_to_the_ids_of_the_whole(name, text, monkeypatch):
  tokenizer = make_tokenizer(name if name == "bytes" else real(name))
  whole = tokenizer.encode(text)
  monkeypatch.setattr("moejax.data.tokenizers._PIECE", 2000)
  parts = list(encoded(tokenizer, text))
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert len(parts) >= 5 or text != LONG["words"]


def test_make_tokenizer_names_what_exists():
  assert make_tokenizer("bytes").vocab_size == 259
  with pytest.raises(UserError, match=r"data\.tokenizer='words' is not one of bytes, a \.model, \.json, \.tiktoken"):
    make_tokenizer("words")
