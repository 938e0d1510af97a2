"""`moejax tokenizer train`."""

import json

import pytest

from moejax.data.tokenizer_training import train_tokenizer
from moejax.data.tokenizers import make_tokenizer, padded_vocab_size
from moejax.errors import UserError

pytest.importorskip("tokenizers", reason="of the extra `data`")


@pytest.fixture
def source(tmp_path):
  lines = (json.dumps({"text": f"number {n} and its neighbor {n + 1}\n", "body": "xyz " * 9}) for n in range(500))
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  return str(tmp_path / "a.jsonl")


def test_frequent_words_become_tokens_and_the_size_is_that_asked_for(source, tmp_path):
  done = []
  size = train_tokenizer([source], 400, tmp_path / "a.json", progress=lambda what, part: done.append(part))
  tokenizer = make_tokenizer(str(tmp_path / "a.json"))
  assert size == tokenizer.vocab_size == 400
  assert len(tokenizer.encode(" neighbor")) == 1 and len(tokenizer.encode("zzqqjj")) == 6
  assert done == sorted(done) and done[-1] == 1.0


def test_outside_a_terminal_the_library_writes_nothing(source, tmp_path, capfd):
  train_tokenizer([source], 400, tmp_path / "a.json")
  assert capfd.readouterr() == ("", "")


def test_the_text_alone_decides(source, tmp_path):
  for name in ("a", "b"):
    train_tokenizer([source], 400, tmp_path / f"{name}.json")
  train_tokenizer([source], 400, tmp_path / "c.json", text_field="body")
  a, b, c = ((tmp_path / f"{name}.json").read_text() for name in "abc")
  assert a == b != c


def test_a_small_text_gives_fewer_ids(tmp_path):
  (tmp_path / "a.txt").write_text("ab ab")
  assert train_tokenizer([str(tmp_path / "a.txt")], 400, tmp_path / "a.json") < 400


def test_what_cannot_be_is_refused(source, tmp_path):
  with pytest.raises(UserError, match=r"a\.model does not end in \.json"):
    train_tokenizer([source], 400, tmp_path / "a.model")
  with pytest.raises(UserError, match=r"vocab_size=257 must be at least 256 bytes \+ 2 special tokens"):
    train_tokenizer([source], 257, tmp_path / "a.json")
  with pytest.raises(UserError, match=r"vocab_size=10,000,000 must be at most 4,194,304"):
    train_tokenizer([source], 10_000_000, tmp_path / "a.json")
  (tmp_path / "empty.txt").touch()
  with pytest.raises(UserError, match=r"empty\.txt: the sources contain no text"):
    train_tokenizer([str(tmp_path / "empty.txt")], 400, tmp_path / "a.json")
  assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("needed", "shards", "padded"), [(259, 1, 384), (384, 1, 384), (385, 4, 512), (513, 4, 1024)])
def test_a_padded_vocabulary_has_room_in_whole_tiles_on_every_shard(needed, shards, padded):
  assert padded_vocab_size(needed, shards) == padded
