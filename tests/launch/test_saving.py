"""What several processes save when one of them, or all, cannot write. The limit on the size of files is that of the
operating system."""

import json
import pathlib
import sys

import pytest
from started import started

SAVING = str(pathlib.Path(__file__).with_name("saving.py"))
FAULTS = [[], [0], [1], [0, 1], [], [1]]
"""For each save, the processes that cannot write it."""


@pytest.mark.slow
def test_a_checkpoint_that_a_process_cannot_write_is_told_and_left_out_and_the_next_is_saved(tmp_path):
  command = [sys.executable, SAVING, str(tmp_path / "checkpoints"), json.dumps(FAULTS)]
  with started(2, 2, command, tmp_path) as both:
    assert [process.wait() for process in both] == [0, 0], both[0].output + both[1].output
  first, second = (json.loads(process.output.splitlines()[-1]) for process in both)
  # All processes agree on the latest checkpoint, and process 0 alone warns.
  assert first["finished"] == second["finished"] == [1, 1, 1, 1, 5, 5]
  assert first["restored"] == second["restored"] == 5 and second["told"] == []
  for text, (step, index, kept) in zip(first["told"], [(2, 0, 1), (3, 1, 1), (4, 0, 1), (6, 1, 5)], strict=True):
    assert text.startswith(f"the checkpoint of step {step} could not be saved: process {index} (host "), text
    assert "File too large; raise the limit" in text and text.endswith(
      f"; the latest checkpoint is that of step {kept}"
    )
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "5"}
  assert "Traceback" not in both[0].output + both[1].output
