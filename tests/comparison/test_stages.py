"""Files between the stages of a comparison: what is damaged is not taken for a number."""

import json

import numpy as np
import pytest

from moejax.comparison.measurements import Measurements, Program, Session, Turn
from moejax.comparison.stages import read_baselines, read_measurements, read_result
from moejax.errors import UserError
from moejax.evaluation.held_out import HeldOut
from moejax.files import write_json

BROKEN = [b"", b"null", b"[]", b"7", b"{", b"\x80\xff", b'{"dense": 3}', b'{"dense": {}}', b'"text"', b"[" * 99_999]


def turns_of(*names: str) -> dict[str, list[Turn]]:
  return {name: [Turn((0.5, 0.6)), Turn((0.5, 0.7), dropped_fraction=0.1)] for name in names}


def test_measurements_are_those_of_the_members_and_nothing_else(tmp_path, tiny_suite):
  path, names = tmp_path / "measurements.json", [member.name for member in tiny_suite.members]
  programs = {name: Program(1.0, None) for name in names}
  session = Session("before training", 1e9, turns_of(*names))
  measured = Measurements(programs, (session, Session("after dense", 2e9, turns_of(*names[:2]))))
  write_json(path, measured.to_json())
  assert read_measurements(path, tiny_suite).to_json() == measured.to_json()
  content = json.loads(path.read_text())

  def damaged(change) -> bytes:
    other = json.loads(json.dumps(content))
    change(other)
    return json.dumps(other).encode()

  changes = [
    lambda c: c["programs"].pop("dense"),
    lambda c: c["programs"].update(other=c["programs"]["dense"]),
    lambda c: c["programs"]["dense"].update(peak_flops="fast"),
    lambda c: c.update(sessions=[]),
    lambda c: c["sessions"][0]["turns"].pop("dense"),
    lambda c: c["sessions"][0]["turns"]["dense"].pop(),
    lambda c: c["sessions"][1]["turns"].update(other=[]),
    lambda c: c["sessions"][1].update(at_s=None),
    *(
      lambda c, value=value: c["sessions"][0]["turns"]["dense"][0].update(step_times_s=[value])
      for value in (0.0, -1.0, "0.5", None, True, float("nan"))
    ),
  ]
  for broken in [*BROKEN, *map(damaged, changes)]:
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"measurements\.json is damaged; restore a copy"):
      read_measurements(path, tiny_suite)


def test_damaged_baselines_are_counted_again(tmp_path):
  path, told = tmp_path / "baselines.json", []
  assert read_baselines(path, told.append) is None and not told
  for content in BROKEN:
    path.write_bytes(content)
    assert read_baselines(path, told.append) is None
  assert told == [f"{path} is damaged; the baselines are computed again"] * len(BROKEN)


@pytest.fixture
def run(tmp_path):
  """A run of 7 steps that is at its end."""
  held_out = HeldOut(*(np.array(values) for values in ([3.0, 4.0], [1, 2], [5, 6], [7, 8])))
  held_out.save(tmp_path / "held_out.npz")
  summary = {"steps": 7, "tokens": 70, "train_time_s": 1.0, "tokens_per_s": 70.0, "seed": 0}
  summary |= {f"held_out/{name}": value for name, value in held_out.summary().items()}
  write_json(tmp_path / "summary.json", summary)
  return tmp_path


@pytest.mark.parametrize("name", ["summary.json", "held_out.npz"])
def test_a_run_with_a_damaged_result_is_not_at_its_end(run, name):
  told = []
  found = read_result(run, 7, told.append)
  assert found.summary["held_out/bits_per_byte"] == found.held_out.summary()["bits_per_byte"]
  assert read_result(run, 8, told.append) is None and not told
  path, before = run / name, (run / name).read_bytes()
  for content in [*BROKEN, before[:-40], before.replace(b"7", b"8")]:
    path.write_bytes(content)
    assert read_result(run, 7, told.append) is None or content == before
    assert str(path) in told[-1] and told[-1].endswith("the run is evaluated again")
  path.unlink()
  assert read_result(run, 7, told.append) is None


def test_scores_of_another_evaluation_are_not_taken(run):
  told = []
  summary = json.loads((run / "summary.json").read_text())
  for name in ("bits_per_byte", "accuracy", "accuracy_stderr", "targets"):
    write_json(run / "summary.json", summary | {f"held_out/{name}": summary[f"held_out/{name}"] * 1.01})
    assert read_result(run, 7, told.append) is None and "does not match" in told[-1]
