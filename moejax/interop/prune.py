"""Drops experts of a trained mixture of experts, layer by layer (arXiv 2402.14800, section 3.2).

In each layer, the experts are kept with which the output of the layer for a calibration text changes least, by the sum
of squared differences. The paper computes this for every set of experts. Here that is done for up to MOST_SETS sets;
with more, experts are dropped one after the other, each time the one that is missed least.

B batch  T query position  D embed  F hidden  E experts  O outer batch  U routing groups  M tokens
Y = sets of experts
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.sharding import DATA_EXPERT_MODEL, Mesh
from moejax.errors import UserError
from moejax.inference.unrolled import unroll
from moejax.interop.first_checkpoint import check_new_run, save_first, stacked_as
from moejax.interop.layer_inputs import Batch, LayerInputs, layer_inputs
from moejax.models.abstract import AbstractModel, Parameters
from moejax.models.moe.experts import Weights
from moejax.models.moe.router import route
from moejax.models.moe.routing import RouterContext
from moejax.models.products import exact_product
from moejax.partitioning import Partitioner, make_partitioner
from moejax.progress import SILENT, Progress
from moejax.training.state import TrainSpec

MOST_SETS = 3000
"""Number of sets of experts up to which all are compared."""


@dataclasses.dataclass(frozen=True)
class Pruned:
  """The experts that a layer keeps."""

  kept: tuple[int, ...]
  error: float
  """Norm of the change of the output for the calibration text, relative to the output of the routed experts."""
  skip_ratio: float | None
  """Median over tokens of the weight of the second choice, relative to the first. None if there is no second."""


def pruned_model(model: Model, keep: int) -> Model:
  """The model with `keep` experts in each sparse layer.

  Raises:
    UserError: If the model has no sparse layers or not more experts, or its router cannot be pruned.
  """
  moe = model.moe
  if moe is None:
    raise UserError("the run has no sparse layers, so there are no experts to drop")
  if model.multi_token_depth:
    raise UserError(
      f"model.multi_token_depth={model.multi_token_depth} is not supported by pruning: the experts of its modules are "
      "used in training alone; use a run without it"
    )
  if model.depths.is_routed:
    raise UserError(f"model.depths.kind={model.depths.kind} is not supported by pruning; use a run with kind all")
  if not 0 < keep < moe.num_experts:
    raise UserError(f"--keep {keep} must be between 1 and {moe.num_experts - 1}, below moe.num_experts")
  if moe.router.kind not in ("top_k", "top_p", "dense"):
    raise UserError(
      f"router.kind={moe.router.kind!r} is not supported by pruning; use a run with top_k, top_p or dense"
    )
  if (groups := getattr(moe.router, "expert_groups", 1)) > 1:
    raise UserError(
      f"router.expert_groups={groups} is not supported by pruning, because groups must be equal; use a run with 1"
    )
  if moe.weights_on == "inputs":
    raise UserError(
      "moe.weights_on='inputs' is not supported by pruning, which compares weighted outputs of experts; use a run with "
      "'outputs'"
    )
  try:
    fewer = dataclasses.replace(moe, num_experts=keep, experts_per_token=min(keep, moe.experts_per_token))
  except UserError as error:
    raise UserError(
      f"--keep {keep} is not possible, because {error}; the router of a trained run cannot change, so keep more"
    ) from None
  return dataclasses.replace(model, moe=fewer)


def pruned_experiment(there: Experiment, directory: pathlib.Path, keep: int) -> Experiment:
  """The experiment of the new run: that of the trained run with fewer experts and another name.

  Raises:
    UserError: as `pruned_model`.
  """
  return dataclasses.replace(there, name=directory.absolute().name, model=pruned_model(there.model, keep))


def prune(
  model: AbstractModel,
  parameters: Parameters,
  spec: TrainSpec,
  directory: pathlib.Path,
  batches: Sequence[Batch],
  progress: Progress = SILENT,
) -> list[Pruned]:
  """Creates a run of the pruned model at step 0, and returns what each sparse layer keeps.

  Stacks of layers in `parameters` are deleted.

  Args:
    model: the trained model, for inference.
    parameters: its parameters.
    spec: of the new run.
    directory: of the new run.
    batches: the calibration text.
    progress: receives progress reports.
  """
  check_new_run(directory)
  assert spec.experiment.model.moe
  keep = spec.experiment.model.moe.num_experts
  model, parameters = unroll(model, parameters)
  chosen: dict[tuple[int, int], Pruned] = {}
  progress.stage("choose experts", total=model.config.num_layers)
  for layer in layer_inputs(model, parameters, batches):
    if "experts" in _block(parameters, layer.period, layer.block)["feed_forward"]:
      chosen[layer.period, layer.block] = choose(layer, keep)
    progress.advance(layer.period * model.config.period + layer.block + 1)
  progress.stage(f"write {directory}")
  save_first(spec, stacked_as(spec.model, pruned_parameters(parameters, chosen)), directory)
  return list(chosen.values())


def choose(layer: LayerInputs, keep: int) -> Pruned:
  """The `keep` experts of a sparse layer without the others of which its output changes least."""
  moe: MoE = layer.feed_forward.moe
  graph, state = nnx.split(layer.feed_forward)
  parts = [_gram(graph, state, x_BTD) for x_BTD in layer.inputs]
  logits_ME, gram_MEE = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))
  valid_M = np.concatenate([np.asarray(valid_BT).reshape(-1) for valid_BT in layer.valid])
  bias_E = None if layer.feed_forward.bias_E is None else np.asarray(layer.feed_forward.bias_E[...])
  losses = functools.partial(_losses, moe, keep, _one_device(), logits_ME, gram_MEE, valid_M, bias_E)
  E = moe.num_experts
  if math.comb(E, keep) <= MOST_SETS:
    sets = np.array(list(itertools.combinations(range(E), keep)))
    keeps_YE = np.zeros((len(sets), E), bool)
    np.put_along_axis(keeps_YE, sets, True, axis=1)
  else:
    keeps_YE = np.ones((1, E), bool)
    for _ in range(E - keep):
      keeps_YE = keeps_YE[:1] & ~np.eye(E, dtype=bool)[keeps_YE[0]]
      # Padded to E sets, so that one program compares those of every step.
      padded_YE = np.concatenate([keeps_YE, np.repeat(keeps_YE[:1], E - len(keeps_YE), axis=0)])
      best = int(np.argmin(np.asarray(losses(padded_YE)[0])[: len(keeps_YE)]))
      keeps_YE = keeps_YE[best : best + 1]
  loss_Y, whole, ratio = losses(keeps_YE)
  best = int(np.argmin(loss_Y))
  kept = tuple(int(e) for e in np.flatnonzero(keeps_YE[best]))
  error = math.sqrt(max(0.0, float(loss_Y[best])) / float(whole)) if whole > 0 else 0.0
  return Pruned(kept, error, float(ratio) if moe.experts_per_token > 1 else None)


def pruned_parameters(parameters: Parameters, chosen: dict[tuple[int, int], Pruned]) -> Parameters:
  """The parameters of unrolled layers, of which some keep these experts."""
  layers = {period: {"blocks": dict(of_period["blocks"])} for period, of_period in parameters["layers"].items()}
  for (period, block), pruned in chosen.items():
    kept = np.array(pruned.kept)
    whole = layers[period]["blocks"][block]
    feed_forward = dict(whole["feed_forward"])
    feed_forward["experts"] = {name: w[kept] for name, w in feed_forward["experts"].items()}
    for name in {"w_router_DE", "b_router_E", "bias_E"} & set(feed_forward):
      feed_forward[name] = feed_forward[name][..., kept]
    layers[period]["blocks"][block] = whole | {"feed_forward": feed_forward}
  return {**parameters, "layers": layers}


def _block(parameters: Parameters, period: int, block: int) -> dict[str, Any]:
  return parameters["layers"][period]["blocks"][block]


def _one_device() -> Partitioner:
  return make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])


@functools.partial(jax.jit, static_argnums=0)
def _gram(graph: nnx.GraphDef, state: nnx.State, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The logits of the router, and the products of the outputs of every two experts, for each token.

  The change of a layer's output is a weighted sum of the outputs of its experts, so that its norm follows from these.
  """
  layer = nnx.merge(graph, state)
  router_DE = layer.w_router_DE[...]
  weights = layer.experts.weights(jnp.float32)

  def of_sequence(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TD = x_TD.astype(jnp.float32)

    def expert(weights: Weights) -> jax.Array:
      def times(x: jax.Array, name: str) -> jax.Array:
        return x @ weights[name].value + (weights.biases[name][None] if name in weights.biases else 0.0)

      gate_TF = times(x_TD, "gate") if "gate" in weights else None
      return times(weights.activate(gate_TF, times(x_TD, "up")), "down")

    out_ETD = jax.lax.map(expert, weights)
    logits_TE = exact_product("TD,DE->TE", x_TD, router_DE)
    if layer.b_router_E is not None:
      logits_TE = logits_TE + layer.b_router_E[...][None]
    return logits_TE, jnp.einsum("ETD,FTD->TEF", out_ETD, out_ETD)

  return tuple(x.reshape(-1, *x.shape[2:]) for x in jax.lax.map(of_sequence, x_BTD))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _losses(
  moe: MoE,
  keep: int,
  partitioner: Partitioner,
  logits_ME: jax.Array,
  gram_MEE: jax.Array,
  valid_M: jax.Array,
  bias_E: jax.Array | None,
  keeps_YE: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The squared change of the output for each set of kept experts, the squared output of all experts, and the median
  ratio of the weight of the second choice to that of the first."""

  def weights_of(keeps_E: jax.Array, active: int) -> Any:
    # A dropped expert has a logit of minus infinity, so that no token chooses it.
    bias = None if bias_E is None else jnp.where(keeps_E, bias_E, -jnp.inf)
    context = RouterContext(
      dataclasses.replace(moe, experts_per_token=active), valid_M[None, None], partitioner, bias_E=bias
    )
    return route(moe.router, jnp.where(keeps_E[None], logits_ME, -jnp.inf)[None, None], context)

  def of_expert(routing: Any) -> jax.Array:
    return routing.weights_OUME(moe.num_experts)[0, 0]

  def squared(weights_ME: jax.Array) -> jax.Array:
    return jnp.einsum("ME,MEF,MF->", weights_ME, gram_MEE, weights_ME)

  active = moe.experts_per_token if moe.router.every_expert else min(moe.experts_per_token, keep)
  everything = weights_of(jnp.ones(moe.num_experts, bool), moe.experts_per_token)
  whole_ME = of_expert(everything)
  loss_Y = jax.lax.map(lambda keeps_E: squared(of_expert(weights_of(keeps_E, active)) - whole_ME), keeps_YE)
  best_M2 = jax.lax.top_k(whole_ME, min(2, moe.num_experts))[0]
  ratio = jnp.nanmedian(jnp.where(valid_M, best_M2[:, -1] / best_M2[:, 0], jnp.nan))
  return loss_Y, squared(whole_ME), ratio
