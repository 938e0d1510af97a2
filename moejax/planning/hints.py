"""What to try if a plan does not fit, or if one resource bounds the step time."""

from moejax.planning.estimate import buffer_factor, estimate
from moejax.planning.plan import Plan
from moejax.planning.search import candidates, difference

PREVIOUS_REMAT = {"products": "none", "dots": "products", "attention": "dots", "layer_inputs": "attention"}
"""The policy that keeps more than each policy."""

GROWTH = {"none": 2.0, "products": 1.3, "dots": 1.7, "attention": 3.0}
"""Approximate memory of a remat policy relative to the next one."""


MARGIN = 0.97
"""Share of the memory limit that a change may take by formula: the formula is corrected by the program, but is none."""


def hints(plan: Plan) -> list[str]:
  """Remedies, the most promising first."""
  if plan.breakdown_s is None or not plan.fits:
    return _smaller(plan)
  found = [
    *_collectives(plan, plan.step_time_s, plan.breakdown_s["collective_exposed"]),
    *_recomputed(plan, plan.step_time_s),
    *_vector(plan.step_time_s, plan.breakdown_s),
  ]
  if (factor := buffer_factor(plan.experiment)) > 1.5:
    found.append(
      f"the receive buffer of a dropless layer has {factor:.3g} times the balanced load, all of which is priced; "
      "--load 1.0 1.5 2.0 plans smaller ones"
    )
  if plan.topology.chip.platform == "cpu":
    found.append("a roofline of the program that XLA makes for CPU: no cycle estimates, fusions of another compiler")
  return found


def _smaller(plan: Plan) -> list[str]:
  """The nearest changes that fit: of mesh, remat and gradient accumulation, the fewest options, then the fastest.

  The formula's memory is corrected by what the program needs.
  """
  experiment, topology = plan.experiment, plan.topology
  correction = plan.hbm_bytes_per_device / estimate(experiment, topology).memory_bytes
  fitting = []
  for candidate in candidates(experiment, topology):
    estimated = estimate(candidate, topology)
    size = correction * estimated.memory_bytes
    options = tuple(difference(experiment, candidate))
    if options and size <= MARGIN * plan.hbm_limit_bytes:
      fitting.append((len(options), estimated.step_time_s, size, options))
  if not fitting:
    return [
      f"no mesh, remat and gradient accumulation of {experiment.name} fits on {topology.name} by formula; use more "
      "chips or a smaller model"
    ]
  # The nearest one, and the fastest one where that is another.
  nearest, fastest = min(fitting, key=lambda one: one[:2]), min(fitting, key=lambda one: one[1])
  return [
    f"{' '.join(options)}: {size / 2**30:.1f} of {plan.hbm_limit_bytes / 2**30:.1f} GiB and {seconds:.3g} s by formula"
    for _, seconds, size, options in dict.fromkeys((nearest, fastest))
  ]


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
