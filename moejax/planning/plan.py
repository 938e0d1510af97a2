"""The plan of an experiment on a topology: does it fit, what does a step take, and what takes it."""

from typing import Any

from moejax.config.experiment import Experiment
from moejax.config.parameters import count, flops_per_token, tokens_per_step
from moejax.display import Display
from moejax.planning.compile import Compiled, compile_step
from moejax.planning.cost import Cost, Exchange, cost
from moejax.planning.hints import hints
from moejax.planning.program import parse
from moejax.planning.topology import Topology

DEAREST = 10


def plan(experiment: Experiment, topology: Topology, display: Display) -> dict[str, Any]:
  """What `moejax plan NAME --json` writes: plain numbers with their units in the key, None where there is none.

  Raises:
    UserError: as `compile_step`.
  """
  compiled = compile_step(experiment, topology, display)
  display.stage("reading the program")
  return summary(compiled, topology)


def summary(compiled: Compiled, topology: Topology) -> dict[str, Any]:
  """The plan of a compiled step."""
  experiment, chip = compiled.experiment, topology.chip
  parameters = count(experiment.model)
  tokens = tokens_per_step(experiment)
  model_flops = tokens * flops_per_token(experiment.model, experiment.data.sequence_length)
  found = cost(parse(compiled.text), compiled.network) if compiled.text else None
  step_time_s = found.step_time_s if found else None
  peak = chip.bfloat16_flops
  result = {
    "experiment": experiment.name,
    "topology": topology.name,
    "slices": topology.slices,
    "devices": topology.devices,
    "mesh": experiment.mesh.shape,
    "remat": experiment.model.remat,
    "tokens_per_step": tokens,
    "parameters_total": parameters.total,
    "parameters_active": parameters.active,
    "model_flops_per_step": model_flops,
    "executed_flops_per_device": found.flops if found else None,
    "hbm_bytes_per_device": compiled.memory["total"],
    "hbm_limit_bytes": chip.hbm_bytes,
    "memory_bytes": compiled.memory,
    "fits": bool(found) and compiled.memory["total"] <= chip.hbm_bytes,
    "step_time_s": step_time_s,
    "tokens_per_s": tokens / step_time_s if step_time_s else None,
    "mfu": model_flops / (step_time_s * topology.devices * peak) if step_time_s and peak else None,
    "breakdown_s": found.breakdown_s if found else None,
    "kernel_s": found.kernel_s if found else None,
    "operations": _operations(found) if found else [],
    "collectives": [_collective(exchange) for exchange in _merged(found)] if found else [],
    "compile_time_s": compiled.compile_time_s,
    "cached": compiled.cached,
  }
  return result | {"hints": hints(experiment, topology, result)}


def _operations(found: Cost) -> list[dict[str, Any]]:
  """The dearest, by scope, pass and kind."""
  return [
    {
      "scope": operation.scope,
      "pass": operation.of_pass,
      "kind": operation.kind,
      "time_s": operation.time_s,
      "part": operation.time_s / found.step_time_s,
      "flops": operation.flops,
      "count": operation.count,
    }
    for operation in found.operations[:DEAREST]
  ]


def _merged(found: Cost) -> list[list[Exchange]]:
  """Collectives of one scope, kind and axis together, the dearest first."""
  groups: dict[tuple[str, str, str], list[Exchange]] = {}
  for exchange in found.exchanges:
    moved = exchange.collective
    groups.setdefault((exchange.scope, moved.kind, moved.axis), []).append(exchange)
  return sorted(groups.values(), key=lambda group: -sum(exchange.time_s for exchange in group))


def _collective(group: list[Exchange]) -> dict[str, Any]:
  moved = group[0].collective
  time_s = sum(exchange.time_s for exchange in group)
  exposed_s = sum(exchange.exposed_s for exchange in group)
  return {
    "axis": moved.axis,
    "kind": moved.kind,
    "scope": group[0].scope,
    "devices": moved.devices,
    "count": sum(exchange.count for exchange in group),
    "bytes": sum(exchange.count * exchange.collective.bytes for exchange in group),
    "bandwidth_bytes_per_s": moved.bandwidth,
    "time_s": time_s,
    "exposed_s": exposed_s,
    "overlapped": exposed_s < 0.5 * time_s,
  }
