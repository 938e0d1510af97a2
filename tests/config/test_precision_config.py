"""8-bit products, by kind of layer: what may be set, and on which chips."""

from dataclasses import replace

import pytest

from moejax.config import MoE, Precision
from moejax.config.chips import CHIPS
from moejax.config.precision import check_chip, check_device
from moejax.errors import UserError

KINDS = ("attention", "feed_forward", "experts", "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_type_is_refused_with_those_that_are_known(kind):
  with pytest.raises(UserError, match=rf"{kind}='fp4' is not one of compute, fp8, int8"):
    Precision(**{kind: "fp4"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_chip_without_the_type_refuses_it_by_name(chip, kind):
  for wanted in ("compute", "fp8", "int8"):
    precision = Precision(**{kind: wanted})
    if wanted == "compute" or wanted in chip.eight_bits or chip.platform == "cpu":
      check_chip(precision, chip)
      continue
    message = rf"^model\.precision\.{kind}='{wanted}': the matrix units of {chip.name} do not have this type; set it"
    with pytest.raises(UserError, match=message + " to 'compute'" + "".join(f" or '{o}'" for o in chip.eight_bits)):
      check_device(precision, chip.device_kinds[0])


def test_a_device_that_is_not_listed_may_have_any_type():
  check_device(Precision(attention="fp8", experts="int8"), "NVIDIA L40S")


def test_what_would_have_no_effect_is_refused(tiny_dense):
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=8, dispatch="einsum")
  sparse = replace(tiny_dense.model, moe=moe)
  experts, dense = Precision(experts="fp8"), Precision(feed_forward="int8")
  for dispatch in ("einsum", "grouped"):
    assert replace(sparse, moe=replace(moe, dispatch=dispatch), precision=experts).precision == experts
  assert replace(tiny_dense.model, precision=dense).precision == dense
  for other in (replace(moe, num_shared_experts=1), replace(moe, every=2)):
    replace(sparse, moe=other, precision=dense)
  for model, precision, message in (
    (tiny_dense.model, experts, "experts='fp8' has no effect without model.moe"),
    (sparse, dense, "feed_forward='int8' has no effect because every layer is sparse"),
  ):
    with pytest.raises(UserError, match=message):
      replace(model, precision=precision)
