"""Our dense model under Llama's names and back; that transformers computes the same is in tests/evaluation."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.config import DATA_EXPERT_MODEL, FeedForward, Mesh, Model, MoE
from moejax.errors import UserError
from moejax.inference.dropless import inference_model
from moejax.interop.huggingface import from_llama, llama_config, to_llama
from moejax.models.feed_forward import FEED_FORWARDS, mlp
from moejax.partitioning import make_partitioner

SCANNED = Model(num_layers=3, d_model=12, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=20, vocab_size=30)
UNROLLED = dataclasses.replace(SCANNED, layers="unrolled", tie_embeddings=False)


def draw(model):
  abstract = inference_model(model, make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL))
  random = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), abstract.parameters)


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


def test_the_rope_theta_is_where_either_version_of_transformers_looks_for_it():
  config = llama_config(dataclasses.replace(SCANNED, rope_theta=500_000.0), 8)
  assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherMLP(FeedForward, kind="test_other_mlp"):
  """A layer of the user's, whose parameters have the names of moejax's own."""


@pytest.fixture(autouse=True)
def other_mlp(monkeypatch):
  monkeypatch.setitem(FEED_FORWARDS, OtherMLP, mlp)


OTHER = {
  "num_layers": 2, "d_model": 16, "num_heads": 6, "num_kv_heads": 4, "head_dim": 4, "d_ff": 28, "vocab_size": 37,
  "tie_embeddings": False, "qk_norm": True, "rope_theta": 20.0, "norm_epsilon": 0.3, "activation": "gelu",
  "attention_experts": 2, "logit_cap": 0.5, "moe": MoE(num_experts=2, experts_per_token=2, d_ff=4),
  "feed_forward": OtherMLP(),
  "compute_dtype": "float32", "gradient_dtype": "compute", "remat": "layer_inputs", "layers": "unrolled",
}  # fmt: skip
"""Each field of Model changed."""


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Model)])
def test_a_changed_field_is_exported_with_every_parameter_or_refused_by_its_name(field):
  model = dataclasses.replace(SCANNED, **{field: OTHER[field]})
  assert getattr(model, field) != getattr(SCANNED, field)
  parameters = draw(model)
  try:
    weights = to_llama(model, parameters)
  except UserError as error:
    assert f"model.{field}={getattr(model, field)!r} cannot be expressed" in str(error)
    for call in (lambda: llama_config(model, 8), lambda: from_llama(model, {})):
      with pytest.raises(UserError, match=f"model.{field}=.*cannot be expressed"):
        call()
  else:
    assert sum(w.size for w in weights.values()) == sum(p.size for p in jax.tree.leaves(parameters))
    jax.tree.map(np.testing.assert_array_equal, from_llama(model, weights), parameters)


@pytest.mark.slow
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Model)])
def test_what_is_exported_computes_the_same_in_transformers(field):
  torch = pytest.importorskip("torch", reason="needs PyTorch")
  transformers = pytest.importorskip("transformers", reason="needs transformers")
  model = dataclasses.replace(SCANNED, **{field: OTHER[field]})
  abstract, parameters = inference_model(model, make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL)), draw(model)
  try:
    config, weights = llama_config(model, 8), to_llama(model, parameters)
  except UserError:
    return  # its message is tested above
  llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
  missing, unexpected = llama.load_state_dict({k: torch.tensor(w) for k, w in weights.items()}, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
  tokens_BT = np.random.default_rng(1).integers(0, model.vocab_size, (2, 8)).astype(np.int32)
  positions_BT = np.broadcast_to(np.arange(8, dtype=np.int32), tokens_BT.shape)
  transformer = abstract.module(parameters)
  x_BTD, _ = transformer(tokens_BT, np.ones_like(tokens_BT), positions_BT)
  logits_MV = transformer.logits(x_BTD.reshape(-1, model.d_model))
  with torch.no_grad():
    expected_BTV = llama(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(logits_MV, expected_BTV.reshape(logits_MV.shape), rtol=1e-3, atol=1e-3)


def test_a_width_that_transformers_refuses_is_refused_before():
  with pytest.raises(UserError, match=r"model\.d_model=12 is not divisible by model\.num_heads=8"):
    llama_config(dataclasses.replace(SCANNED, num_heads=8), 8)


def test_a_parameter_that_is_missing_or_would_be_left_out_is_named():
  parameters = draw(UNROLLED)
  with pytest.raises(UserError, match="no place for the parameter w_logits_DV"):
    to_llama(dataclasses.replace(UNROLLED, tie_embeddings=True), parameters)
  with pytest.raises(UserError, match=r"they have no layers\.3\.blocks\.0\.attention_norm\.scale_D"):
    to_llama(dataclasses.replace(UNROLLED, num_layers=4), parameters)
  with pytest.raises(UserError, match=r"no place for the parameter layers\.2\."):
    to_llama(dataclasses.replace(UNROLLED, num_layers=2), parameters)
  with pytest.raises(UserError, match=r"attention_norm\.scale_D is \(3, 12\) and not \(4, 12\)"):
    to_llama(dataclasses.replace(SCANNED, num_layers=4), draw(SCANNED))
  with pytest.raises(UserError, match=r"embedding_VD is \(30, 12\) and not \(31, 12\)"):
    to_llama(dataclasses.replace(SCANNED, vocab_size=31), draw(SCANNED))


def test_weights_of_another_model_are_refused():
  weights = to_llama(SCANNED, draw(SCANNED))
  with pytest.raises(UserError, match=r"of another model: lm_head\.weight"):
    from_llama(UNROLLED, weights)
  with pytest.raises(UserError, match=r"embed_tokens\.weight has the shape \(30, 12\) and the model needs \(31, 12\)"):
    from_llama(dataclasses.replace(SCANNED, vocab_size=31), weights)
