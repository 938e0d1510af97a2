"""Declared experiments have as many parameters as the model that transformers makes from their config.json."""
# ruff: noqa: E402  # what is not installed is skipped before it is imported

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from moejax.config import Experiment
from moejax.config.parameters import parameter_counts
from moejax.experiments import EXPERIMENTS
from moejax.interop.configs import config_of

pytestmark = pytest.mark.nightly  # PyTorch alone is a large download


@pytest.mark.parametrize(
  "name",
  [
    "mistral_7b", "mixtral_8x7b", "qwen3_30b_a3b", "qwen3_235b_a22b", "gemma3_12b", "gpt_oss_20b", "gpt_oss_120b",
    "llama4_scout", "llama4_maverick",
  ],
)  # fmt: skip
def test_transformers_counts_the_same_parameters(name):
  made = EXPERIMENTS[name]()
  assert isinstance(made, Experiment)
  fields = config_of(made.model, made.data.sequence_length)
  config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
  with torch.device("meta"):
    theirs = transformers.AutoModelForCausalLM.from_config(config)
  assert sum(weight.numel() for weight in theirs.parameters()) == parameter_counts(made.model).total
