"""What the compiler says when it finds no room."""

import pytest

from moejax.planning.compile import RefusedError, _shortage


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.00T) exceeds "
      "available HBM (95.74G).",
      2**40,
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.50G of "
      "15.75G hbm. Exceeded hbm capacity by 5.75G.",
      int(21.5 * 2**30),
    ),
  ],
)
def test_a_program_without_room_is_a_plan_that_does_not_fit(message, needed):
  assert _shortage(message) == {"total": needed}


@pytest.mark.parametrize(
  "message",
  [
    "INVALID_ARGUMENT: No such compile option",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 16.70M of 16.00M vmem. Exceeded by 720.0K.",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space smem. Used 1.20M of 1.00M smem.",
  ],
)
def test_any_other_refusal_is_no_shortage(message):
  with pytest.raises(RefusedError, match=f"the compiler rejected the program: {message[:20]}"):
    _shortage(message)
