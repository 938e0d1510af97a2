"""What to try where a plan does not fit, or is bound by one thing."""

from collections.abc import Mapping
from typing import Any

from moejax.config.experiment import Experiment
from moejax.planning.topology import Topology

DEARER_REMAT = {"none": "products", "products": "dots", "dots": "attention", "attention": "layer_inputs"}
CHEAPER_REMAT = {dear: cheap for cheap, dear in DEARER_REMAT.items()}

GROWTH = {"none": 2.0, "products": 1.3, "dots": 1.7, "attention": 3.0}
"""Roughly how many times the memory of the next dearer policy a policy takes."""


def hints(experiment: Experiment, topology: Topology, plan: Mapping[str, Any]) -> list[str]:
  """Remedies, the most promising first."""
  if not plan["fits"]:
    return _smaller(experiment, plan)
  found = [*_collectives(plan), *_recomputed(experiment, plan), *_vector(plan)]
  if topology.torus == ():
    found.append("a roofline of the program that XLA makes for CPU: no cycle estimates, fusions of another compiler")
  return found


def _smaller(experiment: Experiment, plan: Mapping[str, Any]) -> list[str]:
  over = plan["hbm_bytes_per_device"] / plan["hbm_limit_bytes"]
  dearer = DEARER_REMAT.get(experiment.model.remat)
  found = []
  if dearer:
    found.append(f"--model.remat {dearer} keeps less of each layer and computes more again")
  parts = experiment.training.gradient_accumulation
  shards = experiment.micro_batch_size // (experiment.mesh.size // experiment.mesh.model)
  if shards > 1:
    factor = next((n for n in range(2, shards + 1) if shards % n == 0 and n >= over), shards)
    found.append(f"--training.gradient-accumulation {parts * factor} computes {factor} times fewer sequences at once")
  if plan["mesh"]["replica"] > plan["slices"]:
    found.append("--mesh.replica 1 shards the parameters over all chips of a slice")
  return [*found, f"--mesh.model {experiment.mesh.model * 2} halves weights and activations of a chip", "more chips"]


def _collectives(plan: Mapping[str, Any]) -> list[str]:
  exposed = plan["breakdown_s"]["collective_exposed"]
  if exposed < 0.1 * plan["step_time_s"]:
    return []
  worst = max(plan["collectives"], key=lambda moved: moved["exposed_s"])
  what = f"{worst['kind']} over {worst['axis']} in {worst['scope']}"
  part = f"{exposed / plan['step_time_s']:.0%} of the step waits for other chips, most of it for {what}"
  remedy = {
    "model": "a smaller --mesh.model, or more tokens a chip",
    "expert": "an expert axis that lies within one dimension of the torus, or a lower capacity factor",
  }.get(worst["axis"], "more tokens a chip (a larger batch), or a smaller --mesh.data with --mesh.replica in its place")
  return [f"{part}; try {remedy}"]


def _recomputed(experiment: Experiment, plan: Mapping[str, Any]) -> list[str]:
  cheaper = CHEAPER_REMAT.get(experiment.model.remat)
  again = sum(operation["time_s"] for operation in plan["operations"] if operation["pass"] == "recompute")
  room = plan["hbm_limit_bytes"] > GROWTH.get(cheaper or "none", 1.0) * plan["hbm_bytes_per_device"]
  if cheaper and again > 0.05 * plan["step_time_s"] and room:
    return [f"{again / plan['step_time_s']:.0%} of the step is computed again and memory is free; "
            f"try --model.remat {cheaper}"]  # fmt: skip
  return []


def _vector(plan: Mapping[str, Any]) -> list[str]:
  slow = plan["breakdown_s"]["vector"] + plan["breakdown_s"]["memory"]
  if slow > 0.3 * plan["step_time_s"]:
    return [f"{slow / plan['step_time_s']:.0%} of the step is no matrix product: wider layers use the chip better"]
  return []
