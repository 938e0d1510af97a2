"""Kinds of attention against loops over positions and heads, and decoding with their caches against the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import DATA_EXPERT_MODEL, Attention, GroupedQuery, Latent, Mesh, Model, MoE, Router, YarnScaling
from moejax.config.parameters import flops_per_token, parameter_counts
from moejax.errors import UserError
from moejax.inference.cache import empty_cache, extend
from moejax.inference.dropless import inference_model
from moejax.models.abstract import abstract_model
from moejax.models.attend import Context
from moejax.models.attentions import ATTENTIONS, attention_layer
from moejax.models.rotary import rotary_angles, rotate
from moejax.partitioning import make_partitioner

ONE, EIGHT = Mesh(data=1), Mesh(data=2, expert=2, model=2)
BASE = Model(num_layers=4, d_model=16, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=24, vocab_size=40)
LOCAL = GroupedQuery(window=3, rope_theta=100.0, sinks=True)
MODELS = {
  "five local to one global": dataclasses.replace(BASE, num_layers=6, attention=(LOCAL,) * 5 + (GroupedQuery(),)),
  "sinks in all": dataclasses.replace(
    BASE,
    num_layers=2,
    attention=(dataclasses.replace(LOCAL, output_bias=True), GroupedQuery(sinks=True)),
  ),
  "as Llama 4": dataclasses.replace(
    BASE,
    attention=(
      GroupedQuery(chunk=4, norm_after_rotary=True),
      GroupedQuery(rotary_embedding=False, score_log_scale=0.7, score_log_length=3),
    ),
    moe=MoE(
      num_experts=4,
      experts_per_token=1,
      d_ff=8,
      every=2,
      num_shared_experts=1,
      weights_on="inputs",
      router=Router(scores="sigmoid", renormalize=False),
      dispatch="grouped",
    ),
  ),
  "leading dense layers": dataclasses.replace(
    BASE,
    num_layers=6,
    attention=(GroupedQuery(window=3), GroupedQuery()),
    moe=MoE(num_experts=4, experts_per_token=2, d_ff=8, every=1, leading_dense=2, dispatch="grouped"),
  ),
  "as Gemma 3": dataclasses.replace(
    BASE,
    attention=(LOCAL, GroupedQuery(score_scale=0.8)),
    norm="zero_centered_rms",
    norm_places="both",
    embedding_scale=4.0,
    activation="geglu",
    qk_norm=True,
  ),
  "as gpt-oss": dataclasses.replace(
    BASE,
    num_layers=2,
    norm="layer",
    attention_bias=True,
    attention=(GroupedQuery(sinks=True, output_bias=True, rope_scaling=YarnScaling(factor=4.0, original_length=8)),),
    activation="swiglu_clipped",
    moe=MoE(num_experts=4, experts_per_token=2, d_ff=8, bias=True, dispatch="grouped"),
  ),
  "latent": dataclasses.replace(BASE, num_kv_heads=4, attention=(Latent(kv_rank=8, rotary_dim=4),)),
  "latent, narrow queries": dataclasses.replace(
    BASE, num_kv_heads=4, layers="unrolled", attention=(Latent(kv_rank=8, rotary_dim=4, q_rank=6, value_dim=10),)
  ),
}
B, T = 2, 11
SEGMENTS = np.array([[1] * 6 + [2] * 5, [1] * 9 + [0] * 2])
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], [*range(9), 0, 0]])


def drawn(tree, seed=0):
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), jnp.float32), tree)


def layer_of(config, model):
  partitioner = make_partitioner(ONE, DATA_EXPERT_MODEL, jax.devices()[:1])
  graph, state = nnx.split(nnx.eval_shape(lambda: attention_layer(config, model, partitioner, nnx.Rngs(params=0))))
  return nnx.merge(graph, drawn(nnx.to_pure_dict(state)))


def packed(config, model):
  """Input and context of two packed documents and of one with padding."""
  rotary = config.rotary(model)
  angles = {rotary: rotary_angles(jnp.asarray(POSITIONS), *rotary)} if rotary else {}
  x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, model.d_model)), jnp.float32)
  return x_BTD, Context(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), angles)


def loops(q, k, v, sees, sinks=None):
  """Softmax over the keys that `sees(b, t, s)` allows, head by head; a sink adds to the denominator alone."""
  N, scale = q.shape[2], q.shape[-1] ** -0.5
  out = np.zeros((B, T, N, v.shape[-1]))
  for b, t, n in np.ndindex(B, T, N):
    head = n // (N // k.shape[2])
    seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t] and sees(b, t, s)]
    powers = np.array([np.exp(scale * q[b, t, n] @ k[b, s, head]) for s in seen])
    total = powers.sum() + (np.exp(sinks[n]) if sinks is not None else 0.0)
    out[b, t, n] = sum(p * v[b, s, head] for p, s in zip(powers, seen, strict=True)) / total
  return out


REAL = (SEGMENTS > 0)[..., None]


@pytest.mark.parametrize(
  ("config", "sees"),
  [
    (LOCAL, lambda b, t, s: t - s < 3),
    (GroupedQuery(chunk=4), lambda b, t, s: POSITIONS[b, t] // 4 == POSITIONS[b, s] // 4),
    (GroupedQuery(sinks=True, rotary_embedding=False, output_bias=True), lambda b, t, s: True),
    (
      GroupedQuery(chunk=4, norm_after_rotary=True),
      lambda b, t, s: POSITIONS[b, t] // 4 == POSITIONS[b, s] // 4,
    ),
    (GroupedQuery(rotary_embedding=False, score_log_scale=0.7, score_log_length=3), lambda b, t, s: True),
    (GroupedQuery(window=2**31 - 1), lambda b, t, s: True),
    (GroupedQuery(chunk=2**31 - 1), lambda b, t, s: True),
  ],
  ids=[
    "window and sinks",
    "chunk",
    "sinks",
    "norms after the rotary embedding",
    "scores by position",
    "largest window",
    "largest chunk",
  ],
)
def test_grouped_queries_equal_loops_over_packed_documents(config, sees):
  layer, (x, context) = layer_of(config, BASE), packed(config, BASE)
  q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, w[...]) for w in (layer.w_q_DNH, layer.w_k_DKH, layer.w_v_DKH))
  if context.angles:
    q, k = (rotate(y, context.angles[config.rotary(BASE)]) for y in (q, k))
  if config.norm_after_rotary:
    q, k = (y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-5) for y in map(np.asarray, (q, k)))
  if config.score_log_scale:
    q = q * (1 + 0.7 * np.log(1 + (POSITIONS + 1) // 3))[..., None, None]
  sinks = None if layer.sinks_N is None else np.asarray(layer.sinks_N[...])
  out = np.einsum("BTNH,NHD->BTD", loops(*map(np.asarray, (q, k, v)), sees, sinks), layer.w_out_NHD[...])
  out += 0 if layer.b_out_D is None else np.asarray(layer.b_out_D[...])
  np.testing.assert_allclose(jax.jit(lambda x_BTD: layer(x_BTD, context)[0])(x) * REAL, out * REAL, atol=1e-5)


def test_latent_attention_equals_loops_with_whole_keys_and_values():
  config, model = MODELS["latent, narrow queries"].attention[0], MODELS["latent, narrow queries"]
  layer, (x, context) = layer_of(config, model), packed(config, model)
  angles = context.angles[config.rotary(model)]
  x_ = np.asarray(x)

  def normed(y, norm):
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(norm.scale_D[...])

  w_down, w_up, w_kv_down, w_kv_up = (
    np.asarray(w[...]) for w in (layer.w_q_down_DX, layer.w_q_up_XNH, layer.w_kv_down_DX, layer.w_kv_up_XNH)
  )
  q = np.einsum("BTR,RNH->BTNH", normed(x_ @ w_down, layer.q_norm), w_up)
  down = x_ @ w_kv_down
  both = np.einsum("BTR,RNH->BTNH", normed(down[..., :8], layer.kv_norm), w_kv_up)
  shared = np.broadcast_to(rotate(jnp.asarray(down[:, :, None, 8:]), angles), (B, T, 4, 4))
  q = np.concatenate([q[..., :6], rotate(jnp.asarray(q[..., 6:]), angles)], -1)
  k = np.concatenate([both[..., :6], shared], -1)
  out = np.einsum("BTNH,NHD->BTD", loops(q, k, both[..., 6:], lambda b, t, s: True), layer.w_out_NHD[...])
  np.testing.assert_allclose(jax.jit(lambda x_BTD: layer(x_BTD, context)[0])(x) * REAL, out * REAL, atol=1e-5)


FAST = ("sinks in all", "as Llama 4", "latent")
ALIKE = ("five local to one global", "leading dense layers", "as Gemma 3", "latent, narrow queries")
"""On eight devices, their caches and experts are placed as those of FAST."""
TOKENS_BT = np.random.default_rng(0).integers(0, 40, (4, 10)).astype(np.int32)


def placed(name, mesh):
  return inference_model(MODELS[name], make_partitioner(mesh, DATA_EXPERT_MODEL, jax.devices()[: mesh.size]))


def numbers(name):
  return drawn(placed(name, ONE).parameters)


@functools.cache
def whole(name):
  """The forward pass over all tokens at once, on one device."""
  abstract = placed(name, ONE)

  @jax.jit
  def run(parameters):
    positions_BT = jnp.broadcast_to(jnp.arange(10), TOKENS_BT.shape)
    return abstract.module(parameters)(TOKENS_BT, jnp.ones_like(TOKENS_BT), positions_BT)[0]

  return np.asarray(run(numbers(name)))


def marks(name, mesh):
  if mesh == EIGHT and name in ALIKE:
    return pytest.mark.nightly
  return () if mesh == ONE and name in FAST else pytest.mark.slow


@pytest.mark.parametrize(
  ("name", "mesh"),
  [pytest.param(name, mesh, marks=marks(name, mesh)) for mesh in (ONE, EIGHT) for name in MODELS],
  ids=str,
)
def test_decoding_equals_the_whole_forward_pass_on_every_mesh(name, mesh):
  abstract = placed(name, mesh)
  parameters = jax.device_put(numbers(name), abstract.shardings)
  step = jax.jit(lambda parameters, tokens, counts, cache: extend(abstract.module(parameters), tokens, counts, cache))
  cache, pieces = empty_cache(abstract, 4, 12), []
  for start, end in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
    counts_B = np.full(4, end - start, np.int32)
    x_BTD, cache = step(parameters, TOKENS_BT[:, start:end], counts_B, cache)
    pieces.append(x_BTD)
  np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole(name), atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_counted(name):
  abstract = abstract_model(MODELS[name], make_partitioner(ONE, DATA_EXPERT_MODEL, jax.devices()[:1]))
  assert sum(leaf.size for leaf in jax.tree.leaves(abstract.parameters)) == parameter_counts(MODELS[name]).total


def test_scores_cost_as_many_flops_as_a_token_sees_keys():
  def of_scores(*attention, **fields):
    model = dataclasses.replace(BASE, attention=attention, **fields)
    matrices = sum(each.matrix_parameters(model) for each in attention) * 4 // len(attention)
    return flops_per_token(model, 100) - 6 * (matrices + 4 * 3 * 16 * 24 + 16 * 40)

  assert of_scores(GroupedQuery()) == 12 * 4 * 4 * 6 * 100
  assert of_scores(GroupedQuery(window=8), GroupedQuery()) == 12 * 2 * 4 * 6 * (100 + 8)
  assert of_scores(GroupedQuery(chunk=8, sinks=True)) == 12 * 4 * 4 * 6 * 8
  latent = Latent(kv_rank=8, rotary_dim=4, value_dim=10)
  assert of_scores(latent, num_kv_heads=4) == 6 * 4 * 4 * (6 + 4 + 10) * 100


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"attention": ()}, "has no layers"),
    ({"attention": ("latent",)}, r"model\.num_kv_heads=2 must be model\.num_heads=4"),
    ({"attention": ("latent",), "num_kv_heads": 4, "qk_norm": True}, r"model\.qk_norm=True would have no effect"),
    ({"attention": (LOCAL,) * 3}, "does not divide|not divisible"),
  ],
)
def test_what_a_layer_does_not_support_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(BASE, **fields)
  with pytest.raises(UserError, match="exclude each other"):
    GroupedQuery(window=2, chunk=2)
  with pytest.raises(UserError, match=r"norm_after_rotary=True would have .*rotary_embedding=False; set it to False"):
    GroupedQuery(norm_after_rotary=True, rotary_embedding=False)
  with pytest.raises(UserError, match=r"score_log_length=3 would have .*score_log_scale=0\.0; set it to 8192"):
    GroupedQuery(score_log_length=3)
  with pytest.raises(UserError, match=r"score_log_length=2147483648 must be at most 2147483647"):
    GroupedQuery(score_log_scale=0.1, score_log_length=2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean(Attention):
  """The mean of all earlier inputs."""

  def shapes(self, model):
    return {"w_out": {"embed": model.d_model, "mlp": model.d_model}}

  def cached(self, model):
    return {"sum": {None: model.d_model}}


class MeanLayer(nnx.Module):
  def __init__(self, config, model, partitioner, rngs):
    self.w_DD = nnx.Param(jnp.eye(model.d_model), names=("embed", "mlp"))

  def __call__(self, x_BTD, context, cache):
    return x_BTD @ self.w_DD[...], None, cache


def test_a_users_own_attention_is_checked(monkeypatch):
  model = dataclasses.replace(BASE, attention=(Mean(), GroupedQuery()))
  with pytest.raises(UserError, match=r"has no function; add one, as in .*ATTENTIONS\[Mean\]"):
    layer_of(model.attention[0], model)
  monkeypatch.setitem(ATTENTIONS, Mean, MeanLayer)
  assert parameter_counts(model).total - parameter_counts(BASE).total == 2 * (256 - 1152)
  abstract_model(model, make_partitioner(ONE, DATA_EXPERT_MODEL, jax.devices()[:1]))
  monkeypatch.setattr(Mean, "shapes", lambda self, model: {"w_out": {"embed": 16, "mlp": 15}})
  with pytest.raises(UserError, match=r"declares parameters of sizes \[240\], but its module has \[256\]"):
    layer_of(model.attention[0], model)
