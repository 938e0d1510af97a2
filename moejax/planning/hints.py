"""What to try if a plan does not fit, or if one resource bounds the step time."""

from moejax.planning.plan import Plan

NEXT_REMAT = {"none": "products", "products": "dots", "dots": "attention", "attention": "layer_inputs"}
"""For each remat policy, the next one that saves less."""
PREVIOUS_REMAT = {less: more for more, less in NEXT_REMAT.items()}

GROWTH = {"none": 2.0, "products": 1.3, "dots": 1.7, "attention": 3.0}
"""Approximate memory of a remat policy relative to the next one."""


def hints(plan: Plan) -> list[str]:
  """Remedies, the most promising first."""
  if plan.step_time_s is None or plan.breakdown_s is None or not plan.fits:
    return _smaller(plan)
  found = [
    *_collectives(plan, plan.step_time_s, plan.breakdown_s["collective_exposed"]),
    *_recomputed(plan, plan.step_time_s),
    *_vector(plan.step_time_s, plan.breakdown_s),
  ]
  if plan.topology.chip.platform == "cpu":
    found.append("a roofline of the program that XLA makes for CPU: no cycle estimates, fusions of another compiler")
  return found


def _smaller(plan: Plan) -> list[str]:
  experiment = plan.experiment
  over = plan.hbm_bytes_per_device / plan.hbm_limit_bytes
  found = []
  if less := NEXT_REMAT.get(experiment.model.remat):
    found.append(f"--model.remat {less} keeps less of each layer and recomputes more")
  parts = experiment.training.gradient_accumulation
  shards = experiment.micro_batch_size // (experiment.mesh.size // experiment.mesh.model)
  if shards > 1:
    factor = next((n for n in range(2, shards + 1) if shards % n == 0 and n >= over), shards)
    found.append(f"--training.gradient-accumulation {parts * factor} computes {factor} times fewer sequences at once")
  if experiment.mesh.replica > plan.topology.slices:
    found.append("--mesh.replica 1 shards the parameters over all chips of a slice")
  model = experiment.mesh.model * 2
  return [*found, f"--mesh.model {model} halves weights and activations of a chip", "more chips"]


def _collectives(plan: Plan, step_time_s: float, exposed_s: float) -> list[str]:
  if exposed_s < 0.1 * step_time_s:
    return []
  worst = max(plan.collectives, key=lambda moved: moved.exposed_s)
  what = f"{worst.kind} over {worst.axis} in {worst.scope}"
  fraction = f"{exposed_s / step_time_s:.0%} of the step waits for other chips, most of it for {what}"
  remedy = {
    "model": "a smaller --mesh.model, or more tokens a chip",
    "expert": "an expert axis that lies within one dimension of the torus, or a lower capacity factor",
  }.get(worst.axis, "more tokens a chip (a larger batch), or a smaller --mesh.data with --mesh.replica in its place")
  return [f"{fraction}; try {remedy}"]


def _recomputed(plan: Plan, step_time_s: float) -> list[str]:
  more = PREVIOUS_REMAT.get(plan.experiment.model.remat)
  again_s = sum(operation.time_s for operation in plan.operations if operation.of_pass == "recompute")
  room = plan.hbm_limit_bytes > GROWTH.get(more or "none", 1.0) * plan.hbm_bytes_per_device
  if more and again_s > 0.05 * step_time_s and room:
    return [f"{again_s / step_time_s:.0%} of the step is recomputed and memory is free; try --model.remat {more}"]
  return []


def _vector(step_time_s: float, breakdown_s: dict[str, float]) -> list[str]:
  slow_s = breakdown_s["vector"] + breakdown_s["memory"]
  if slow_s > 0.3 * step_time_s:
    return [f"{slow_s / step_time_s:.0%} of the step is no matrix product: wider layers use the chip better"]
  return []
