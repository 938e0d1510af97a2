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


def test_an_unknown_tokenizer_names_those_there_are():
  with pytest.raises(UserError, match=r"^data\.tokenizer='sentencepiece' is not one of bytes$"):
    data(tokenizer="sentencepiece")


@pytest.mark.parametrize("fraction", [-0.1, 0.51, float("nan")])
def test_at_most_half_is_held_out(fraction):
  with pytest.raises(UserError, match=rf"^data\.validation_fraction={fraction} must lie between 0\.0 and 0\.5$"):
    data(validation_fraction=fraction)
  assert data(validation_fraction=0.5).validation_fraction == 0.5


def test_no_text_to_train_on_is_refused_with_what_could_be_named():
  with pytest.raises(
    UserError, match=r'^data\.train is empty; name a file, a folder, a glob or "python-standard-library"$'
  ):
    data(train=())


def test_no_text_to_validate_on_is_refused_but_its_own_text_needs_no_fraction():
  with pytest.raises(
    UserError,
    match=r"^data\.validation is empty and data\.validation_fraction=0 holds nothing out; set one of them$",
  ):
    data(validation_fraction=0.0)
  assert data(validation=("held_out.txt",), validation_fraction=0.0).validation == ("held_out.txt",)
