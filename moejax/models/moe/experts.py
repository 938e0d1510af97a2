"""The feed-forward layers of the experts, stacked.

O outer batch  U routing groups  M tokens  R routed rows  D embed  F hidden  E experts
X = E x F, or F or D  Y = O x U x M
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config.model import Activation, Model
from moejax.kernels.grouped_eight_bits import RoundedMatrices
from moejax.models.activations import activate
from moejax.models.products import Operand, operand, product
from moejax.models.remat import keep, of_kept
from moejax.models.weights import residual_gain, weight
from moejax.partitioning import Partitioner

_INTO, _OUT_OF = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
NAMES = {"gate": _INTO, "up": _INTO, "down": _OUT_OF}
"""Logical axes of the weights into and out of the hidden layer."""

NAMES_OF_BIASES = {"gate": ("experts", "expert_mlp"), "up": ("experts", "expert_mlp"), "down": ("experts", None)}
"""Logical axes of the biases."""

FEW = 32
"""Number of tokens up to which, on CPU, reading the matrices takes longer than the products."""

Matrices = jax.Array | tuple[jax.Array, ...] | RoundedMatrices
"""The matrices of all experts: a stack or, for generation, arrays of their own or rounded to 8 bits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """The parameters of experts in the dtype of activations."""

  matrices: dict[str, Operand]
  """`gate` [E, D, F] if the activation has one, `up` [E, D, F] and `down` [E, F, D]."""
  biases: dict[str, jax.Array]
  """Of each matrix [E, F] or [E, D]. Empty without biases."""
  activation: Activation = dataclasses.field(metadata={"static": True})

  def __getitem__(self, name: str) -> Operand:
    return self.matrices[name]

  def __contains__(self, name: str) -> bool:
    return name in self.matrices

  def activate(self, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """The hidden units."""
    return activate(self.activation, gate, up)

  def biased(self, name: str, x_ERX: jax.Array) -> jax.Array:
    """Adds the bias of each expert to its rows."""
    return x_ERX + self.biases[name][:, None] if name in self.biases else x_ERX


class Experts(nnx.Module):
  """E feed-forward layers, each with its own rows."""

  def __init__(self, model: Model, partitioner: Partitioner, rngs: nnx.Rngs):
    assert model.moe
    E, D, F = model.moe.num_experts, model.d_model, model.moe.d_ff
    self.w_gate_EDF = weight(rngs, (E, D, F), NAMES["gate"], fan_in=D) if model.is_gated else None
    self.w_up_EDF = weight(rngs, (E, D, F), NAMES["up"], fan_in=D)
    self.w_down_EFD = weight(rngs, (E, F, D), NAMES["down"], fan_in=F, gain=residual_gain(model.num_layers))
    biased = model.moe.bias
    self.b_gate_EF = nnx.Param(jnp.zeros((E, F)), names=NAMES_OF_BIASES["gate"]) if biased and model.is_gated else None
    self.b_up_EF = nnx.Param(jnp.zeros((E, F)), names=NAMES_OF_BIASES["up"]) if biased else None
    self.b_down_ED = nnx.Param(jnp.zeros((E, D)), names=NAMES_OF_BIASES["down"]) if biased else None
    self.activation = model.activation
    self.gradients, self.bits = model.gradient_dtype, model.precision.experts
    self.partitioner = partitioner

  def weights(self, dtype: jnp.dtype) -> Weights:
    """The weights in the dtype of the activations."""
    held = {"gate": self.w_gate_EDF, "up": self.w_up_EDF, "down": self.w_down_EFD}
    biases = {"gate": self.b_gate_EF, "up": self.b_up_EF, "down": self.b_down_ED}
    return Weights(
      {name: self._operand(w.get_value(), dtype) for name, w in held.items() if w is not None},
      {name: b[...].astype(dtype) for name, b in biases.items() if b is not None},
      self.activation,
    )

  def _operand(self, matrices: Matrices, dtype: jnp.dtype) -> Operand:
    if isinstance(matrices, tuple):
      # Only `visit_experts` uses this operand. It converts the matrices of the experts that it visits.
      return Operand(matrices, None)  # type: ignore[arg-type]
    if isinstance(matrices, RoundedMatrices):
      return Operand(matrices, None, self.bits)  # type: ignore[arg-type]
    return operand(matrices, dtype, self.gradients, self.bits)

  def on_capacity(self, x_OERD: jax.Array) -> jax.Array:
    """Applies each expert to its R rows of each outer batch; returns out_OERD."""
    constrain = self.partitioner.constrain
    O, E, R, D = x_OERD.shape
    weights = self.weights(x_OERD.dtype)
    with jax.named_scope("experts"):
      # E is first and all rows are one dimension: a batched product that is fast on each backend. With O next to E it
      # takes 1.6 times as long on CPU. O leads the rows, so that its shards stay on their devices.
      x_ERD = constrain(x_OERD.swapaxes(0, 1).reshape(E, O * R, D), "experts", "outer", "act_embed")

      def hidden(x_ERF: jax.Array) -> jax.Array:
        return constrain(x_ERF, "experts", "outer", "expert_mlp")

      def wide(x_ERD: jax.Array, into: dict[str, Operand]) -> dict[str, jax.Array]:
        return {name: hidden(product("ERD,EDF->ERF", x_ERD, w_EDF)) for name, w_EDF in into.items()}

      # The rows are saved after the all-to-all. Before it, the backward pass would repeat the all-to-all.
      into = {name: weights[name] for name in ("gate", "up") if name in weights}
      wide_ERF = {name: keep(x_ERF, "experts_in") for name, x_ERF in of_kept(wide, "expert_rows")(x_ERD, into).items()}
      wide_ERF = {name: weights.biased(name, x_ERF) for name, x_ERF in wide_ERF.items()}
      hidden_ERF = hidden(weights.activate(wide_ERF.get("gate"), wide_ERF["up"]))
      out_ERD = weights.biased("down", product("ERF,EFD->ERD", hidden_ERF, weights["down"]))
      out_ERD = constrain(out_ERD, "experts", "outer", "act_embed")
    return out_ERD.reshape(E, O, R, D).swapaxes(0, 1)

  def on_all(self, x_OUMD: jax.Array, weights_OUME: jax.Array) -> jax.Array:
    """Applies every expert to every token, as two wide products; returns the weighted sums out_OUMD."""
    weights = self.weights(x_OUMD.dtype)
    E, D, F = weights["up"].shape
    tokens = x_OUMD.shape[:3]
    x_YD = x_OUMD.reshape(-1, D)  # flattened: twice as fast backwards on CPU
    few = self.partitioner.platform == "cpu" and len(x_YD) <= FEW

    def times(w_EDF: Operand) -> jax.Array:
      if few:  # without a transposed copy of the matrices, which takes four times as long as the product
        x_EYD = jnp.broadcast_to(x_YD[None], (E, *x_YD.shape))
        return product("EYD,EDF->EYF", x_EYD, w_EDF).swapaxes(0, 1)
      return product("YD,DX->YX", x_YD, jax.tree.map(lambda w: w.swapaxes(0, 1).reshape(D, E * F), w_EDF))

    def wide(matrix: str) -> jax.Array:
      hidden_YX = times(weights[matrix])
      names = ("outer", "groups", "group_tokens", None, "expert_mlp")
      hidden_OUMEF = keep(self.partitioner.constrain(hidden_YX.reshape(*tokens, E, F), *names), "experts_in")
      return hidden_OUMEF + weights.biases[matrix][None, None, None] if matrix in weights.biases else hidden_OUMEF

    with jax.named_scope("experts"):
      hidden_OUMEF = weights.activate(wide("gate") if "gate" in weights else None, wide("up"))
      hidden_OUMEF = hidden_OUMEF * weights_OUME[..., None].astype(x_OUMD.dtype)
      w_XD = jax.tree.map(lambda w: w.reshape(E * F, D), weights["down"])
      out_YD = product("YX,XD->YD", hidden_OUMEF.reshape(-1, E * F), w_XD)
      if "down" in weights.biases:
        weights_YE = weights_OUME.reshape(-1, E).astype(out_YD.dtype)
        out_YD = out_YD + jnp.einsum("YE,ED->YD", weights_YE, weights.biases["down"])
      return out_YD.reshape(x_OUMD.shape)
