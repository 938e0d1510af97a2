"""Lines of a batch file: what they ask, what they refuse, and what comes back."""

import json

import pytest

from moejax.errors import UserError
from moejax.inference.batch_file import answers, read_requests
from moejax.inference.text import Continuation


def test_a_line_has_its_own_limit_and_stop_strings_or_those_of_the_command(tmp_path):
  path = tmp_path / "in.jsonl"
  lines = ['\ufeff{"prompt": "a\u2028b", "id": 7}', "", '{"prompt": "", "max_tokens": 3, "stop": "x"}']
  lines.append('{"prompt": "c", "max_tokens": null, "stop": null}\r\n')
  path.write_text("\n".join(lines))
  first, second, third = (request.prompt for request in read_requests(path, 64, ("\n",), 65))
  assert (third.text, third.max_tokens, third.stop) == ("c", 64, ("\n",))
  assert (first.text, first.max_tokens, first.stop) == ("a\u2028b", 64, ("\n",))
  assert (second.text, second.max_tokens, second.stop) == ("", 3, ("x",))


def test_an_answer_has_the_fields_of_its_line_and_what_follows(tmp_path):
  path = tmp_path / "in.jsonl"
  path.write_text('{"prompt": "a", "id": 7}')
  (line,) = answers(read_requests(path, 64, (), 65), [Continuation("b\ud800é", 2, "stop", False)])
  line.encode()
  assert json.loads(line) == {
    "prompt": "a", "id": 7, "text": "b\ufffdé", "tokens": 2, "finish_reason": "stop", "prompt_cut": False,
  }  # fmt: skip


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "is empty"), ('{"prompt": "a"}\n{', "line 2 is not JSON"), ('["a"]', "line 1 has no string"),
    ("[" * 10**5, "line 1 is not JSON"),
    ('{"prompt": 3}', "no string"), ('{"prompt": "a", "max_tokens": 0}', "max_tokens=0 must be"),
    ('{"prompt": "a"}\n{"prompt": "a", "max_tokens": 65}', "line 2: max_tokens=65 must lie between 1 and 64"),
    ('{"prompt": "a", "top_p": 0.5}', "line 1: top_p=0.5 cannot differ by line; use --top-p"),
    ('{"prompt": "a", "max_tokens": true}', "max_tokens=True"), ('{"prompt": "a", "stop": [1]}', r"stop=\[1\] must be"),
    ('{"prompt": "a", "stop": ""}', "line 1: stop='' would end every"), (b"\xff", "cannot be read"),
  ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_its_line(tmp_path, content, message):
  path = tmp_path / "in.jsonl"
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  with pytest.raises(UserError, match=message):
    read_requests(path, 64, (), 65)


def test_a_file_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"--batch-file .* cannot be read \(No such file"):
    read_requests(tmp_path / "none", 64, (), 65)
