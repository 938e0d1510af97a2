"""Converts a dense model to a mixture of experts that initially computes the same function (arXiv 2212.05055).

Each expert is initialized as a copy of the dense feed-forward layer, or as one of `granularity` slices of it. The
columns of the router are equal for the slices of one copy (arXiv 2410.07524), so that a token is sent to all slices of
its copies. For each slice, the weights sum to 1, so that the output equals that of the dense layer.

D embed  E experts  F hidden
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import checks
from moejax.config.dispatch import GroupedDispatch
from moejax.config.experiment import Experiment
from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.router import TopKRouter
from moejax.data.corpus import build_corpus
from moejax.data.text import open_text
from moejax.data.tokenizers import make_tokenizer
from moejax.errors import UserError
from moejax.inference.load import Loaded, load_run
from moejax.inference.unrolled import unroll
from moejax.interop.distill import distill
from moejax.interop.first_checkpoint import check_new_run, save_first, spec_of_new_run, stacked_as
from moejax.interop.layer_inputs import Batch, calibration_batches
from moejax.interop.same_function import differences
from moejax.models.abstract import Parameters
from moejax.progress import SILENT, Progress
from moejax.training.prepare import on_devices
from moejax.training.run_directory import read_experiment
from moejax.training.state import TrainSpec

ROUTER_DEVIATION = 1.0
"""Standard deviation of the router's logits at the start, for an input of unit variance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycling:
  """How a dense model becomes sparse."""

  experts: int
  """Number of copies of each dense feed-forward layer."""
  active: int = 2
  """Number of copies per token."""
  granularity: int = 1
  """Number of slices of a copy. Each slice is an expert."""
  every: int = 1
  """Every n-th layer becomes sparse."""
  noise: float = 0.0
  """Standard deviation of the noise that is added to the weights of experts, relative to that of the matrix. With
  noise, the initial function is only approximately that of the dense model."""
  seed: int = 0
  """Seed of the weights of the router and of the noise."""
  distill_tokens: int = 0
  """Number of tokens of the training text on which each sparse layer is trained to compute what the dense layer does
  (LaDiMo, arXiv 2408.04278). `active` is then the number of experts per token, which may be fewer than the slices of
  one copy, and the initial function is only approximately that of the dense model. 0: no distillation."""

  def __post_init__(self) -> None:
    checks.positive(self, "experts", "active", "granularity", "every")
    checks.not_negative(self, "noise")
    checks.not_negative(self, "distill_tokens", largest=checks.LARGEST_INTEGER)
    checks.seed(self, "seed")
    if self.distill_tokens:
      if self.active > self.experts * self.granularity:
        raise UserError(
          f"active={self.active} is more than the {self.experts * self.granularity} experts (experts x granularity); "
          "use at most that"
        )
      if self.active == 1:
        raise UserError("active=1 is not supported: with a weight of 1, the router would receive no gradient; use 2")
      return
    if self.active > self.experts:
      raise UserError(f"active={self.active} is more than experts={self.experts}; use at most {self.experts}")
    if self.active * self.granularity == 1:
      raise UserError(
        "active=1 with granularity=1 is not supported: with a weight of 1, the router would receive no gradient, and "
        "with other weights, the model would differ from the dense model; use active=2 or granularity=2"
      )


def upcycled_model(model: Model, how: Upcycling) -> Model:
  """The sparse model of a dense one.

  Raises:
    UserError: If the model has sparse layers, or cannot be divided into these slices or layers.
  """
  if model.moe is not None:
    raise UserError(f"the run has sparse layers (moe.num_experts={model.moe.num_experts}); use a dense run")
  if model.multi_token_depth:
    raise UserError(
      f"model.multi_token_depth={model.multi_token_depth} is not supported by upcycling: the modules would have other "
      "layers; use a run without it"
    )
  if model.depths.is_routed:
    raise UserError(f"model.depths.kind={model.depths.kind} is not supported by upcycling; use a run with kind all")
  if model.feed_forward.kind != "mlp":
    raise UserError(f"model.feed_forward={model.feed_forward.kind!r} is not supported by upcycling; use a run with mlp")
  checks.divides(how.granularity, "granularity", model.d_ff, "model.d_ff")
  moe = MoE(
    num_experts=how.experts * how.granularity,
    experts_per_token=how.active if how.distill_tokens else how.active * how.granularity,
    d_ff=model.d_ff // how.granularity,
    every=how.every,
    dispatch=GroupedDispatch(),
    router=TopKRouter(renormalize=True, scale=float(how.granularity)),
  )
  return dataclasses.replace(model, moe=moe)


def upcycled_experiment(
  dense: Experiment, directory: pathlib.Path, how: Upcycling, load_balance: float | None
) -> Experiment:
  """Makes the experiment for training the sparse model: that of the dense run with another model and name.

  Raises:
    UserError: If the model cannot be converted (see `upcycled_model`), or `load_balance` is missing.
  """
  model = upcycled_model(dense.model, how)
  if load_balance is None:
    raise UserError(
      "training of sparse layers needs the coefficient of the load-balancing loss; set --load-balance X, such as 0.01, "
      "or 0 for no loss"
    )
  losses = dataclasses.replace(dense.training.losses, load_balance=load_balance)
  return dataclasses.replace(
    dense,
    name=directory.absolute().name,
    model=model,
    training=dataclasses.replace(dense.training, losses=losses),
    matchable=("model.moe.d_ff",),
  )


def upcycle(
  run: pathlib.Path, directory: pathlib.Path, experiment: Experiment, how: Upcycling, progress: Progress = SILENT
) -> None:
  """Creates a run of this experiment at step 0 from the latest checkpoint of a dense run.

  Raises:
    UserError: If the directory contains a run, or the model of the experiment does not match `how`.
  """
  there = read_experiment(run)
  for path, ours, theirs in differences(experiment.model, upcycled_model(there.model, how)):
    raise UserError(
      f"model.{path}={ours!r} must be {theirs!r}, as the options and {run} determine it; change --experts, --active, "
      "--granularity or --every, or remove it"
    )
  check_new_run(directory)
  (placed,) = on_devices([experiment], make_tokenizer(experiment.data.tokenizer))
  spec = spec_of_new_run(placed, directory)
  progress.stage(f"read {run}")
  there = dataclasses.replace(there, mesh=placed.experiment.mesh, rules=placed.experiment.rules)
  dense = load_run(run, there, progress.note)
  progress.stage(f"write {directory}")
  if how.distill_tokens:
    corpus = build_corpus(open_text(there.data, run), run / "corpus")
    batches = calibration_batches(corpus, there, how.distill_tokens)
    parameters = distilled_parameters(dense, spec.experiment, how, batches, progress)
    save_first(spec, stacked_as(spec.model, parameters), directory)
    return
  save_first(spec, converted(dense, spec, how), directory)


def converted(dense: Loaded, spec: TrainSpec, how: Upcycling) -> Parameters:
  """The parameters of the sparse model of `spec`, on its devices, whose experts are copies of dense layers."""

  def make(parameters: Parameters, key: jax.Array) -> Parameters:
    return upcycled_parameters(parameters, dense.experiment.model, spec.experiment.model, how, key)

  return jax.jit(make, out_shardings=spec.model.shardings)(dense.parameters, jax.random.key(how.seed))


def distilled_parameters(
  dense: Loaded, sparse: Experiment, how: Upcycling, batches: Sequence[Batch], progress: Progress = SILENT
) -> Parameters:
  """The parameters of the sparse model with unrolled layers, whose sparse layers are distilled from dense ones."""
  model, parameters = unroll(dense.model, dense.parameters)
  key = jax.random.key(how.seed)
  apart = dataclasses.replace(sparse.model, layers="unrolled")
  made = jax.jit(lambda parameters: upcycled_parameters(parameters, model.config, apart, how, key))(parameters)
  sparse_blocks = [
    made["layers"][period]["blocks"][block] for period in range(apart.num_periods) for block in _sparse_blocks(apart)
  ]
  load_balance = sparse.training.losses.load_balance
  starts = [block["feed_forward"] for block in sparse_blocks]
  layers = distill(model, parameters, apart, starts, batches, load_balance, progress)
  for block, layer in zip(sparse_blocks, layers, strict=True):
    block["feed_forward"] = layer
  return made


def _sparse_blocks(model: Model) -> range:
  """The sparse layers of a period."""
  assert model.moe
  return range(model.moe.every - 1, model.period, model.moe.every)


def upcycled_parameters(
  parameters: Parameters, dense: Model, sparse: Model, how: Upcycling, key: jax.Array
) -> Parameters:
  """Computes the parameters of the sparse model. Must be called under `jax.jit`."""
  layers = parameters["layers"]
  if dense.layers != sparse.layers:
    layers = _stacked(layers) if sparse.layers == "scanned" else _apart(layers, dense.num_periods)
  longer = sparse.period // dense.period  # A period of the sparse model has this number of those of the dense one.

  def block_of(number: int, first: int) -> dict[str, Any]:
    """The parameters of a layer of the sparse model, by its number in the period that begins at layer `first`."""
    period, block = divmod(number, dense.period)
    if sparse.layers == "scanned":
      found = jax.tree.map(lambda x: x[period::longer], layers["blocks"][block])
    else:
      found = layers[first // dense.period + period]["blocks"][block]
    if number not in _sparse_blocks(sparse):
      return found
    return found | {"feed_forward": _experts(found["feed_forward"], how, jax.random.fold_in(key, first + number))}

  def period_from(first: int) -> dict[str, Any]:
    return {"blocks": {number: block_of(number, first) for number in range(sparse.period)}}

  if sparse.layers == "scanned":
    return {**parameters, "layers": period_from(0)}
  return {**parameters, "layers": {p: period_from(p * sparse.period) for p in range(sparse.num_periods)}}


def _stacked(layers: dict[int, Any]) -> Any:
  """Unrolled periods as stacks."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[period] for period in sorted(layers)))


def _apart(layers: Any, periods: int) -> dict[int, Any]:
  """Stacked periods one by one."""
  return {period: jax.tree.map(lambda x, period=period: x[period], layers) for period in range(periods)}


def _experts(feed_forward: dict[str, jax.Array], how: Upcycling, key: jax.Array) -> dict[str, Any]:
  """Converts a dense layer to a sparse layer. Both can have leading dimensions, such as that of periods."""
  E, G = how.experts, how.granularity

  def copies(name: str, w: jax.Array, number: int) -> jax.Array:
    *P, rows, columns = w.shape
    if name == "w_down_FD":
      slices = w.reshape(*P, G, rows // G, columns)
    else:
      slices = jnp.moveaxis(w.reshape(*P, rows, G, columns // G), -2, -3)
    copied = jnp.broadcast_to(jnp.expand_dims(slices, len(P)), (*P, E, *slices.shape[len(P) :]))
    experts = copied.reshape(*P, E * G, *slices.shape[len(P) + 1 :])
    if not how.noise:
      return experts
    drawn = jax.random.normal(jax.random.fold_in(key, number), experts.shape, w.dtype)
    return experts + how.noise * jnp.std(w, axis=(-2, -1))[..., None, None, None] * drawn

  names = {"w_gate_DF": "w_gate_EDF", "w_up_DF": "w_up_EDF", "w_down_FD": "w_down_EFD"}
  experts = {names[name]: copies(name, w, i) for i, (name, w) in enumerate(sorted(feed_forward.items()), 1)}
  up = feed_forward["w_up_DF"]
  *P, D, _ = up.shape
  # Without distillation, the columns of the slices of a copy are equal, so that they are chosen together.
  columns = E * G if how.distill_tokens else E
  router = jax.random.normal(jax.random.fold_in(key, 0), (*P, D, columns), up.dtype) * ROUTER_DEVIATION * D**-0.5
  return {"w_router_DE": jnp.repeat(router, E * G // columns, axis=-1), "experts": experts}
