"""seqio Tasks and Mixtures as sources, their vocabularies as tokenizers, and our text as Tasks."""

import io
import json
import textwrap

import numpy as np
import pytest

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.mixture import training_mixture
from moejax.data.pipeline import batches_by_step
from moejax.data.seqio_register import register_task
from moejax.data.sources import documents
from moejax.data.text import open_text
from moejax.data.tokenizers import make_tokenizer
from moejax.errors import UserError

pytestmark = pytest.mark.slow
seqio = pytest.importorskip("seqio", reason="of the extra `data`")
sentencepiece = pytest.importorskip("sentencepiece", reason="of the extra `data`")

TASKS = """
  import functools

  import seqio
  import tensorflow as tf

  def source(name, counts):
    def dataset(split, shuffle_files, seed=None):
      numbers = range(counts[split])
      texts = [f"{name} {n} is größer" for n in numbers]
      return tf.data.Dataset.from_tensor_slices({"question": [f"what is {n}?" for n in numbers], "text": texts})
    return seqio.FunctionDataSource(dataset, splits=tuple(counts), num_input_examples=counts)

  vocabulary = seqio.SentencePieceVocabulary(MODEL, extra_ids=10)
  targets = {"targets": seqio.Feature(vocabulary, add_eos=True)}
  both = {"inputs": seqio.Feature(vocabulary), **targets}
  rekey = functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"})
  rekey_both = functools.partial(seqio.preprocessors.rekey, key_map={"inputs": "question", "targets": "text"})
  tokenize, append_eos = seqio.preprocessors.tokenize, seqio.preprocessors.append_eos

  def add(name, counts, preprocessors, output_features):
    seqio.TaskRegistry.add(name, source=source(name[-1], counts), preprocessors=preprocessors,
                           output_features=output_features)

  add("lm_a", {"train": 50, "validation": 5}, [rekey, tokenize, append_eos], targets)
  add("lm_b", {"train": 30, "validation": 5}, [rekey, tokenize], targets)
  add("qa", {"train": 20}, [rekey_both, tokenize, append_eos], both)
  add("bytes_task", {"train": 5}, [rekey, tokenize], {"targets": seqio.Feature(seqio.ByteVocabulary())})
  def halves(dataset, sequence_length):  # as span corruption, which makes inputs of what the sequence length allows
    def cut(example):
      tokens = example["targets"][:sequence_length["inputs"] - 1]
      return {"inputs": tokens[:1], "targets": tokens[1:]}
    return dataset.map(cut)

  def broken(dataset):
    return dataset.map(lambda example: {"targets": tf.strings.to_number(example["targets"])})

  add("corrupted", {"train": 20}, [rekey, tokenize, halves], both)
  add("bound", {"train": 20}, [rekey, tokenize, functools.partial(halves, sequence_length={"inputs": 5})], both)
  add("broken", {"train": 5}, [rekey, broken], targets)
  seqio.MixtureRegistry.add("mixture", [("lm_a", 3.0), ("lm_b", 1.0)])
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
  """A module that registers tasks, as a user's own would."""
  folder = tmp_path_factory.mktemp("tasks")
  lines = [f"{name} {n} is größer than what?" for name in "abcq" for n in range(50)]
  model = io.BytesIO()
  options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "normalization_rule_name": "identity"}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, minloglevel=2, **options,
  )  # fmt: skip
  (folder / "t5.model").write_bytes(model.getvalue())
  program = textwrap.dedent(TASKS).replace("MODEL", repr(str(folder / "t5.model")))
  (folder / "tasks_of_this_test.py").write_text(program)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield "seqio:tasks_of_this_test/"


def corpus_of(module, tmp_path, *names, tokenizer="lm_a", validation=("lm_a@validation",), **fields):
  data = Data(
    train=tuple(module + name for name in names),
    validation=tuple(module + name for name in validation),
    tokenizer=module + tokenizer,
    sequence_length=16,
    **fields,
  )
  return build_corpus(open_text(data), tmp_path / "cache"), data


def documents_of(stream, tokenizer):
  bounds = zip(stream.starts[:-1], stream.starts[1:], strict=True)
  found = [stream.tokens[start:stop] for start, stop in bounds]
  assert {int(tokens[0]) for tokens in found} == {tokenizer.begin}
  return [tokens[1:].tolist() for tokens in found]


def test_a_task_is_materialised_once_with_its_own_preprocessors_and_vocabulary(module, tmp_path):
  corpus, data = corpus_of(module, tmp_path, "lm_a")
  (stream,) = corpus.train
  task = seqio.TaskRegistry.get("lm_a")
  examples = task.get_dataset(split="train", shuffle=False).as_numpy_iterator()
  assert documents_of(stream, corpus.tokenizer) == [example["targets"].tolist() for example in examples]
  assert stream.prefixes is None and corpus.validation.num_documents == 5
  assert corpus.tokenizer.decode(documents_of(stream, corpus.tokenizer)[7]) == "a 7 is größer"
  files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.array_record")}
  again, _ = corpus_of(module, tmp_path, "lm_a")
  assert again.folder == corpus.folder and len(files) == 2
  assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in files.items())
  batch = batches_by_step(training_mixture(corpus, data), data, 4)[3]
  assert batch["tokens"].shape == (4, 16)


def test_of_inputs_and_targets_only_the_targets_are_predicted(module, tmp_path):
  corpus, data = corpus_of(module, tmp_path, "qa", packing="best_fit")
  (stream,) = corpus.train
  examples = list(seqio.TaskRegistry.get("qa").get_dataset(split="train", shuffle=False).as_numpy_iterator())
  assert documents_of(stream, corpus.tokenizer) == [[*example["inputs"], *example["targets"]] for example in examples]
  assert stream.prefixes.tolist() == [len(example["inputs"]) for example in examples]
  (windows,) = training_mixture(corpus, data).windows
  predicted = [
    token for i in range(len(windows)) for token in windows[i]["targets"][windows[i]["weights"] > 0].tolist()
  ]
  assert sorted(predicted) == sorted(token for example in examples for token in example["targets"].tolist())


@pytest.mark.parametrize(("task", "length"), [("corrupted", 3), ("corrupted", 4), ("bound", 3)])
def test_a_preprocessor_that_reads_the_sequence_length_gets_that_of_the_experiment(module, tmp_path, task, length):
  fields = {"tokenizer": module + "lm_a", "validation": (module + "lm_a@validation",), "sequence_length": length}
  for _ in range(2):
    corpus = build_corpus(open_text(Data(train=(module + task,), **fields)), tmp_path / "cache")
  plain = build_corpus(open_text(Data(train=(module + "lm_b",), **fields)), tmp_path / "cache")
  a, b = (documents_of(corpus.train[0], corpus.tokenizer) for corpus in (corpus, plain))
  assert {len(tokens) for tokens in a} == {4 if task == "bound" else length - 1}
  assert corpus.train[0].prefixes.tolist() == [1] * 20
  assert max(map(len, b)) == 4, "what does not read it is not cut"


def test_a_preprocessor_that_fails_is_one_line(module, tmp_path):
  with pytest.raises(UserError, match=r"seqio task 'broken', split 'train', raises \w+: ") as caught:
    corpus_of(module, tmp_path, "broken")
  assert "\n" not in str(caught.value)


def test_a_mixture_is_its_tasks_in_its_own_rates(module, tmp_path):
  corpus, data = corpus_of(module, tmp_path, "mixture")
  assert [stream.num_documents for stream in corpus.train] == [50, 30]
  # Weights are of sequences, rates of examples: as many tokens of each as examples drawn by the rates would have.
  lengths = [len(stream) / stream.num_documents for stream in corpus.train]
  assert lengths[0] > 1.1 * lengths[1]
  examples = [weight / length for weight, length in zip(corpus.weights, lengths, strict=True)]
  assert examples[0] / sum(examples) == pytest.approx(0.75) and sum(corpus.weights) == pytest.approx(1.0)
  mixture = training_mixture(corpus, data)
  rows = np.concatenate([batches_by_step(mixture, data, 8)[step]["tokens"] for step in range(50)])
  b = make_tokenizer(data.tokenizer).encode("b 1")[:1]
  assert 60 <= (rows == b).any(axis=1).sum() <= 140
  weighted, _ = corpus_of(module, tmp_path, "mixture", "qa", weights=(2.0, 1.0))
  assert weighted.weights == (*(2.0 * weight for weight in corpus.weights), 1.0)
  with pytest.raises(UserError, match=r"data\.train has a seqio mixture and other sources; set data\.weights"):
    corpus_of(module, tmp_path, "mixture", "qa")


def test_a_vocabulary_counts_bytes_and_sentinels_are_no_text(module):
  tokenizer = make_tokenizer(module + "mixture")
  text = " a 7 is größer 🙂"
  ids = tokenizer.encode(text)
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  vocabulary = seqio.TaskRegistry.get("lm_a").output_features["targets"].vocabulary
  assert tokenizer.begin == vocabulary.vocab_size == tokenizer.vocab_size - 1
  assert tokenizer.byte_lengths[-11:].tolist() == [0] * 11 and (tokenizer.padding, tokenizer.end) == (0, 1)
  of_bytes = make_tokenizer(module + "bytes_task")
  ids = of_bytes.encode("größer")
  assert of_bytes.byte_lengths[ids].tolist() == [1] * len("größer".encode()) and of_bytes.decode(ids) == "größer"
  assert of_bytes.identity != tokenizer.identity == make_tokenizer(module + "qa").identity


@pytest.mark.parametrize(
  ("name", "message"),
  [
    (
      "seqio:tasks_of_this_test/nothing",
      r"no seqio task or mixture 'nothing' is registered \(registered: bound, broken, bytes_task",
    ),
    ("seqio:no_such_module/lm_a", r"there is no module 'no_such_module'; set PYTHONPATH"),
    ("seqio:tasks_of_this_test/lm_a@test", r"has no split 'test' \(its splits: train, validation\); use one"),
  ],
)
def test_what_is_not_there_says_what_is(module, tmp_path, name, message):
  with pytest.raises(UserError, match=message):
    data = Data(train=(name,), validation=(module + "lm_b",), tokenizer=module + "lm_a", sequence_length=4)
    build_corpus(open_text(data), tmp_path)


def test_another_vocabulary_than_the_tokenizers_is_refused(module, tmp_path):
  with pytest.raises(UserError, match=r"seqio task 'bytes_task' .* set data\.tokenizer to 'seqio:.*/bytes_task'"):
    corpus_of(module, tmp_path, "bytes_task")


def test_our_text_is_a_task_with_the_same_documents_splits_and_tokens(tmp_path):
  (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"größer {n} " * 3}) for n in range(60)))
  data = Data(train=(str(tmp_path / "a.jsonl"),), validation_fraction=0.2, sequence_length=8)
  task = register_task("text_of_this_test", data)
  corpus = build_corpus(open_text(data), tmp_path / "cache")
  for split, stream in (("train", corpus.train[0]), ("validation", corpus.validation)):
    examples = task.get_dataset(split=split, shuffle=False).as_numpy_iterator()
    found = [example["targets"].tolist() for example in examples]
    assert sorted(found) == sorted(documents_of(stream, corpus.tokenizer))
  vocabulary = task.output_features["targets"].vocabulary
  assert vocabulary.decode(vocabulary.encode("größer")) == "größer"
  assert vocabulary.decode_tf(vocabulary.encode_tf("größer")).numpy().decode() == "größer"
  texts = set(documents(data.train[0]))
  assert {vocabulary.decode(document) for document in found} < texts
