"""A sparse layer as plain loops over tokens in float64: what the fast paths are compared with."""

import math

import numpy as np


def silu(x):
  return x / (1.0 + np.exp(-x))


def gelu(x):
  return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def expert(x_D, w_gate_DF, w_up_DF, w_down_FD):
  hidden_F = gelu(x_D @ w_up_DF) if w_gate_DF is None else silu(x_D @ w_gate_DF) * (x_D @ w_up_DF)
  return hidden_F @ w_down_FD


def scores_of(x_D, w_router_DE, router):
  logits_E = x_D @ w_router_DE
  if router.scores == "sigmoid":
    return 1.0 / (1.0 + np.exp(-logits_E))
  exp_E = np.exp(logits_E - logits_E.max())
  return exp_E / exp_E.sum()


def choices_of_token(score_E, ranked_E, moe):
  """(expert, weight), best first."""
  router, E = moe.router, len(score_E)
  allowed = set(range(E))
  if getattr(router, "expert_groups", 1) > 1:
    groups = np.arange(E).reshape(router.expert_groups, -1)
    worth = [np.sort(ranked_E[group])[-2:].sum() for group in groups]
    best = sorted(range(len(groups)), key=lambda g: -worth[g])[: router.groups_per_token]
    allowed = {int(e) for g in best for e in groups[g]}
  order = [e for e in sorted(range(E), key=lambda e: (-ranked_E[e], e)) if e in allowed]
  if router.kind == "dense":
    order = list(range(E))
  if router.kind == "threshold":
    order = [e for e in order if score_E[e] * E > router.threshold] or order[:1]
  if router.kind == "top_p":
    taken, total = [], 0.0
    for e in order[: moe.experts_per_token]:
      if taken and total >= router.threshold:
        break
      taken.append(e)
      total += score_E[e]
    order = taken
  order = order[: moe.experts_per_token]
  order = [e for e in order if score_E[e] >= getattr(router, "skip_below", 0.0) * score_E[order[0]]]
  total = sum(score_E[e] for e in order) if router.renormalize else 1.0
  return [(e, router.scale * score_E[e] / total) for e in order]


def choices_of_group(score_ME, ranked_ME, valid_M, moe):
  """For every token its (expert, weight)."""
  M, E = score_ME.shape
  if moe.router.kind != "expert_choice":
    return [choices_of_token(score_ME[m], ranked_ME[m], moe) if valid_M[m] else [] for m in range(M)]
  chosen = [[] for _ in range(M)]
  for e in range(E):
    real = [m for m in range(M) if valid_M[m]]
    for m in sorted(real, key=lambda m: (-ranked_ME[m, e], m))[: moe.capacity(M)]:
      chosen[m].append((e, moe.router.scale * score_ME[m, e]))
  return chosen


def rows_in_line(choices, moe):
  """(token, expert, weight) in the order in which rows of a full expert are given away."""
  longest = max((len(of_token) for of_token in choices), default=0)
  if not moe.dispatch.looks_ahead or moe.router.every_expert:
    return [(m, *choice) for m, of_token in enumerate(choices) for choice in of_token]
  return [(m, *of_token[a]) for a in range(longest) for m, of_token in enumerate(choices) if a < len(of_token)]


def moe_reference(x_GMD, valid_GM, w_router_DE, gate_EDF, up_EDF, down_EFD, moe, bias_E=None):
  """out_GMD, and the part of the choices that found no row."""
  out_GMD, dropped, total = np.zeros_like(x_GMD), 0, 0
  for g, x_MD in enumerate(x_GMD):
    score_ME = np.stack([scores_of(x_D, w_router_DE, moe.router) for x_D in x_MD])
    ranked_ME = score_ME if bias_E is None else score_ME + bias_E
    choices = choices_of_group(score_ME, ranked_ME, valid_GM[g], moe)
    room = moe.capacity(len(x_MD)) if moe.dispatch.has_capacity else math.inf
    rows = [0] * w_router_DE.shape[1]
    for m, e, weight in rows_in_line(choices, moe):
      total += 1
      if rows[e] == room:
        dropped += 1
        continue
      rows[e] += 1
      gate_DF = None if gate_EDF is None else gate_EDF[e]
      before, after = (weight, 1.0) if moe.weights_on == "inputs" else (1.0, weight)
      out_GMD[g, m] += after * expert(before * x_MD[m], gate_DF, up_EDF[e], down_EFD[e])
  return out_GMD, dropped / max(total, 1)
