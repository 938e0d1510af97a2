"""SentencePiece models, trained here on a few lines."""

import io
import random

import numpy as np
import pytest

from moejax.data.tokenizers import encoded, make_tokenizer
from moejax.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece", reason="of the extra `data`")
LINES = [
  f"the {word} of the {other} is größer" for word in ("cat", "dog", "ox") for other in ("house", "mouse", "hill")
]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}


def train(path, lines=LINES, **options):
  model = io.BytesIO()
  defaults = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines * 20), model_writer=model, minloglevel=2, **defaults | options
  )
  path.write_bytes(model.getvalue())
  return make_tokenizer(str(path))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train(tmp_path_factory.mktemp("model") / "a.model", **PLAIN)


@pytest.mark.parametrize(
  "text", ["the cat of the house", "  two  spaces\n and a line", "漢字 🙂 größer", "<s> is text </s>", ""]
)
def test_encoding_loses_nothing_and_byte_lengths_count_all_of_it(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  assert not {tokenizer.begin, tokenizer.end} & set(ids.tolist())


def test_it_uses_its_own_specials_and_they_are_no_text(tokenizer):
  assert (tokenizer.begin, tokenizer.end, tokenizer.padding) == (1, 2, 2)
  assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
  assert tokenizer.byte_lengths[[1, 2]].tolist() == [0, 0]
  ids = tokenizer.encode("the cat")
  assert tokenizer.decode([tokenizer.begin, *ids, tokenizer.end, 10**6, -1]) == "the cat"


def test_a_model_without_a_beginning_gets_one_behind_its_own(tmp_path):
  tokenizer = train(tmp_path / "t5.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **PLAIN)
  size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t5.model")).vocab_size()
  assert (tokenizer.padding, tokenizer.end, tokenizer.begin, tokenizer.vocab_size) == (0, 1, size, size + 1)
  assert tokenizer.decode([tokenizer.begin, *tokenizer.encode("the ox")]) == "the ox"
  assert tokenizer.byte_lengths[tokenizer.begin] == 0


def test_a_space_that_the_model_puts_first_is_the_only_byte_more(tmp_path):
  tokenizer = train(tmp_path / "a.model", **PLAIN | {"add_dummy_prefix": True})
  assert tokenizer.byte_lengths[tokenizer.encode("the cat")].sum() == len("the cat") + 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("spaces", [True, False], ids=["trained with spaces", "without"])
def test_byte_lengths_count_the_bytes_of_the_text_whatever_pieces_there_are(tmp_path, kind, spaces):
  """A model that saw no space has no piece for it, and writes it as the three bytes of the sign that stands for it."""
  lines = LINES if spaces else [line.replace(" ", "") for line in LINES]
  model = train(tmp_path / "a.model", lines, **PLAIN | {"model_type": kind, "vocab_size": 300})
  assert ("with a space" in model.identity) == (not spaces)
  draw = random.Random(0)
  words = ["the", "cat", " ", "  ", "ß", "漢", "\u2580", "\u2582", "\xc1", "\n", "”"]
  for _ in range(200):
    text = "".join(draw.choices(words, k=draw.randint(0, 9)))
    ids = model.encode(text)
    assert model.byte_lengths[ids].sum() == len(text.encode()), (text, ids)
    assert model.decode(ids) == text and ids.max(initial=0) < model.vocab_size == len(model.byte_lengths)
    assert ids.dtype == np.int32 and not {model.begin, model.end} & set(ids.tolist())


def test_another_model_has_another_identity(tokenizer, tmp_path):
  assert train(tmp_path / "b.model", **PLAIN | {"vocab_size": 310}).identity != tokenizer.identity
  assert train(tmp_path / "c.model", **PLAIN).identity == tokenizer.identity


def test_a_file_that_is_no_model_is_named(tmp_path):
  (tmp_path / "a.model").write_text("no model")
  with pytest.raises(UserError, match=r"data\.tokenizer='.*a\.model' is not a \.model tokenizer .*use another file"):
    make_tokenizer(str(tmp_path / "a.model"))


WITH_SPACE = PLAIN | {"add_dummy_prefix": True}


@pytest.mark.parametrize("options", [PLAIN, WITH_SPACE, {}, {"model_type": "unigram", "vocab_size": 300}])
def test_a_long_text_is_encoded_in_parts_to_the_ids_of_the_whole(tmp_path, options, monkeypatch):
  tokenizer = train(tmp_path / "a.model", **options)
  text = "the cat of the  house\n\n is größer\tthan 漢字 a mouse.\n" * 99
  whole = tokenizer.encode(text)
  monkeypatch.setattr("moejax.data.tokenizers._PIECE", 1500)
  parts = list(encoded(tokenizer, text))
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert len(parts) >= 3
