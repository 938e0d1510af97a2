"""A sparse layer as a plain loop over tokens: what the fast paths are compared with."""

import numpy as np


def silu(x):
  return x / (1.0 + np.exp(-x))


def expert(x_D, w_gate_DF, w_up_DF, w_down_FD):
  return (silu(x_D @ w_gate_DF) * (x_D @ w_up_DF)) @ w_down_FD


def moe_reference(x_GMD, valid_GM, w_router_DE, gate_EDF, up_EDF, down_EFD, experts_per_token, capacity, renormalize):
  """out_GMD and the number of dropped choices: all first choices in token order take rows before any second choice."""
  out_GMD, dropped = np.zeros_like(x_GMD), 0
  for g, x_MD in enumerate(x_GMD):
    logits_ME = x_MD @ w_router_DE
    probs_ME = np.exp(logits_ME - logits_ME.max(-1, keepdims=True))
    probs_ME /= probs_ME.sum(-1, keepdims=True)
    order_MA = np.argsort(-probs_ME, axis=-1, kind="stable")[:, :experts_per_token]
    rows = [0] * w_router_DE.shape[1]
    for choice in range(experts_per_token):
      for m in np.flatnonzero(valid_GM[g]):
        e = order_MA[m, choice]
        if rows[e] == capacity:
          dropped += 1
          continue
        rows[e] += 1
        weight = probs_ME[m, e] / (probs_ME[m, order_MA[m]].sum() if renormalize else 1.0)
        out_GMD[g, m] += weight * expert(x_MD[m], gate_EDF[e], up_EDF[e], down_EFD[e])
  return out_GMD, dropped
