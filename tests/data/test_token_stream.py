import numpy as np
import pytest

from moejax.data.token_stream import StreamWriter, open_stream
from moejax.errors import UserError


def write(folder, documents, vocab_size=259):
  with StreamWriter(folder, "train", vocab_size) as writer:
    for document in documents:
      writer.add(np.array([257]), np.array(document))
  return writer


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_what_was_written_is_read_back_in_the_smallest_type(tmp_path, vocab_size, dtype):
  top = vocab_size - 1
  writer = write(tmp_path, [[1, 2, top], [3]], vocab_size)
  stream = open_stream(tmp_path, "train", vocab_size, padding=256)
  assert stream.tokens.dtype == dtype
  assert stream.tokens.tolist() == [257, 1, 2, top, 257, 3]
  assert stream.starts.tolist() == [0, 4, 6]
  assert (len(stream), stream.num_documents) == (6, 2) == (writer.num_tokens, writer.num_documents)


def test_a_slice_knows_the_document_of_each_token(make_stream):
  stream = make_stream("ab", "", "c", "defg")
  documents = np.repeat(np.arange(4), [3, 1, 2, 5])
  for start in range(len(stream)):
    for stop in range(start + 1, len(stream) + 1):
      tokens, of = stream.slice(start, stop)
      assert tokens.dtype == of.dtype == np.int32
      np.testing.assert_array_equal(tokens, stream.tokens[start:stop])
      np.testing.assert_array_equal(of, documents[start:stop])


def test_a_damaged_stream_is_refused(tmp_path):
  write(tmp_path, [[1, 2], [3]])
  path = tmp_path / "train.tokens"
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(UserError, match=r"train stream in .* is damaged \(it has 4 tokens instead of 5\); delete"):
    open_stream(tmp_path, "train", 259, padding=256)
  path.unlink()
  with pytest.raises(UserError, match=r"train stream in .* is damaged .*No such file"):
    open_stream(tmp_path, "train", 259, padding=256)
