"""With --compile, the finalists have the step times of their programs, and the others of their kind are scaled."""

import json
import pathlib

import pytest

from moejax import cli

pytestmark = pytest.mark.slow

MINE = pathlib.Path(__file__).parents[1] / "conftest.py"


def test_finalists_are_compiled_and_others_scaled(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  words = [f"{MINE}:dense", f"{MINE}:sparse", "--topology", "cpu:8", "--days", "0.001", "--width", "1", "2"]
  answers = {}
  for name, more in (("formula", []), ("program", ["--compile"])):
    path = tmp_path / f"{name}.json"
    with pytest.raises(SystemExit) as stopped:
      cli.main(["decide", *words, *more, "--json", str(path)])
    assert stopped.value.code == 0
    answers[name] = json.loads(path.read_text())
  before, after = ({one["name"]: one for one in answers[name]["candidates"]} for name in ("formula", "program"))
  assert {one["step_time_source"] for one in before.values()} == {"formula"}
  chosen = answers["program"]
  for name in (chosen["dense"], chosen["moe"]):
    assert after[name]["step_time_source"] == "program"
  for kind in ("dense", "moe"):
    scaled = [one for one in after.values() if one["kind"] == kind and one["step_time_source"] == "formula, scaled"]
    ratios = {one["step_time_s"] / before[one["name"]]["step_time_s"] for one in scaled}
    assert all(ratio != 1 for ratio in ratios)
  assert chosen["step_time_error"]["ratio"] < answers["formula"]["step_time_error"]["ratio"]
