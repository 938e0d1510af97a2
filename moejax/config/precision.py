"""Types of the operands of matrix products, by kind of layer."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.chips import Chip, chip_of
from moejax.errors import UserError

Operands = Literal["compute", "fp8", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
  """Types of the operands of matrix products with weights, in the forward pass and in both products of the backward
  pass. compute: model.compute_dtype. fp8: float8_e4m3fn, and float8_e5m2 for incoming gradients. int8: 8-bit integers.

  Operands are scaled by their largest value in each row and column. Sums are in float32 (fp8) or int32 (int8), and
  parameters stay float32. Routers, norms, softmax, attention scores and the embedding are never rounded to 8 bits.
  """

  attention: Operands = "compute"
  """Projections of attention layers: queries, keys, values and outputs."""
  feed_forward: Operands = "compute"
  """Dense feed-forward layers and shared experts."""
  experts: Operands = "compute"
  """Routed experts."""
  logits: Operands = "compute"
  """The output projection."""

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      checks.one_of(self, field.name, get_args(Operands))


def check_device(precision: Precision, device_kind: str) -> None:
  """Raises UserError if the matrix units of a device lack a type. A device that is not listed may have any type."""
  if chip := chip_of(device_kind):
    check_chip(precision, chip)


def check_chip(precision: Precision, chip: Chip) -> None:
  """Raises UserError if the matrix units of a chip lack a type. CPUs compute all types in float32 instead."""
  present = ("compute", *chip.eight_bits)
  for kind, wanted in dataclasses.asdict(precision).items():
    if wanted not in present and chip.platform != "cpu":
      raise UserError(
        f"model.precision.{kind}={wanted!r}: the matrix units of {chip.name} do not have this type; set it to "
        f"{' or '.join(map(repr, present))}"
      )
