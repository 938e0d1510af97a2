"""Streams in memory."""

import numpy as np
import pytest

from moejax.data.token_stream import TokenStream
from moejax.data.tokenizers import ByteTokenizer


@pytest.fixture
def make_stream():
  """Returns a function from texts, or arrays of ids, to the stream of them as documents."""

  def make(*documents: str | np.ndarray, prefixes: list[int] | None = None) -> TokenStream:
    tokenizer = ByteTokenizer()
    parts = [
      np.r_[tokenizer.begin, tokenizer.encode(document) if isinstance(document, str) else document]
      for document in documents
    ]
    starts = np.cumsum([0, *map(len, parts)])
    given = None if prefixes is None else np.array(prefixes)
    return TokenStream(np.concatenate(parts).astype(np.uint16), starts, tokenizer.padding, given)

  return make
