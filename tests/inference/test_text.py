"""What of a growing text is shown, and where a continuation ends."""

import itertools

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.inference.text import Prompt, _Writer, until, visible


class Letters:
  """Each id is a letter; 0 begins and 1 ends a document."""

  begin, end = 0, 1

  def decode(self, ids):
    return "".join(map(chr, np.asarray(ids)))


def test_a_text_ends_before_the_first_stop_string():
  assert until("one\ntwo STOP three", ("STOP", "\n")) == "one"
  assert until("one", ("STOP",)) == "one" and until("one", ()) == "one"


@pytest.mark.parametrize(
  ("text", "shown"),
  [("a b", "a b"), ("a STO", "a "), ("a S", "a "), ("a STOP b", "a "), ("a S b", "a S b"), ("caf\ufffd", "caf")],
)
def test_nothing_is_shown_that_may_yet_be_taken_back(text, shown):
  assert visible(text, ("STOP",)) == shown


@pytest.mark.parametrize("stop", [("STOP",), ("xx", "OP"), ()])
@pytest.mark.parametrize("text", ["it STOPs here", "a STOSTOP", "xS\ufffdx", "", "STO"])
def test_what_is_shown_only_grows_and_ends_as_the_whole_continuation(text, stop):
  shown = [""]
  writer = _Writer(Letters(), Prompt(text="", stop=stop), 0, lambda i, text: shown.append(text))
  ids = [ord(letter) for letter in text] + [1]
  count = next(n for n in range(1, len(ids) + 1) if writer.is_complete(ids[:n]))
  found, finished = writer.finish(ids[:count])
  assert finished and found == until(text, stop) == shown[-1]
  assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))


def test_a_stop_string_may_not_be_empty():
  with pytest.raises(UserError, match="would end every continuation immediately"):
    Prompt(text="a", stop=("",))
