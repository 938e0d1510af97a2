"""The benchmarks of decoding run, at tiny sizes. Each checks that its programs compute the same."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "benchmarks"


@pytest.mark.nightly
@pytest.mark.parametrize(
  ("name", "options", "rows"),
  [
    ("decode.py", "--rounds 1 --experts 4 --d-model 16 --d-ff 8 --tokens 1 4", 2),
    ("ds_moe_decode.py", "--layers 1 --prompt 4 --new 3 --rounds 1 --batch 1 2", 4),
    ("hf_decode.py", "--layers 1 --d-model 32 --heads 2 --d-ff 16 --vocab 64 --prompt 4 --new 3 --rounds 1", 6),
  ],
)
def test_a_benchmark_prints_a_row_for_each_measurement(name, options, rows):
  if name == "hf_decode.py":
    pytest.importorskip("transformers", reason="needs transformers")
  done = subprocess.run([sys.executable, HERE / name, *options.split()], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  headed = [line for line in done.stdout.splitlines() if line.split()[:1] not in (["cpu,"], [])]
  assert len(headed) == 1 + rows, done.stdout
