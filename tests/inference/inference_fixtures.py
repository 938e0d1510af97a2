"""Small models with clear-cut logits, and the full forward pass that inference must agree with."""

import dataclasses

import jax
import numpy as np

from moejax.config import DATA_EXPERT_MODEL, Mesh, Model, MoE
from moejax.inference.dropless import inference_model
from moejax.partitioning import make_partitioner

DENSE = Model(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=32, vocab_size=40)
SPARSE = dataclasses.replace(
  DENSE, num_kv_heads=4, qk_norm=True, moe=MoE(num_experts=4, experts_per_token=2, d_ff=16, every=2, group_size=64)
)
ONE, EIGHT = Mesh(data=1), Mesh(data=2, expert=2, model=2)


def make(model: Model, mesh: Mesh = ONE, **rules: tuple[str, ...]):
  """An abstract model, with these rules after the default ones, and parameters drawn wide, so that logits differ."""
  table = (*DATA_EXPERT_MODEL, *rules.items())
  abstract = inference_model(model, make_partitioner(mesh, table, jax.devices()[: mesh.size]))
  random = np.random.default_rng(0)

  def draw(path, leaf):
    return np.asarray(random.normal(float("scale" in jax.tree_util.keystr(path)), 0.3, leaf.shape), np.float32)

  drawn = jax.tree_util.tree_map_with_path(draw, abstract.parameters)
  return abstract, jax.device_put(drawn, abstract.shardings)


def full_logits(abstract, parameters, rows):
  """logits_BTV of whole sequences, without a cache."""
  longest = max(map(len, rows))
  tokens_BT = np.array([[*row, *[0] * (longest - len(row))] for row in rows], np.int32)
  segments_BT = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int32)
  positions_BT = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens_BT.shape)

  @jax.jit
  def forward(parameters, tokens_BT, segments_BT, positions_BT):
    model = abstract.module(parameters)
    x_BTD, _ = model(tokens_BT, segments_BT, positions_BT)
    return model.logits(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(*tokens_BT.shape, -1)

  return np.asarray(forward(parameters, tokens_BT, segments_BT, positions_BT))
