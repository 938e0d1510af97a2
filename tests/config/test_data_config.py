"""What text, and what is refused."""

import pytest

from moejax.config import Data
from moejax.errors import UserError


def data(**fields) -> Data:
  return Data(**{"sequence_length": 8, **fields})


def test_by_default_it_is_the_embedded_corpus_with_a_twentieth_held_out():
  assert data().train == ("python-standard-library",)
  assert data().validation == () and data().validation_fraction == 0.05


@pytest.mark.parametrize("name", ["sequence_length", "prefetch"])
@pytest.mark.parametrize("value", [0, -1])
def test_lengths_must_be_above_0(name, value):
  with pytest.raises(UserError, match=rf"^data\.{name}={value} must be above 0$"):
    data(**{name: value})


@pytest.mark.parametrize("name", ["sentencepiece", "gpt2", "meta-llama/Llama-2-7b", ""])
def test_an_unknown_tokenizer_names_those_there_are_and_how_to_get_the_file_of_a_model_on_the_hub(name):
  with pytest.raises(
    UserError,
    match=rf"^data\.tokenizer='{name}' is not one of bytes, a \.model, \.json, \.tiktoken file or seqio:TASK; for a "
    r"model on the Hugging Face Hub, give the path of its tokenizer\.json or tokenizer\.model \(`hf download MODEL",
  ):
    data(tokenizer=name)


def test_a_document_has_at_least_one_character():
  assert data(document_length=1).document_length == 1
  for length in (0, -1):
    with pytest.raises(UserError, match=rf"^data\.document_length={length} must be above 0$"):
      data(document_length=length)


@pytest.mark.parametrize("name", ["bytes", "a/b.model", "tokenizer.json", "cl100k_base.tiktoken", "seqio:tasks/mine"])
def test_a_tokenizer_is_known_by_its_kind_before_its_file_is_looked_for(name):
  assert data(tokenizer=name).tokenizer == name


def test_weights_are_one_for_each_source_and_above_0():
  assert data(train=("a", "b"), weights=(1, 0.5)).weights == (1, 0.5)
  with pytest.raises(UserError, match=r"^data\.weights has 1 numbers for the 2 entries of data\.train; give one"):
    data(train=("a", "b"), weights=(1.0,))
  with pytest.raises(UserError, match=r"^data\.weights=1e-10 is less than 1e-09 of 1\.0"):
    data(train=("a", "b"), weights=(1e-10, 1.0))
  for weight in (0.0, -1.0, float("nan"), float("inf")):
    with pytest.raises(UserError, match=rf"^data\.weights={weight} must be above 0 and finite; to leave a source out"):
      data(train=("a", "b"), weights=(1.0, weight))


def test_an_unknown_packing_names_those_there_are():
  with pytest.raises(UserError, match=r"^data\.packing='first_fit' is not one of concatenate, best_fit$"):
    data(packing="first_fit")


@pytest.mark.parametrize("fraction", [-0.1, 0.51, float("nan")])
def test_at_most_half_is_held_out(fraction):
  with pytest.raises(UserError, match=rf"^data\.validation_fraction={fraction} must lie between 0\.0 and 0\.5$"):
    data(validation_fraction=fraction)
  assert data(validation_fraction=0.5).validation_fraction == 0.5


def test_no_text_to_train_on_is_refused_with_what_could_be_named():
  with pytest.raises(
    UserError, match=r'^data\.train is empty; give a file, a folder, a glob or "python-standard-library"$'
  ):
    data(train=())


def test_no_text_to_validate_on_is_refused_but_its_own_text_needs_no_fraction():
  with pytest.raises(
    UserError,
    match=r"^data\.validation is empty and data\.validation_fraction=0, so no document is held out; set one of them$",
  ):
    data(validation_fraction=0.0)
  assert data(validation=("held_out.txt",), validation_fraction=0.0).validation == ("held_out.txt",)
