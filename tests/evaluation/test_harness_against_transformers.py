"""The same weights under the harness's own `hf` model: the same scores, guesses, texts and results."""
# ruff: noqa: E402  # what is not installed is skipped before it is imported

import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
torch = pytest.importorskip("torch", reason="needs PyTorch")
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval[hf]")
transformers = pytest.importorskip("transformers", reason="needs lm-eval[hf]")
pytest.importorskip("accelerate", reason="needs lm-eval[hf]")
from harness_fixtures import DENSE, write_benchmarks
from inference_fixtures import EIGHT, make
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from moejax.data.tokenizers import ByteTokenizer
from moejax.display import Display
from moejax.evaluation.answers import Answers
from moejax.evaluation.harness import HarnessModel
from moejax.evaluation.task_lookup import TaskFinder
from moejax.interop.configs import config_of
from moejax.interop.families import FAMILIES
from moejax.interop.weights import arrays_of, layout

pytestmark = pytest.mark.nightly  # PyTorch alone is a large download

TEXTS = [
  ("The cat sat on", " the mat"), ("The cat sat on ", "the mat"), ("One", " x"), ("Tabs\t\n", " after spaces"),
  ("", "from nothing"), ("", "y"), ("naïve café, 東京", " naïve 東京 🙂"), ("a " * 40, "and b"), ("q" * 200, " r" * 20),
  ("w " * 31 + "w", "x" * 64), ("short", "z" * 60), ("  ", "only spaces before"),
]  # fmt: skip


def byte_tokenizer():
  """Our ByteTokenizer as transformers has tokenizers."""
  ours = ByteTokenizer()
  # The characters that stand for the 256 bytes in byte-level BPE (GPT-2).
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
  vocabulary = {character: byte for byte, character in characters.items()}
  specials = {"<padding>": ours.padding, "<begin>": ours.begin, "<end>": ours.end}
  made = Tokenizer(models.BPE(vocab={**vocabulary, **specials}, merges=[]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([AddedToken(name, special=True) for name in specials])
  made.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", ours.begin)])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token="<begin>", eos_token="<end>", pad_token="<padding>"
  )


@pytest.fixture(scope="module", params=["one device", "eight devices"])
def ours(request):
  experiment = DENSE if request.param == "one device" else dataclasses.replace(DENSE, mesh=EIGHT)
  abstract, parameters = make(experiment.model, experiment.mesh)
  model = HarnessModel(experiment, abstract, ByteTokenizer(), Display("test", Console(quiet=True)))
  model.take(parameters, 0, Answers(None))
  return model, parameters


@pytest.fixture(scope="module")
def theirs(ours):
  """The harness's model of the same weights; its tokens open with begin as ours do, or not."""
  _, parameters = ours
  ids = ByteTokenizer()
  config = transformers.LlamaConfig(
    **config_of(DENSE.model, DENSE.data.sequence_length),
    bos_token_id=ids.begin, eos_token_id=ids.end, pad_token_id=ids.padding,
  )  # fmt: skip
  llama = transformers.LlamaForCausalLM(config).eval()
  tensors = arrays_of(layout(DENSE.model, parameters, FAMILIES["llama"]), parameters)
  weights = {name: torch.tensor(array) for name, array in tensors}
  missing, unexpected = llama.load_state_dict(weights, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied

  llama.generation_config.suppress_tokens = list(range(ids.vocab_size, DENSE.model.vocab_size))  # as ours does

  def model(add_begin: bool) -> HFLM:
    return HFLM(
      pretrained=llama, tokenizer=byte_tokenizer(), backend="causal", max_length=DENSE.data.sequence_length,
      batch_size=3, device="cpu", add_bos_token=add_begin,
    )  # fmt: skip

  return model


def instances(kind, arguments):
  return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def test_tokens_are_the_same():
  tokenizer = byte_tokenizer()
  for context, continuation in TEXTS:
    text = context + continuation
    expected = ByteTokenizer().encode(text).tolist()
    assert tokenizer.encode(text) == [ByteTokenizer.begin, *expected]
    assert tokenizer.decode(expected) == ByteTokenizer().decode(np.array(expected)) == text


def test_log_likelihoods_and_guesses_are_the_same_with_truncation_and_without_context(ours, theirs):
  model, _ = ours
  # Beside random continuations those that greedy decoding gives, of one and of many tokens.
  starts = [chr(code) + " once" for code in range(65, 85)]
  prompts = [(start, {"until": [], "max_gen_toks": size}) for start in starts for size in (1, 2)]
  texts = model.generate_until(instances("generate_until", prompts))
  greedy = [(start, text) for (start, _), text in zip(prompts, texts, strict=True) if text.isascii() and text.strip()]
  requests = instances("loglikelihood", TEXTS + greedy)
  got, expected = model.loglikelihood(requests), theirs(True).loglikelihood(requests)
  np.testing.assert_allclose([score for score, _ in got], [score for score, _ in expected], atol=1e-4)
  assert [best for _, best in got] == [best for _, best in expected]
  assert {len(text) for _, text in greedy} == {1, 2} and all(best for _, best in got[len(TEXTS) :])
  assert min(score for score, _ in got) < -50


def test_a_continuation_of_nothing_is_certain(ours):
  assert ours[0].loglikelihood(instances("loglikelihood", [("text", ""), ("", "")])) == [(0.0, True)] * 2


def test_rolling_log_likelihoods_are_the_same_whatever_the_length(ours, theirs):
  model, _ = ours
  # Not periodic: of two windows with the same tokens the `hf` model of 0.4.13 scores one at the other's places.
  count = " ".join(map(str, range(90)))
  texts = ["a short text", count[:64], count[:65], count, "é".join(count)]
  requests = instances("loglikelihood_rolling", [(text,) for text in texts])
  got, expected = model.loglikelihood_rolling(requests), theirs(False).loglikelihood_rolling(requests)
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-4)


def test_greedy_texts_are_the_same_and_end_at_the_same_stop(ours, theirs):
  model, _ = ours
  free = [(prompt, {"until": [], "max_gen_toks": 20}) for prompt in ("Hello", "The sun and the moon", "z" * 90, "A b")]
  got = model.generate_until(instances("generate_until", free))
  assert got == theirs(True).generate_until(instances("generate_until", free))
  stop = next(character for text in got for character in text[2:] if character.isascii())
  stopped = [(prompt, {"until": [stop], "max_gen_toks": 20}) for prompt, _ in free]
  cut = model.generate_until(instances("generate_until", stopped))
  assert cut == theirs(True).generate_until(instances("generate_until", stopped))
  assert cut == [text.split(stop)[0] for text in got] != got


def test_whole_benchmarks_have_the_same_results(ours, theirs, tmp_path, monkeypatch):
  monkeypatch.setenv("DISABLE_MULTIPROC", "1")
  names = ["arc_easy", "lambada_openai"]
  manager = TaskFinder(tmp_path / "cache", write_benchmarks(tmp_path / "data"))
  with contextlib.redirect_stdout(sys.stderr):
    results = [
      lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, log_samples=False)["results"]
      for model in (ours[0], theirs(True))
    ]
  for name in names:
    assert results[0][name].keys() == results[1][name].keys() and len(results[0][name]) > 4
    for metric, value in results[1][name].items():
      assert results[0][name][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
