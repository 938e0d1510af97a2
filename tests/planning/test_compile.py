"""What the compiler says when it finds no room."""

import pytest

from moejax.errors import UserError
from moejax.planning.compile import _shortage


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


def test_any_other_refusal_is_no_shortage():
  with pytest.raises(UserError, match="the compiler rejected the program: INVALID_ARGUMENT"):
    _shortage("INVALID_ARGUMENT: No such compile option")
