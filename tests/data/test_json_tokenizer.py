"""Files of the Hugging Face `tokenizers` library."""

import json

import numpy as np
import pytest

from moejax.data.tokenizer_training import train_tokenizer
from moejax.data.tokenizers import encoded, make_tokenizer
from moejax.errors import UserError

tokenizers = pytest.importorskip("tokenizers", reason="of the extra `data`")
TEXT = "the cat of the house is größer than the mouse\n" * 50


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A byte-level BPE with 280 ids."""
  folder = tmp_path_factory.mktemp("tokenizer")
  (folder / "a.txt").write_text(TEXT)
  train_tokenizer([str(folder / "a.txt")], 280, folder / "a.json")
  return folder / "a.json"


@pytest.fixture
def tokenizer(path):
  return make_tokenizer(str(path))


TEXTS = pytest.mark.parametrize(
  "text", ["the cat", "  two  spaces\n\r\n", "漢字 🙂 größer", "<|endoftext|> is text", ""]
)


@TEXTS
def test_encoding_loses_nothing_and_byte_lengths_count_all_of_it(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  assert not {tokenizer.begin, tokenizer.padding} & set(ids.tolist())


def test_a_long_text_is_encoded_in_parts_to_the_ids_of_the_whole(tokenizer, monkeypatch):
  text = "  two  spaces\n\n\n\tand a 漢字 🙂 größer cat, <|endoftext|> of.\n" * 99
  whole = tokenizer.encode(text)
  monkeypatch.setattr("moejax.data.tokenizers._PIECE", 1500)
  parts = list(encoded(tokenizer, text))
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert len(parts) >= 3


def test_specials_are_found_by_their_names_and_are_no_text(tokenizer):
  assert (tokenizer.begin, tokenizer.end, tokenizer.padding, tokenizer.vocab_size) == (0, 0, 1, 280)
  assert tokenizer.byte_lengths[[0, 1]].tolist() == [0, 0] and (tokenizer.byte_lengths[2:] > 0).all()
  assert tokenizer.decode([tokenizer.begin, *tokenizer.encode("the cat"), tokenizer.padding, 999]) == "the cat"


def edited(path, tmp_path, edit):
  content = json.loads(path.read_text())
  edit(content)
  (tmp_path / "edited.json").write_text(json.dumps(content))
  return make_tokenizer(str(tmp_path / "edited.json"))


def test_a_file_without_specials_gets_a_beginning_behind_its_own(path, tmp_path):
  def without_specials(content):
    names = {token["content"] for token in content["added_tokens"]}
    content["added_tokens"] = []
    content["model"]["vocab"] = {name: i for name, i in content["model"]["vocab"].items() if name not in names}

  tokenizer = edited(path, tmp_path, without_specials)
  assert (tokenizer.begin, tokenizer.end, tokenizer.padding, tokenizer.vocab_size) == (280, 280, 280, 281)
  assert tokenizer.decode([280, *tokenizer.encode("the cat")]) == "the cat"


@pytest.mark.parametrize(
  ("bos", "eos", "begin", "end"),
  [
    ("<|mine|>", {"content": "<|im_end|>", "lstrip": False}, 280, 281), (None, "<|im_end|>", 0, 281),
    ("<|mine|>", None, 280, 0), ("<|absent|>", 3, 0, 0), (None, None, 0, 0),
  ],
)  # fmt: skip
def test_a_tokenizer_config_in_the_same_folder_names_the_specials(path, tmp_path, bos, eos, begin, end):
  def with_two_more(content):
    of_file = content["added_tokens"][0]
    content["added_tokens"] += [
      of_file | {"id": 280 + i, "content": name} for i, name in enumerate(("<|mine|>", "<|im_end|>"))
    ]

  plain = edited(path, tmp_path, with_two_more)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
  tokenizer = make_tokenizer(str(tmp_path / "edited.json"))
  assert (tokenizer.begin, tokenizer.end, tokenizer.vocab_size) == (begin, end, 282)
  assert (tokenizer.identity == plain.identity) == ((begin, end) == (0, 0))
  assert not {begin, end} & set(tokenizer.encode("<|mine|> <|im_end|>").tolist())


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_tokenizer_config_that_is_no_object_is_refused(path, tmp_path, content):
  (tmp_path / "tokenizer_config.json").write_text(content)
  with pytest.raises(UserError, match=r"edited\.json' is not a \.json tokenizer"):
    edited(path, tmp_path, lambda content: None)


def test_the_names_of_deepseek_are_known(path, tmp_path):
  def of_deepseek(content):
    names = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
    of_file = content["added_tokens"][0]
    content["added_tokens"] = [of_file | {"id": 280 + i, "content": name} for i, name in enumerate(names)]
    del content["model"]["vocab"]["<|endoftext|>"]

  tokenizer = edited(path, tmp_path, of_deepseek)
  assert tokenizer.end == tokenizer.begin + 1 == tokenizer.vocab_size - 1  # not a token that was added


def test_an_added_token_that_is_no_special_is_text(path, tmp_path):
  def with_spaces(content):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    content["added_tokens"].append({"id": 280, "content": "    ", **plain})

  tokenizer = edited(path, tmp_path, with_spaces)
  ids = tokenizer.encode("a    größer")
  assert 280 in ids and tokenizer.decode(ids) == "a    größer"
  assert tokenizer.byte_lengths[ids].sum() == len("a    größer".encode())


def test_a_post_processor_or_truncation_of_the_file_is_not_applied(path, tmp_path):
  def with_ends(content):
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["post_processor"] = {
      "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
      "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip

  tokenizer = edited(path, tmp_path, with_ends)
  np.testing.assert_array_equal(tokenizer.encode(TEXT), make_tokenizer(str(path)).encode(TEXT))


def test_pieces_that_write_spaces_and_bytes_out_are_counted_too(tmp_path):
  """A Unigram with byte fallback, as converted from SentencePiece."""
  pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], *([f"<0x{i:02X}>", -9.0] for i in range(256))]
  pieces += [["▁", -3.0], ["▁the", -1.0], ["▁cat", -1.0], ["größ", -2.0], ["er", -2.0]]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([tuple(p) for p in pieces], unk_id=0, byte_fallback=True))
  tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  decoders = tokenizers.decoders
  tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  tokenizer.save(str(tmp_path / "unigram.json"))
  made = make_tokenizer(str(tmp_path / "unigram.json"))
  assert (made.begin, made.end) == (1, 2)
  for text in (" the cat größer", " the 🙂\n"):
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert made.byte_lengths[ids].sum() == len(text.encode())


def test_a_file_that_loses_spaces_or_is_none_is_refused(path, tmp_path):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
  tokenizer.save(str(tmp_path / "words.json"))
  with pytest.raises(UserError, match=r"words\.json' is a WordPiece model, which loses spaces; use a"):
    make_tokenizer(str(tmp_path / "words.json"))
  (tmp_path / "none.json").write_text("{}")
  with pytest.raises(UserError, match=r"none\.json' is not a valid tokenizer\.json .*use another file"):
    make_tokenizer(str(tmp_path / "none.json"))
  with pytest.raises(
    UserError, match=r"gone\.json' cannot be read \(No such file or directory\); give a tokenizer file"
  ):
    make_tokenizer(str(tmp_path / "gone.json"))
