"""Our dense model under Llama's names and back; that transformers computes the same is in tests/evaluation."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.config import DATA_EXPERT_MODEL, Mesh, Model, MoE
from moejax.errors import UserError
from moejax.inference.blueprint import make_blueprint
from moejax.interop.huggingface import from_llama, llama_config, to_llama
from moejax.partitioning import make_partitioner

SCANNED = Model(num_layers=3, d_model=12, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=20, vocab_size=30)
UNROLLED = dataclasses.replace(SCANNED, layers="unrolled", tie_embeddings=False)


def draw(model):
  blueprint = make_blueprint(model, make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL))
  random = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), blueprint.abstract)


@pytest.mark.parametrize("model", [SCANNED, UNROLLED], ids=["scanned, tied", "unrolled, untied"])
def test_what_is_exported_comes_back_as_it_was(model):
  parameters = draw(model)
  weights = to_llama(model, parameters)
  assert len(weights) == 3 * 9 + (2 if model.tie_embeddings else 3)
  jax.tree.map(np.testing.assert_array_equal, from_llama(model, weights), parameters)


def test_matrices_take_their_inputs_last():
  weights = to_llama(SCANNED, draw(SCANNED))
  shapes = {name.removeprefix("model.layers.0."): array.shape for name, array in weights.items() if ".0." in name}
  assert shapes["self_attn.q_proj.weight"] == (24, 12) and shapes["self_attn.k_proj.weight"] == (12, 12)
  assert shapes["self_attn.o_proj.weight"] == (12, 24) and shapes["mlp.down_proj.weight"] == (12, 20)


@pytest.mark.parametrize(
  "fields", [{"moe": MoE(num_experts=2, experts_per_token=2, d_ff=4)}, {"qk_norm": True}, {"logit_cap": 5.0}], ids=str
)
def test_what_llama_has_not_is_refused(fields):
  with pytest.raises(UserError, match=f"model.{next(iter(fields))}=.*Llama has none"):
    llama_config(dataclasses.replace(SCANNED, **fields), 8)


def test_weights_of_another_model_are_refused():
  weights = to_llama(SCANNED, draw(SCANNED))
  with pytest.raises(UserError, match=r"of another model: lm_head\.weight"):
    from_llama(UNROLLED, weights)
  with pytest.raises(UserError, match=r"embed_tokens\.weight has the shape \(30, 12\) and the model needs \(31, 12\)"):
    from_llama(dataclasses.replace(SCANNED, vocab_size=31), weights)
