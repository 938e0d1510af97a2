"""Answers outlive the process, and half a line that a kill left."""

from moejax.evaluation.answers import Answers


def test_answers_are_known_again_and_only_to_their_own_request(tmp_path):
  path = tmp_path / "deep" / "answers.jsonl"
  answers = Answers(path)
  assert ("loglikelihood", 0, "a") not in answers
  answers.add(("loglikelihood", 0, "a"), [-1.5, True])
  answers.add(("generate_until", 0, "a"), "text\nwith lines")
  again = Answers(path)
  assert again["loglikelihood", 0, "a"] == [-1.5, True]
  assert again["generate_until", 0, "a"] == "text\nwith lines"
  assert ("loglikelihood", 1, "a") not in again


def test_half_a_line_is_dropped_and_the_next_answer_stands_on_its_own(tmp_path):
  path = tmp_path / "answers.jsonl"
  answers = Answers(path)
  for i in range(3):
    answers.add((i,), i)
  path.write_bytes(path.read_bytes()[:-5])
  again = Answers(path)
  assert (1,) in again and (2,) not in again
  again.add((2,), 2)
  assert Answers(path)[2,] == 2


def test_without_a_file_answers_live_in_memory():
  answers = Answers(None)
  answers.add((1,), "x")
  assert answers[1,] == "x"
