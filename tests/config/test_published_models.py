"""Declared models have as many parameters as published, in total and active."""

import pytest

from moejax.config.parameters import parameter_counts
from moejax.experiments import EXPERIMENTS

PUBLISHED = {
  # Total and active, each with the parameters that the publication leaves out.
  "gemma3_12b": (10_759e6, 10_759e6, lambda model: model.vocab_size * model.d_model),  # report: non-embedding
  "gpt_oss_20b": (20.91e9, 3.61e9, lambda model: 0),
  "gpt_oss_120b": (116.83e9, 5.13e9, lambda model: 0),
  "deepseek_v3": (671.03e9, 37.55e9, lambda model: 0),
  # With the embedding and the output projection again, as its checkpoint has them, 685B.
  "deepseek_v3_mtp": (684.5e9, 40.09e9, lambda model: -2 * model.vocab_size * model.d_model),
  "llama4_scout": (107.77e9, 17.17e9, lambda model: 0),
  "llama4_maverick": (400.71e9, 17.17e9, lambda model: 0),
  "qwen3_30b_a3b": (30.53e9, 3.35e9, lambda model: 0),
  "qwen3_235b_a22b": (235.09e9, 22.19e9, lambda model: 0),
}
LEAVES_EMBEDDING_OUT = ("gpt_oss_20b", "gpt_oss_120b")
"""Their active parameters are those of the output projection, not of the embedding."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_declared_model_has_the_published_parameters(name):
  total, active, left_out = PUBLISHED[name]
  model = EXPERIMENTS[name]().model
  counted = parameter_counts(model)
  table = model.vocab_size * model.d_model if name in LEAVES_EMBEDDING_OUT else 0
  assert counted.total - left_out(model) == pytest.approx(total, rel=0.0005)
  assert counted.active - left_out(model) - table == pytest.approx(active, rel=0.002)
