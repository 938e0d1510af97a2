"""Contexts and continuations as ids, by every kind of tokenizer, on texts whose joins tokens span."""

import base64
import io
import random

import pytest

from moejax.data.tokenizers import ByteTokenizer, make_tokenizer
from moejax.errors import UserError
from moejax.evaluation.encoding import encode_pair, encode_prompt, encode_text, is_cut

WORDS = ["The answer is", ": hello", " world", "Answer:", " A", "\nB", " größer", "  ", "hello wor", "漢字"]


def bpe(folder):
  tokenizers = pytest.importorskip("tokenizers", reason="of the extra `data`")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=420, show_progress=False, special_tokens=["<|endoftext|>"],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
  )  # fmt: skip
  made.train_from_iterator(["".join(WORDS)] * 50, trainer)  # without words, so that tokens span them
  made.save(str(folder / "a.json"))
  return folder / "a.json"


def tiktoken(folder):
  pytest.importorskip("tiktoken", reason="of the extra `data`")
  tokens = [bytes([i]) for i in range(256)] + [
    b"he",
    b"ll",
    b"hell",
    b"hello",
    b" w",
    b" wo",
    b" wor",
    b"ld",
    b" world",
  ]
  tokens += [b"An", b"Ans", b"we", b"wer", b"Answer", b"Answer:"]
  lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
  (folder / "a.tiktoken").write_bytes(b"".join(lines))
  return folder / "a.tiktoken"


def sentencepiece(folder, **options):
  library = pytest.importorskip("sentencepiece", reason="of the extra `data`")
  model = io.BytesIO()
  library.SentencePieceTrainer.train(
    sentence_iterator=iter(["".join(WORDS).replace("\n", " ")] * 50), model_writer=model, minloglevel=2,
    vocab_size=400, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, split_by_whitespace=False,
    **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options,
  )  # fmt: skip
  (folder / "a.model").write_bytes(model.getvalue())
  return folder / "a.model"


MADE = {
  "bytes": lambda folder: "bytes",
  "bpe": bpe,
  "tiktoken": tiktoken,
  "sentencepiece": lambda folder: sentencepiece(folder, add_dummy_prefix=False),
  "sentencepiece with a prefix": sentencepiece,
}


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request, tmp_path_factory):
  return make_tokenizer(str(MADE[request.param](tmp_path_factory.mktemp("tokenizer"))))


def pairs(seed, count):
  """Texts cut anywhere, so that many a join lies within a token."""
  draw = random.Random(seed)
  for _ in range(count):
    text = "".join(draw.choices(WORDS, k=draw.randint(1, 5)))
    join = draw.randrange(len(text))
    yield text[:join], text[join:]


def test_every_continuation_is_scored_on_tokens_that_are_its_own_or_that_the_harness_takes(tokenizer):
  swallowed = 0
  for context, continuation in pairs(seed=0, count=500):
    context_ids, ids = encode_pair(tokenizer, context, continuation)
    kept = context.rstrip()
    scored = context[len(kept) :] + continuation
    assert context_ids == [tokenizer.begin, *tokenizer.encode(kept)]
    assert ids, (context, continuation)
    joint = tokenizer.encode(context + continuation)[len(context_ids) - 1 :].tolist()  # as the harness's own models
    swallowed += not joint
    # A tokenizer that puts a space before a text may find one there, and its decoder takes one away.
    assert ids == joint if joint else tokenizer.decode(ids).strip() == scored.strip()
  assert swallowed > 10 or isinstance(tokenizer, ByteTokenizer)


def test_nothing_is_scored_of_an_empty_continuation_and_of_an_empty_text_alone(tokenizer):
  for context in ("", "hello", "hello  "):
    assert encode_pair(tokenizer, context, "")[1] == []
  assert encode_text(tokenizer, "") == ([tokenizer.begin], [])
  assert encode_pair(tokenizer, "", "hello")[0] == encode_text(tokenizer, "hello")[0] == [tokenizer.begin]


def test_a_continuation_without_a_token_is_refused(tmp_path):
  path = sentencepiece(tmp_path, remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc")
  with pytest.raises(UserError, match=r"encodes the continuation '\\n' to no tokens"):
    encode_pair(make_tokenizer(str(path)), "hello", "\n")


def test_what_does_not_fit_is_cut_from_the_left_and_known_to_be():
  ids = ByteTokenizer().encode("abcdef").tolist()
  assert encode_prompt(ByteTokenizer(), "abcdef", 7) == ([ByteTokenizer.begin, *ids], False)
  assert encode_prompt(ByteTokenizer(), "abcdef", 6) == (ids, True)
  # The last token of a continuation is predicted and not seen.
  assert [is_cut([0] * context, [0] * 3, 8) for context in (5, 6, 7)] == [False, False, True]
  assert is_cut([0], [0] * 9, 8)


def test_half_a_surrogate_pair_is_the_replacement_character():
  tokenizer = ByteTokenizer()
  assert encode_pair(tokenizer, "a\ud800", "\udc00b") == encode_pair(tokenizer, "a\ufffd", "\ufffdb")
  assert encode_text(tokenizer, "\ud800") == encode_text(tokenizer, "\ufffd")
  assert encode_prompt(tokenizer, "\ud800", 9) == encode_prompt(tokenizer, "\ufffd", 9)
