"""The transformer's shape and precision."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.moe import MoE
from moejax.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16"]
Layers = Literal["scanned", "unrolled"]
Remat = Literal["none", "products", "dots", "attention", "layer_inputs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU, optional sparse layers."""

  num_layers: int
  """Transformer layers (L)."""
  d_model: int
  """Width of the residual stream (D)."""
  num_heads: int
  """Query heads (N)."""
  num_kv_heads: int
  """Key and value heads (K); divides num_heads."""
  head_dim: int
  """Width of one head (H), even."""
  d_ff: int
  """SwiGLU hidden width of a dense layer (F)."""
  vocab_size: int
  """Rows of the embedding (V); at least the tokenizer's size."""
  tie_embeddings: bool = True
  """Whether the output projection is the embedding transposed."""
  qk_norm: bool = False
  """Whether queries and keys are RMS-normalised per head before the rotation."""
  rope_theta: float = 10_000.0
  """Base of the rotary wavelengths (arXiv 2104.09864)."""
  norm_epsilon: float = 1e-5
  """Added to the mean square in RMSNorm."""
  logit_cap: float | None = None
  """Logits become cap x tanh(logits / cap); None leaves them as they are."""
  moe: MoE | None = None
  """The sparse layers; None makes every layer dense."""
  compute_dtype: Dtype = "auto"
  """Type of activations and matrix products; auto is float32 on CPU and bfloat16 elsewhere. Parameters are float32."""
  remat: Remat = "none"
  """What the backward pass may keep of a layer: none recomputes nothing, products keeps attention and all matrix
  products, dots those of them without a batch dimension (not those of experts), attention keeps queries, keys, values
  and what attention makes of them, layer_inputs keeps only what enters each layer."""
  layers: Layers = "scanned"
  """scanned keeps the weights of all layers in one array and compiles one layer, however many there are; unrolled keeps
  them apart and compiles each: faster for small models on CPU, where taking a layer's part copies it."""

  def __post_init__(self):
    checks.positive(
      self, "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size", "rope_theta",
      "norm_epsilon",
    )  # fmt: skip
    if self.logit_cap is not None:
      checks.positive(self, "logit_cap")
    checks.one_of(self, "compute_dtype", get_args(Dtype))
    checks.one_of(self, "remat", get_args(Remat))
    checks.one_of(self, "layers", get_args(Layers))
    checks.divides(self.num_kv_heads, "model.num_kv_heads", self.num_heads, "model.num_heads")
    checks.divides(2, "rotary pair", self.head_dim, "model.head_dim")
    if self.moe and self.moe.every > self.num_layers:
      raise UserError(
        f"moe.every={self.moe.every} is more than model.num_layers={self.num_layers}, so no layer would be sparse; "
        "lower moe.every or set moe to None"
      )
    checks.divides(self.period, "moe.every", self.num_layers, "model.num_layers")

  @property
  def period(self) -> int:
    """Layers after which the pattern of dense and sparse layers repeats."""
    return self.moe.every if self.moe else 1

  @property
  def num_periods(self) -> int:
    """Repetitions of the pattern: what the scan over layers runs over."""
    return self.num_layers // self.period

  @property
  def num_sparse_layers(self) -> int:
    """Layers whose feed-forward is a mixture of experts."""
    return self.num_periods if self.moe else 0
