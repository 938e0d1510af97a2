"""The scales of arXiv 2405.15052: dense 6.4B, 12.6B and 29.6B, and MoE models with their step times or bases.

The paper publishes the sizes and the names (base and experts), top-2 routing and capacity 2.0 or 1.25 (1.0 and 0.625 of
the balanced load). Layers, widths, group sizes, meshes and learning rates are our choice. Set the text with
--data.train.
"""

from dataclasses import replace

from moejax.config import AdamW, Data, Evaluation, Experiment, Losses, Mesh, Model, MoE, Training


def dense_6b4() -> Experiment:
  """Dense, 6.4B: 256 v5p, 4M tokens per step; the smallest scale of the paper."""
  return _dense("dense_6b4", num_layers=28, d_model=4096, d_ff=12_800, learning_rate=3e-4)


def dense_12b6() -> Experiment:
  """Dense, 12.5B: 256 v5p, 4M tokens per step."""
  return _dense("dense_12b6", num_layers=40, d_model=5120, d_ff=13_312, learning_rate=2.5e-4)


def dense_29b6() -> Experiment:
  """Dense, 29.5B: 512 v5p, 4M tokens per step; the largest scale of the paper."""
  return _dense("dense_29b6", num_layers=42, d_model=8192, d_ff=17_408, learning_rate=1.5e-4, replicas=8)


def moe_1b6_256e() -> Experiment:
  """1.6B base with 256 experts in every second layer: 146B in total, for less than half the time of dense 6.4B."""
  base = _dense("moe_1b6_256e", num_layers=24, d_model=2048, d_ff=7680, learning_rate=4e-4)
  return _sparse(base, num_experts=256, capacity_factor=1.0, mesh=Mesh(data=4, expert=64), group_size=1024)


def moe_6b4_16e() -> Experiment:
  """6.4B base with 16 experts in every second layer, 39B in total, with capacity 1.25 as in the paper."""
  base = replace(dense_6b4(), name="moe_6b4_16e")
  return _sparse(base, num_experts=16, capacity_factor=0.625, mesh=Mesh(data=16, expert=16))


def moe_6b4_64e() -> Experiment:
  """6.4B base with 64 experts in every second layer, 145B in total, with capacity 1.25 as in the paper."""
  base = replace(dense_6b4(), name="moe_6b4_64e")
  return _sparse(base, num_experts=64, capacity_factor=0.625, mesh=Mesh(data=4, expert=64))


def moe_12b6_16e() -> Experiment:
  """12.5B base with 16 experts in every second layer, 74B in total, with capacity 1.25 as in the paper."""
  base = replace(dense_12b6(), name="moe_12b6_16e")
  return _sparse(base, num_experts=16, capacity_factor=0.625, mesh=Mesh(data=16, expert=16), parts=2)


def moe_12b6_64e() -> Experiment:
  """12.5B base with 64 experts in every second layer, 270B in total, with capacity 1.25 as in the paper."""
  base = replace(dense_12b6(), name="moe_12b6_64e")
  return _sparse(base, num_experts=64, capacity_factor=0.625, mesh=Mesh(data=4, expert=64), parts=2)


def moe_29b6_16e() -> Experiment:
  """29.5B base with 16 experts in every second layer, 164B in total, with capacity 1.25 as in the paper; 512 v5p."""
  base = replace(dense_29b6(), name="moe_29b6_16e")
  return _sparse(base, num_experts=16, capacity_factor=0.625, mesh=Mesh(data=32, expert=16), embed="data")


def moe_29b6_64e() -> Experiment:
  """29.5B base with 64 experts in every second layer, 596B in total, with capacity 1.25 as in the paper; 512 v5p."""
  base = replace(dense_29b6(), name="moe_29b6_64e")
  return _sparse(base, num_experts=64, capacity_factor=0.625, mesh=Mesh(data=8, expert=64), parts=2)


def _dense(name: str, num_layers: int, d_model: int, d_ff: int, learning_rate: float, replicas: int = 4) -> Experiment:
  """`replicas`: of 64 chips."""
  return Experiment(
    name=name,
    model=Model(
      num_layers=num_layers,
      d_model=d_model,
      num_heads=d_model // 128,
      num_kv_heads=d_model // 128,
      head_dim=128,
      d_ff=d_ff,
      vocab_size=32_768,
      remat="dots",
    ),
    data=Data(sequence_length=4096),
    training=Training(batch_size=1024),
    optimizer=AdamW(learning_rate=learning_rate),
    evaluation=Evaluation(batch_size=64 * replicas),
    # 256 shards of a weight would be thinner than a tile, and gathers of them all-reduces, at twice the cost.
    mesh=Mesh(replica=replicas, data=64),
  )


def _sparse(
  base: Experiment,
  num_experts: int,
  capacity_factor: float,
  mesh: Mesh,
  embed: str = "expert",
  parts: int = 1,
  group_size: int = 512,
) -> Experiment:
  """The base with experts as wide as its feed-forward in every second layer, few or one on each chip.

  Args:
    embed: the axis that shards all weights outside the experts: into no more shards than they have tiles.
    parts: in as many a batch is computed, so that all products of a layer can be kept for its backward pass.
    group_size: of 64 experts' rows at a capacity of 1.25, random choices fill 99.2 % in groups of 512, 99.9 % in groups
      of 1024, whose masks cost twice as much. 256 experts have few rows in a group, and more groups would drop more.
  """
  moe = MoE(
    num_experts=num_experts,
    experts_per_token=2,
    d_ff=base.model.d_ff,
    every=2,
    capacity_factor=capacity_factor,
    group_size=group_size,
  )
  return replace(
    base,
    model=replace(base.model, moe=moe, remat="products"),
    training=replace(base.training, gradient_accumulation=parts, losses=Losses(load_balance=0.01, router_z=0.001)),
    mesh=mesh,
    rules=(*base.rules, ("embed", (embed,))),
  )
