"""Logging to Weights & Biases, without a network."""

import json

import pytest

from moejax import cli
from moejax.comparison.wandb_log import run_directories
from moejax.errors import UserError


def test_a_directory_is_a_run_or_a_comparison(tmp_path, write_comparison, comparison):
  with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
    run_directories(tmp_path)
  directory = write_comparison(comparison, ("dense_small",))
  assert [path.name for path in run_directories(directory)] == sorted(
    member["name"] for member in comparison["members"][1:]
  )
  assert run_directories(directory / "runs" / "dense_large") == [directory / "runs" / "dense_large"]


@pytest.mark.slow
def test_an_offline_run_has_the_metrics_the_configuration_and_the_summary(tmp_path, monkeypatch, capsys):
  pytest.importorskip("wandb", reason="needs wandb: pip install -e '.[wandb]'")
  from wandb.proto.wandb_internal_pb2 import Record

  monkeypatch.setenv("WANDB_DIR", str(tmp_path))
  run = tmp_path / "small"
  run.mkdir()
  records = [{"step": 1, "loss": 3.0, "router/load": [[1.0]]}, {"step": 2, "loss": 2.5}, {"step": 2, "held_out/x": 1.5}]
  (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
  (run / "experiment.json").write_text(json.dumps({"name": "small", "model": {"d_model": 48}}))
  (run / "summary.json").write_text(json.dumps({"held_out/bits_per_byte": 2.25}))
  with pytest.raises(SystemExit) as ended:
    cli.main(["wandb", str(run), "--project", "p", "--offline"])
  assert ended.value.code == 0 and capsys.readouterr().out == f"{run}: 2 steps\n"
  (path,) = run.glob("wandb/offline-run-*/*.wandb")
  history, config, summary = [], {}, {}
  for record in map(Record.FromString, stored(path.read_bytes())):
    if record.HasField("history"):
      items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
      history.append({key: value for key, value in items.items() if not key.startswith("_")})
    for item in record.run.config.update:
      config[item.key] = json.loads(item.value_json)
    for item in record.summary.update:
      summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
  assert history == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "held_out/x": 1.5}]
  assert config["model"] == {"d_model": 48}
  assert float(summary["held_out/bits_per_byte"]) == 2.25


def stored(content: bytes):
  """The records of a file of wandb, a log of LevelDB: blocks with parts, each 7 bytes of header and its data."""
  at, whole = 7, b""
  while at + 7 <= len(content):
    if 32768 - at % 32768 < 7:  # the end of a block is padding
      at += 32768 - at % 32768
      continue
    size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
    whole += content[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last part
      yield whole
      whole = b""
