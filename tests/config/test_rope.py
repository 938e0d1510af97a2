"""Scalings of rotary embeddings: against transformers' own, and an effect of every field."""

import dataclasses

import numpy as np
import pytest

from moejax.config import GroupedQuery, Latent, Llama3Scaling, Model, RopeScaling, YarnScaling
from moejax.config.kinds import kinds
from moejax.errors import UserError
from moejax.interop.layer_types import ROPE_TYPES, SCALINGS

BASES = {"none": {}, "linear": {"factor": 4.0}, "llama3": {"factor": 8.0}, "yarn": {"factor": 32.0}}
CHANGED = {
  "factor": 3.0, "low_frequency": 2.0, "high_frequency": 8.0, "original_length": 100, "beta_fast": 16.0,
  "beta_slow": 2.0, "whole_dimensions": False, "attention_factor": 1.5,
}  # fmt: skip
MADE = {name: kind(**BASES[name]) for name, kind in kinds(RopeScaling).items()}
OTHERS = {
  "yarn of gpt-oss": YarnScaling(factor=32.0, whole_dimensions=False),
  "llama3 of Llama 4": Llama3Scaling(factor=16.0, high_frequency=1.0),
}


def test_every_field_of_a_scaling_changes_the_angles():
  for scaling in MADE.values():
    found = {scaling.magnitude, *scaling.multipliers(64, 5e5)}
    for field in dataclasses.fields(scaling):
      other = dataclasses.replace(scaling, **{field.name: CHANGED[field.name]})
      assert {other.magnitude, *other.multipliers(64, 5e5)} != found, field.name


@pytest.mark.parametrize("name", ["linear", "llama3", "llama3 of Llama 4", "yarn", "yarn of gpt-oss"])
def test_the_frequencies_are_those_of_transformers(name):
  rope = pytest.importorskip("transformers.modeling_rope_utils", reason="needs transformers")
  from transformers import LlamaConfig

  scaling = OTHERS.get(name) or MADE[name]
  kind = next(kind for kind, of in ROPE_TYPES.items() if of is type(scaling))
  fields = {theirs: getattr(scaling, ours) for ours, theirs in SCALINGS[type(scaling)].items()}
  given = {field: value for field, value in fields.items() if value is not None}
  config = LlamaConfig(
    head_dim=64, max_position_embeddings=131072, rope_parameters={"rope_type": kind, "rope_theta": 150_000.0, **given}
  )
  theirs, magnitude = rope.ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
  ours = 150_000.0 ** (-np.arange(0, 64, 2) / 64) * np.array(scaling.multipliers(64, 150_000.0))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
  assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
  assert not np.allclose(scaling.multipliers(64, 150_000.0), 1.0)


def test_equal_frequencies_of_llama3_are_a_border_without_a_ramp():
  found = Llama3Scaling(factor=16.0, low_frequency=2.0, high_frequency=2.0, original_length=100).multipliers(64, 5e5)
  rotations = 100 * 5e5 ** (-np.arange(0, 64, 2) / 64) / (2 * np.pi)
  np.testing.assert_array_equal(found, np.where(rotations > 2.0, 1.0, 1 / 16))
  assert len({*found}) == 2


MODEL = Model(num_layers=2, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=8, vocab_size=30)


@pytest.mark.parametrize("kind", [GroupedQuery, Latent])
def test_what_cannot_be_scaled_is_refused(kind):
  yarn = kind(rope_scaling=YarnScaling(factor=4.0))
  with pytest.raises(UserError, match=r"rope_theta=1\.0 must be above 1 with rope_scaling.kind yarn"):
    dataclasses.replace(MODEL, rope_theta=1.0, attention=(yarn,))
  with pytest.raises(UserError, match=r"low_frequency=4\.0 must be at most rope_scaling\.high_frequency"):
    Llama3Scaling(factor=2.0, low_frequency=4.0, high_frequency=3.0)
  with pytest.raises(UserError, match=r"beta_slow=32\.0 must be below"):
    YarnScaling(factor=2.0, beta_slow=32.0)
  with pytest.raises(UserError, match="rope_scaling=yarn would have no effect"):
    GroupedQuery(rotary_embedding=False, rope_scaling=YarnScaling(factor=4.0))
