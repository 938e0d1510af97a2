"""The candidates of a decision: variants of experiments with a layout and a predicted step time on a topology."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from moejax.config.dispatch import GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.config.parameters import parameter_counts, tokens_per_step
from moejax.config.precision import check_chip
from moejax.config.remat import Remat
from moejax.decision.forecast import Timed
from moejax.decision.search_space import Space, variants
from moejax.errors import UserError
from moejax.planning.estimate import estimate
from moejax.planning.meshes import meshes, on_topology
from moejax.planning.plan import plan
from moejax.planning.precision import at_precision, check_precisions
from moejax.planning.search import ACCUMULATIONS, LARGEST_MODEL_AXIS
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress
from moejax.scaling.shapes import shape_of

STATE_BYTES = 12
"""Bytes per parameter of parameters, gradients and one moment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A model, its layout on the topology, and its step time."""

  name: str
  experiment: Experiment
  """With a complete mesh."""
  precision: str
  step_time_s: float
  source: str
  """formula, program, or "formula, scaled" by the ratio of program to formula of another candidate of its kind."""
  memory_bytes: float
  """Of one device."""

  @property
  def is_dense(self) -> bool:
    return self.experiment.model.moe is None

  @property
  def timed(self) -> Timed:
    seconds = self.step_time_s / tokens_per_step(self.experiment)
    return Timed(name=self.name, shape=shape_of(self.experiment), seconds_per_token=seconds)

  @property
  def loaded_fraction(self) -> float:
    """Fraction of the step time that grows with the load of the busiest device: the FLOPs of routed experts, if rows
    are sent to the devices of their experts and none are dropped."""
    model, moe = self.experiment.model, self.experiment.model.moe
    exchanged = moe and isinstance(moe.dispatch, GroupedDispatch) and self.experiment.mesh.expert > 1
    if not moe or not exchanged:
      return 0.0
    expert = model.feed_forward_matrices * model.d_model * moe.d_ff
    routed = 6 * (model.num_sparse_layers + model.multi_token_depth) * moe.experts_per_token * expert
    return routed / shape_of(self.experiment).training_flops

  def to_json(self) -> dict[str, Any]:
    counted, moe = parameter_counts(self.experiment.model), self.experiment.model.moe
    return {
      "name": self.name,
      "kind": "dense" if self.is_dense else "moe",
      "parameters_total": counted.total,
      "parameters_active": counted.active,
      "d_model": self.experiment.model.d_model,
      "num_layers": self.experiment.model.num_layers,
      "num_experts": moe.num_experts if moe else None,
      "experts_per_token": moe.experts_per_token if moe else None,
      "expert_d_ff": moe.d_ff if moe else None,
      "precision": self.precision,
      "mesh": self.experiment.mesh.shape,
      "remat": self.experiment.model.remat,
      "save_activations": list(self.experiment.model.save_activations),
      "gradient_accumulation": self.experiment.training.gradient_accumulation,
      "tokens_per_step": tokens_per_step(self.experiment),
      "step_time_s": self.step_time_s,
      "step_time_source": self.source,
      "memory_bytes_per_device": self.memory_bytes,
    }


def find_candidates(
  experiments: Sequence[Experiment], topology: Topology, space: Space, progress: Progress = SILENT
) -> list[Candidate]:
  """The variants that fit on the topology, timed by formula. The others are skipped with a note.

  Raises:
    UserError: If a precision is not available on the chip, or no dense or no MoE variant is valid and fits.
  """
  for kind, members in (("dense", [e for e in experiments if not e.model.moe]),
                        ("MoE", [e for e in experiments if e.model.moe])):  # fmt: skip
    if not members:
      raise UserError(f"a decision needs a dense and an MoE experiment, but none is {kind}; add one")
  names = [experiment.name for experiment in experiments]
  if repeated := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"two experiments are named {repeated[0]!r}; give them different names")
  for experiment in experiments:
    check_chip(experiment.model.precision, topology.chip)
  precisions = tuple(dict.fromkeys(space.precision or ("bfloat16",)))
  check_precisions(precisions, topology)
  found: list[Candidate] = []
  reasons: dict[bool, str] = {}
  progress.stage("timing the candidates by formula")
  for experiment in experiments:
    for number, (name, varied) in enumerate(variants(experiment, space)):
      progress.advance(number, name)
      layout = varied if isinstance(varied, UserError) else placed(varied, topology)
      if isinstance(layout, UserError):
        reasons[experiment.model.moe is None] = str(layout)
        progress.note(f"{name} is skipped: {layout}")
        continue
      for precision in precisions:
        estimated = estimate(at_precision(layout, precision), topology)
        label = name if len(precisions) == 1 else f"{name}, {precision}"
        found.append(
          Candidate(
            name=label, experiment=layout, precision=precision, step_time_s=estimated.step_time_s, source="formula",
            memory_bytes=estimated.memory_bytes,
          )
        )  # fmt: skip
  for is_dense, kind in ((True, "dense"), (False, "MoE")):
    if not any(candidate.is_dense == is_dense for candidate in found):
      raise UserError(f"no {kind} variant fits on {topology.name}: {reasons[is_dense]}")
  return found


def placed(experiment: Experiment, topology: Topology) -> Experiment | UserError:
  """The experiment with its own layout or, if that does not fit by formula, the fastest layout that does: on the same
  mesh, or else on any."""
  if experiment.model.depths.is_routed:
    return UserError(f"no law is known for the mixture of depths of {experiment.name}; use moejax compare")
  if experiment.model.moe and shape_of(experiment).is_dense:
    return UserError(f"each token uses all experts of {experiment.name}, for which no law is known")
  counted, limit = parameter_counts(experiment.model), topology.chip.hbm_bytes
  least = STATE_BYTES * counted.total / topology.devices
  if least > limit:
    return UserError(
      f"parameters, gradients and a moment of {experiment.name} ({counted.total:.3g} parameters) need "
      f"{least / 2**30:,.0f} GiB on each of {topology.devices} devices, which have {limit / 2**30:,.0f} GiB"
    )
  own: list[Experiment] = []
  why = ""
  try:
    own = [on_topology(experiment, topology)]
  except UserError as error:
    why = f" (its own: {error})"
  for options in (lambda: own, lambda: _saving_memory(own), lambda: _meshes(experiment, topology)):
    fitting = [
      (found.step_time_s, number, layout)
      for number, layout in enumerate(options())
      if (found := estimate(layout, topology)).memory_bytes <= limit
    ]
    if fitting:
      return min(fitting)[2]
  return UserError(f"no layout of {experiment.name} is valid and fits on {topology.name}{why}")


def _saving_memory(own: Sequence[Experiment]) -> Iterator[Experiment]:
  """The experiment with other rematerialization and gradient accumulation."""
  for experiment, remat, parts in itertools.product(own, get_args(Remat), ACCUMULATIONS):
    with contextlib.suppress(UserError):
      model = experiment.model.with_remat(remat, experiment.model.save_activations if remat == "selected" else ())
      yield with_fields(experiment, {"model": model, "training.gradient_accumulation": parts})


def _meshes(experiment: Experiment, topology: Topology) -> Iterator[Experiment]:
  """The experiment on every mesh, with its own or the most rematerialization."""
  moe = experiment.model.moe
  for mesh in meshes(topology, moe.num_experts if moe else 1, LARGEST_MODEL_AXIS):
    for remat, parts in itertools.product(dict.fromkeys((experiment.model.remat, "layer_inputs")), (1, 4, 16)):
      with contextlib.suppress(UserError):
        model = experiment.model if remat == experiment.model.remat else experiment.model.with_remat(remat)
        yield with_fields(experiment, {"mesh": mesh, "model": model, "training.gradient_accumulation": parts})


def compiled(candidate: Candidate, topology: Topology, progress: Progress = SILENT) -> Candidate:
  """The candidate with the step time and the memory of its compiled program.

  Raises:
    UserError: If the program cannot be compiled or does not fit.
  """
  planned = plan(candidate.experiment, topology, progress)
  if not planned.fits:
    raise UserError(
      f"the program of {candidate.name} does not fit on {topology.name}; search a layout with `moejax plan --search`, "
      "or decide without --compile"
    )
  # A lower precision divides the time of the compiled program as it divides that of the formula.
  ratio = candidate.step_time_s / estimate(candidate.experiment, topology).step_time_s
  return dataclasses.replace(
    candidate,
    step_time_s=planned.step_time_s * ratio,
    source="program",
    memory_bytes=planned.hbm_bytes_per_device,
  )


def rescaled(candidates: Sequence[Candidate], finalist: Candidate) -> list[Candidate]:
  """All candidates, those of the finalist's kind with the ratio of its compiled to its estimated time."""
  (before,) = [one for one in candidates if one.name == finalist.name]
  ratio = finalist.step_time_s / before.step_time_s
  assert math.isfinite(ratio)

  def changed(one: Candidate) -> Candidate:
    if one.name == finalist.name:
      return finalist
    if one.is_dense != finalist.is_dense or one.source == "program":
      return one
    return dataclasses.replace(one, step_time_s=one.step_time_s * ratio, source="formula, scaled")

  return [changed(one) for one in candidates]
