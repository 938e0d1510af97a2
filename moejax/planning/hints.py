"""Suggests remedies if a plan does not fit in memory or a resource limits the step time."""

from moejax.config.remat import GROUPS
from moejax.planning.activations import buffer_factor
from moejax.planning.estimate import estimate
from moejax.planning.plan import Plan
from moejax.planning.search import candidates, difference

PREVIOUS_REMAT = {"products": "none", "dots": "products", "attention": "dots", "layer_inputs": "attention"}
"""The remat policy that saves the next larger set of values."""

GROWTH = {"none": 2.0, "products": 1.3, "dots": 1.7, "attention": 3.0}
"""Approximate memory of a remat policy relative to the next one."""


MARGIN = 0.97
"""Maximum fraction of the memory limit that a suggested change may need according to the corrected formula."""


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
      f"the receive buffer of the dropless layers has room for the worst case, {factor:.3g} times the balanced load; "
      "use --load 1.5 2.0, or --load RUN with a trained run, to plan smaller buffers"
    )
  if plan.topology.chip.platform == "cpu":
    found.append("this is a roofline estimate of the program for CPU, whose fusions differ from those for accelerators")
  return found


def _smaller(plan: Plan) -> list[str]:
  """Changes of mesh, remat and gradient accumulation that fit: the one with the fewest options, and the fastest.

  The memory according to the formula is corrected by the memory of the program.
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
      f"no combination of mesh, remat and gradient accumulation of {experiment.name} fits on {topology.name} according "
      "to the formula; use more chips or a smaller model"
    ]
  # The change with the fewest options and, if it is different, the fastest one.
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
  fraction = f"{exposed_s / step_time_s:.0%} of the step time is exposed communication, most of it {what}"
  remedy = {
    "model": "a smaller --mesh.model, or more tokens per chip",
    "expert": "an expert axis that lies within one dimension of the torus, or a lower capacity factor",
  }.get(worst.axis, "more tokens per chip (a larger batch), or a smaller --mesh.data with a larger --mesh.replica")
  return [f"{fraction}; try {remedy}"]


def _recomputed(plan: Plan, step_time_s: float) -> list[str]:
  model = plan.experiment.model
  more = PREVIOUS_REMAT.get(model.remat)
  if model.remat == "selected" and set(model.saved_values) < {"layer_inputs", *GROUPS["attention"]}:
    more = "attention"
  without_selection = " --model.save-activations" if model.save_activations else ""
  again_s = sum(operation.time_s for operation in plan.operations if operation.of_pass == "recompute")
  room = plan.hbm_limit_bytes > GROWTH.get(more or "none", 1.0) * plan.hbm_bytes_per_device
  if more and again_s > 0.05 * step_time_s and room:
    return [
      f"{again_s / step_time_s:.0%} of the step time is recomputation, and memory is free; try --model.remat "
      f"{more}{without_selection}"
    ]
  return []


def _vector(step_time_s: float, breakdown_s: dict[str, float]) -> list[str]:
  slow_s = breakdown_s["vector"] + breakdown_s["memory"]
  if slow_s > 0.3 * step_time_s:
    return [f"{slow_s / step_time_s:.0%} of the step time is not spent on matrix products; use wider layers"]
  return []
