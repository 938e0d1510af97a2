"""Random experiments, meshes of eight devices and rule tables over every logical axis."""

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
from training_fixtures import tiny

from moejax.config import (
  DATA_EXPERT_MODEL,
  DenseRouter,
  Dispatch,
  EinsumDispatch,
  Evaluation,
  Experiment,
  ExpertChoiceRouter,
  GroupedDispatch,
  Losses,
  Mesh,
  MoE,
  ThresholdRouter,
  TopKRouter,
  TopPRouter,
)  # fmt: skip
from moejax.config.kinds import kinds
from moejax.config.sharding import LOGICAL_AXES, MESH_AXES, Rules
from moejax.errors import UserError

Random = np.random.Generator


def draw(random: Random, kind: str) -> tuple[Experiment, Experiment]:
  """An experiment of a `kind` (dense, moe or mixture of attention) on one device, and with a mesh and rules that are
  accepted for it."""
  one = _accepted(lambda: draw_experiment(random, kind))
  return one, _accepted(lambda: dataclasses.replace(one, mesh=draw_mesh(random), rules=draw_rules(random)))


def _accepted(make: Callable[[], Experiment]) -> Experiment:
  """The first that is not refused, as most are."""
  while True:
    with contextlib.suppress(UserError):
      return make()


def draw_experiment(random: Random, kind: str) -> Experiment:
  heads = int(random.choice([4, 6, 8, 12]))
  kv_heads = int(random.choice([k for k in range(1, heads + 1) if heads % k == 0]))
  moe = draw_moe(random) if kind == "moe" else None
  qk_norm = bool(random.integers(2))
  base = tiny(False)
  model = dataclasses.replace(
    base.model, num_layers=int(random.choice([2, 4])), num_heads=heads, num_kv_heads=kv_heads, moe=moe,
    attention_experts=heads // kv_heads if kind == "mixture of attention" else None,
    layers=str(random.choice(["scanned", "unrolled"])),
    remat=str(random.choice(["none", "products", "attention", "layer_inputs"])),
    tie_embeddings=bool(random.integers(2)), qk_norm=qk_norm,
    qk_norm_over=str(random.choice(["head", "all_heads"])) if qk_norm else "head",
    attention_bias=bool(random.integers(2)),
  )  # fmt: skip
  coefficients = {name: 0.1 for name in model.auxiliary_losses}
  training = dataclasses.replace(base.training, batch_size=8, losses=Losses(z=1e-3, **coefficients))
  return dataclasses.replace(base, model=model, training=training, evaluation=Evaluation(batch_size=8))


ROUTERS = {
  "top_k": TopKRouter(),
  "biased": TopKRouter(scores="sigmoid", bias_rate=0.01),
  "groups of experts": TopKRouter(expert_groups=4, groups_per_token=2),
  "top_p": TopPRouter(threshold=0.5, renormalize=False),
  "expert_choice": ExpertChoiceRouter(),
  "dense": DenseRouter(),
  "threshold": ThresholdRouter(),
  "threshold, equal counts": ThresholdRouter(equal_counts=True),
}


def draw_moe(random: Random) -> MoE:
  router = ROUTERS[str(random.choice(list(ROUTERS)))]
  dispatch = kinds(Dispatch)[str(random.choice(["einsum", "grouped", "dense"], p=[0.3, 0.5, 0.2]))]()
  fields: dict = {"dispatch": dispatch, "router": router, "num_shared_experts": int(random.integers(2))}
  if isinstance(dispatch, EinsumDispatch) and not (router.every_expert):
    fields["dispatch"] = EinsumDispatch(priority=str(random.choice(["choice", "token"])))
  if isinstance(dispatch, GroupedDispatch):
    fields["dispatch"] = GroupedDispatch(
      exchange=str(random.choice(["all_to_all", "all_gather"])), exchange_chunks=int(random.choice([1, 3]))
    )
  moe = MoE(
    num_experts=8, experts_per_token=8 if router.kind in ("dense", "threshold") else 2, d_ff=16,
    every=int(random.choice([1, 2])), group_size=int(random.choice([8, 16, 32])), **fields,
  )  # fmt: skip
  # What has no effect without groups is not valid.
  return moe if moe.has_groups else dataclasses.replace(moe, group_size=None)


def draw_mesh(random: Random) -> Mesh:
  while True:
    sizes = random.choice([1, 2, 4, 8], size=len(MESH_AXES)).tolist()
    if np.prod(sizes) == 8:
      return Mesh(**dict(zip(MESH_AXES, sizes, strict=True)))


def draw_rules(random: Random) -> Rules:
  """The default table with some rules of it changed, or one with nothing sharded and then some."""
  if random.integers(2):
    table, changed = dict(DATA_EXPERT_MODEL), 0.25
  else:
    table, changed = dict.fromkeys(LOGICAL_AXES, ()), 0.5
  for name in LOGICAL_AXES:
    if random.random() < changed:
      count = int(random.choice([0, 1, 2], p=[0.25, 0.55, 0.2]))
      table[name] = tuple(random.choice(MESH_AXES, size=count, replace=False).tolist())
  return tuple(table.items())
