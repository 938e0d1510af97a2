"""The transformer's shape and precision."""

import dataclasses
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.moe import MoE
from moejax.config.resume import RUN_MAY_CHANGE
from moejax.errors import UserError

Activation = Literal["swiglu", "gelu"]
Dtype = Literal["auto", "float32", "bfloat16"]
Layers = Literal["scanned", "unrolled"]
GradientDtype = Literal["float32", "compute"]
Remat = Literal["none", "products", "dots", "attention", "layer_inputs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, optional sparse layers."""

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
  """Hidden width of a dense layer (F)."""
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
  activation: Activation = "swiglu"
  """Of feed-forward layers and experts: swiglu has three matrices (arXiv 2002.05202), gelu two."""
  attention_experts: int | None = None
  """Mixture of attention heads (MoA, arXiv 2404.05567, equations 7 and 8): the query heads are this many experts of
  num_kv_heads heads each, which share the keys and values, and a softmax router weighs them; None has no router."""
  logit_cap: float | None = None
  """Logits become cap x tanh(logits / cap); None leaves them as they are."""
  moe: MoE | None = None
  """The sparse layers; None makes every layer dense."""
  compute_dtype: Dtype = "auto"
  """Type of activations and matrix products; auto is float32 on CPU and bfloat16 elsewhere. Parameters are float32."""
  gradient_dtype: GradientDtype = "float32"
  """Type in which each device computes its part of the gradients of matrices, and in which devices add these up;
  compute is the type of activations: half the bytes over links, each part rounded to 8 bits where it is bfloat16."""
  remat: Remat = dataclasses.field(default="none", metadata=RUN_MAY_CHANGE)
  """What the backward pass may keep of a layer: none recomputes nothing, products keeps attention, matrix products and
  the rows that experts get and give, dots those products without a batch dimension (not those of experts), attention
  keeps queries, keys, values and what attention makes of them, layer_inputs only what enters each layer."""
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
    checks.one_of(self, "activation", get_args(Activation))
    checks.one_of(self, "compute_dtype", get_args(Dtype))
    checks.one_of(self, "gradient_dtype", get_args(GradientDtype))
    if self.gradient_dtype == "compute" and self.compute_dtype == "float32":
      raise UserError(
        "model.gradient_dtype='compute' has no effect with model.compute_dtype='float32'; set it to 'float32', or "
        "compute_dtype to 'bfloat16'"
      )
    checks.one_of(self, "remat", get_args(Remat))
    checks.one_of(self, "layers", get_args(Layers))
    checks.divides(self.num_kv_heads, "model.num_kv_heads", self.num_heads, "model.num_heads")
    checks.divides(2, "rotary pair", self.head_dim, "model.head_dim")
    if self.attention_experts is not None and self.attention_experts * self.num_kv_heads != self.num_heads:
      raise UserError(
        f"model.attention_experts={self.attention_experts} with {self.num_kv_heads} heads each (model.num_kv_heads) "
        f"makes {self.attention_experts * self.num_kv_heads} query heads and model.num_heads={self.num_heads}; "
        "let them be equal"
      )
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

  @property
  def feed_forward_matrices(self) -> int:
    """Matrices of a feed-forward layer or an expert: gate, up and down, or up and down."""
    return 3 if self.activation == "swiglu" else 2

  @property
  def auxiliary_losses(self) -> tuple[str, ...]:
    """Losses that the layers return, as fields of training.losses."""
    of_attention = ("attention_mutual_information",) if self.attention_experts else ()
    return (*(self.moe.losses if self.moe else ()), *of_attention)
