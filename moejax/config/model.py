"""Shape and precision of the transformer."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

from moejax.config import checks
from moejax.config.attention import Attention
from moejax.config.depths import Depths
from moejax.config.feed_forward import FeedForward
from moejax.config.moe import MoE
from moejax.config.plain import typed
from moejax.config.precision import Precision
from moejax.config.remat import OF_EXPERTS, Remat, Saved, policies_that_save, saved_values, values_of
from moejax.config.resume import RUN_MAY_CHANGE
from moejax.errors import UserError

Activation = Literal["swiglu", "gelu", "geglu", "swiglu_clipped"]
Dtype = Literal["auto", "float32", "bfloat16"]
Layers = Literal["scanned", "unrolled"]
QkNormOver = Literal["head", "all_heads"]
Norm = Literal["rms", "zero_centered_rms", "layer"]
NormPlaces = Literal["before", "after", "both"]
GradientDtype = Literal["float32", "compute"]

OF_PROGRAM = (
  "compute_dtype", "gradient_dtype", "precision", "logit_chunks", "remat", "save_activations", "offload_activations",
  "layers",
)  # fmt: skip
"""Fields of a model that only affect how it is computed, up to rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A decoder-only transformer: normalization, rotary positions, grouped-query attention, optional sparse layers."""

  num_layers: int
  """Number of transformer layers (L)."""
  d_model: int
  """Width of the residual stream (D)."""
  num_heads: int
  """Number of query heads (N)."""
  num_kv_heads: int
  """Number of key and value heads (K). Must divide num_heads."""
  head_dim: int
  """Dimension of one head (H). Must be even."""
  attention: tuple[Attention, ...] = (Attention(),)
  """The attention layers of a period, which is repeated: layer i has the one at i modulo their number. In Python, the
  kind alone, such as "latent", selects a layer with default fields."""
  d_ff: int
  """Hidden dimension of a dense feed-forward layer (F)."""
  feed_forward: FeedForward = FeedForward()
  """The feed-forward layer of dense layers."""
  vocab_size: int
  """Number of rows of the embedding (V). Must be at least the size of the tokenizer's vocabulary."""
  tie_embeddings: bool = True
  """Whether the output projection is the transposed embedding."""
  qk_norm: bool = False
  """Whether to apply RMSNorm to queries and keys, before the rotary embedding."""
  qk_norm_over: QkNormOver = "head"
  """Dimensions over which QK-norm computes the mean square. head: each head (Qwen3). all_heads: all heads of a token
  (OLMoE)."""
  attention_bias: bool = False
  """Whether queries, keys and values have a bias (Qwen2)."""
  rope_theta: float = 10_000.0
  """Base of the wavelengths of the rotary embedding (arXiv 2104.09864)."""
  norm: Norm = "rms"
  """Normalization. rms: RMSNorm (arXiv 1910.07467). zero_centered_rms: RMSNorm whose scale is 1 plus a parameter
  (Gemma). layer: LayerNorm with a scale and a bias (arXiv 1607.06450); QK-norm and latent attention have RMSNorm."""
  norm_places: NormPlaces = "before"
  """Which norms each attention and feed-forward layer has. before: of its input. after: of its output, before it is
  added to the residual stream (OLMo 2). both: of both (Gemma 3)."""
  norm_epsilon: float = 1e-5
  """Epsilon of the norms, added to the mean square or the variance."""
  embedding_scale: float = 1.0
  """Factor of the embedding of a token (Gemma: the square root of d_model). The output projection is not scaled."""
  activation: Activation = "swiglu"
  """Activation of feed-forward layers and experts. swiglu and geglu have three matrices (arXiv 2002.05202), gelu has
  two. swiglu_clipped: (up + 1) x gate x sigmoid(1.702 x gate), of which gate is at most 7 and up between -7 and 7
  (gpt-oss). GELU is computed by its tanh approximation."""
  attention_experts: int | None = None
  """Mixture of attention heads (MoA, arXiv 2404.05567, equations 7 and 8): the query heads form this number of experts
  with num_kv_heads heads each. They share keys and values, and are weighted by a softmax router. None: standard
  attention."""
  logit_cap: float | None = None
  """Softcap of the output logits: cap x tanh(logits / cap). None does not cap them."""
  logit_chunks: int = dataclasses.field(default=1, metadata=RUN_MAY_CHANGE)
  """Number of parts of each sequence whose logits and cross-entropy are computed one after the other, and again in the
  backward pass. With a large vocabulary, this reduces the memory of logits by that factor, at the cost of one more
  product with the vocabulary. Must divide data.sequence_length."""
  multi_token_depth: int = 0
  """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): number of additional modules (D), each with a
  layer like the last one. Module k predicts the token k + 1 positions ahead, for training.losses.multi_token. They are
  trained with the model, and not used to evaluate it or to generate text."""
  depths: Depths = Depths()
  """Mixture of depths: which tokens go through which layers. In Python, the kind alone, such as "top_k", selects a
  mixture with default fields."""
  moe: MoE | None = None
  """The sparse layers. None makes every layer dense."""
  compute_dtype: Dtype = "auto"
  """Dtype of activations and matrix products. auto: float32 on CPU, bfloat16 elsewhere. Parameters are float32."""
  gradient_dtype: GradientDtype = "float32"
  """Dtype in which each device computes its part of the gradients of matrices, and in which these parts are summed over
  devices. compute: the dtype of activations. With bfloat16, half as many bytes are communicated, and each part is
  rounded to 8 bits of precision."""
  precision: Precision = Precision()
  """8-bit matrix products, by kind of layer. The default has none."""
  remat: Remat = dataclasses.field(default="none", metadata=RUN_MAY_CHANGE)
  """Which values of each layer are saved for the backward pass; the others are recomputed. none: save everything.
  products: save attention, matrix products, and the inputs and outputs of experts. dots: save matrix products without a
  batch dimension (not those of experts). attention: save queries, keys, values, and the context and the output of
  attention. layer_inputs: save only the inputs of layers. selected: save these and save_activations."""
  save_activations: tuple[Saved, ...] = dataclasses.field(default=(), metadata=RUN_MAY_CHANGE)
  """What remat="selected" saves besides the inputs of layers: queries, keys_values, context (the output of the
  attention kernel), attention_out (the output of the layer), feed_forward_in and feed_forward_out (the products into
  and out of the hidden layer), and of experts expert_rows (their inputs), experts_in and experts_out. attention: all of
  the first four. products: all of the others."""
  offload_activations: tuple[Saved, ...] = dataclasses.field(default=(), metadata=RUN_MAY_CHANGE)
  """Which of the values that remat saves by name are kept in host memory between the forward and the backward pass: the
  names of save_activations, or layer_inputs."""
  layers: Layers = "scanned"
  """scanned: stack the weights of all layers and compile one layer (`jax.lax.scan`). unrolled: compile every layer
  separately, which is faster for small models on CPU, where slicing stacked weights copies them."""

  def __post_init__(self) -> None:
    checks.positive(
      self, "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size", "rope_theta",
      "norm_epsilon", "logit_chunks", "embedding_scale",
    )  # fmt: skip
    checks.not_negative(self, "multi_token_depth")
    if self.logit_cap is not None:
      checks.positive(self, "logit_cap")
      checks.between(self, "logit_cap", 1e-6, 1e6)  # far above, logits / cap would be 0 in float32
    checks.one_of(self, "activation", get_args(Activation))
    checks.one_of(self, "norm", get_args(Norm))
    checks.one_of(self, "norm_places", get_args(NormPlaces))
    checks.one_of(self, "compute_dtype", get_args(Dtype))
    checks.one_of(self, "gradient_dtype", get_args(GradientDtype))
    if self.gradient_dtype == "compute" and self.compute_dtype == "float32":
      raise UserError(
        "model.gradient_dtype='compute' has no effect with model.compute_dtype='float32'; set it to 'float32', or "
        "compute_dtype to 'bfloat16'"
      )
    self._check_remat()
    checks.one_of(self, "layers", get_args(Layers))
    checks.one_of(self, "qk_norm_over", get_args(QkNormOver))
    if self.qk_norm_over != "head" and not self.qk_norm:
      raise UserError(
        f"model.qk_norm_over={self.qk_norm_over!r} would have no effect with model.qk_norm=False; set it to 'head' or "
        "qk_norm to True"
      )
    checks.divides(self.num_kv_heads, "model.num_kv_heads", self.num_heads, "model.num_heads")
    checks.divides(2, "rotary pair", self.head_dim, "model.head_dim")
    if self.attention_experts is not None and self.attention_experts * self.num_kv_heads != self.num_heads:
      raise UserError(
        f"model.attention_experts={self.attention_experts} with {self.num_kv_heads} heads each (model.num_kv_heads) "
        f"makes {self.attention_experts * self.num_kv_heads} query heads, but model.num_heads={self.num_heads}; "
        "make them equal"
      )
    object.__setattr__(self, "depths", typed(Depths, self.depths, "model.depths"))
    self._check_depths()
    if self.moe and self.moe.every > self.num_layers - self.leading_layers:
      raise UserError(
        f"moe.every={self.moe.every} is more than {self._repeated_layers[1]}={self._repeated_layers[0]}, so no layer "
        "would be sparse; lower moe.every or set moe to None"
      )
    checks.divides(self.moe.every if self.moe else 1, "moe.every", *self._repeated_layers)
    self._check_attention()
    self._check_precision()
    object.__setattr__(self, "feed_forward", typed(FeedForward, self.feed_forward, "model.feed_forward"))
    if self.feed_forward != FeedForward() and self.num_sparse_layers == self.num_layers:
      raise UserError(
        f"model.feed_forward={self.feed_forward.kind} would have no effect because every layer is sparse; set it to "
        f"{FeedForward().kind} or raise moe.every"
      )

  def _check_remat(self) -> None:
    """Raises UserError if what is saved or offloaded is unknown, or has no effect."""
    checks.one_of(self, "remat", get_args(Remat))
    for field in ("save_activations", "offload_activations"):
      for name in getattr(self, field):
        if name not in get_args(Saved):
          raise UserError(f"model.{field}={name!r} is not one of {', '.join(get_args(Saved))}")
    self._check_save()
    for name in self.offload_activations:
      if not set(values_of((name,))) <= set(self.saved_values):
        policies = policies_that_save(name)
        by_name = [] if "selected" in policies else ["selected with this value in save_activations"]
        remats = " or ".join((*policies, *by_name))
        raise UserError(
          f"model.offload_activations={name!r} would have no effect because model.remat={self.remat!r} does not save "
          f"these values by name; set remat to {remats}, or remove it"
        )

  def _check_save(self) -> None:
    if self.save_activations and self.remat != "selected":
      raise UserError(
        f"model.save_activations={' '.join(self.save_activations)} would have no effect with "
        f"model.remat={self.remat!r}; set remat to 'selected', or save_activations to ()"
      )
    if self.remat == "selected" and not self.save_activations:
      raise UserError(
        "model.remat='selected' without model.save_activations is the same as 'layer_inputs'; set remat to that, or "
        "name what to save, as in --model.save-activations context"
      )
    for name in self.save_activations:
      if name == "layer_inputs":
        raise UserError("model.save_activations='layer_inputs' is always saved; remove it")

  @property
  def unread_activations(self) -> tuple[Saved, ...]:
    """The names in `save_activations` whose values the backward pass of no layer reads."""
    unread: set[str] = set() if self.moe else {*OF_EXPERTS}
    if "feed_forward" not in self.products:
      unread |= {"feed_forward_in", "feed_forward_out"}
    # It is read by a norm, a gate, a router of tokens, or a later layer that is computed again with it.
    gated = self.moe is not None and self.moe.shared_gate
    if self.norm_places == "before" and self.period == 1 and not gated and not self.depths.is_routed:
      unread |= {"feed_forward_out"}
    return tuple(name for name in self.save_activations if name in unread)

  def _check_depths(self) -> None:
    if not self.depths.is_routed:
      return
    checks.divides(self.depths.every, "depths.every", *self._repeated_layers)
    if self.attention_experts is not None:
      raise UserError(
        f"model.depths.kind={self.depths.kind} is not supported with model.attention_experts; set attention_experts to "
        "None or depths.kind to all"
      )
    if self.moe is not None and not self.depths.has_predictor:
      raise UserError(
        f"model.depths.kind={self.depths.kind} is not supported with model.moe, whose losses are means over a number "
        "of tokens that is known before the layer runs; use depths.kind=top_k, or set model.moe to None"
      )

  def _check_attention(self) -> None:
    object.__setattr__(self, "attention", typed(tuple[Attention, ...], self.attention, "model.attention"))
    if not self.attention:
      raise UserError("model.attention has no layers; give it at least one")
    checks.divides(len(self.attention), "number of layers in model.attention", *self._repeated_layers)
    checks.divides(self.period, "period of model.attention, moe.every and depths.every", *self._repeated_layers)
    for attention in self.attention:
      attention.check_model(self)

  @property
  def products(self) -> tuple[str, ...]:
    """The fields of `precision` that set the type of a product of this model."""
    dense = self.num_sparse_layers < self.num_layers or (self.moe is not None and self.moe.num_shared_experts > 0)
    sparse = self.moe is not None
    return ("attention", *(("feed_forward",) if dense else ()), *(("experts",) if sparse else ()), "logits")

  def _check_precision(self) -> None:
    """Raises UserError for 8-bit products that no layer has."""
    of_experts, of_dense = self.precision.experts, self.precision.feed_forward
    if of_experts != "compute" and "experts" not in self.products:
      raise UserError(f"model.precision.experts={of_experts!r} has no effect without model.moe; set it to 'compute'")
    if of_dense != "compute" and "feed_forward" not in self.products:
      raise UserError(
        f"model.precision.feed_forward={of_dense!r} has no effect because every layer is sparse, without shared "
        "experts; set it to 'compute'"
      )

  @property
  def saved_values(self) -> tuple[str, ...]:
    """The values of a layer that `remat` saves by name (`moejax.config.remat`)."""
    return saved_values(self.remat, self.save_activations)

  def with_remat(self, remat: Remat, save_activations: tuple[Saved, ...] = ()) -> "Model":
    """The model with another rematerialization. Values that it does not save are not offloaded."""
    saved = set(saved_values(remat, save_activations))
    offloaded = tuple(name for name in self.offload_activations if set(values_of((name,))) <= saved)
    return dataclasses.replace(self, remat=remat, save_activations=save_activations, offload_activations=offloaded)

  @property
  def qk_norm_widths(self) -> tuple[int, int]:
    """Scales of the norms of queries and of keys in a layer; 0 without QK-norm."""
    if not self.qk_norm:
      return 0, 0
    if self.qk_norm_over == "head":
      return self.head_dim, self.head_dim
    return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

  @property
  def leading_layers(self) -> int:
    """Number of layers before the repeated ones."""
    return self.moe.leading_dense if self.moe else 0

  @property
  def _repeated_layers(self) -> tuple[int, str]:
    """Number of layers that a period must divide, and its name in messages."""
    leading = self.leading_layers
    return self.num_layers - leading, "model.num_layers" + (f" without moe.leading_dense={leading}" if leading else "")

  @property
  def period(self) -> int:
    """Number of layers after which the pattern of attention, dense, sparse and routed layers repeats."""
    return math.lcm(self.moe.every if self.moe else 1, len(self.attention), self.depths.every or 1)

  @property
  def num_periods(self) -> int:
    """Number of repetitions of the pattern, which is the length of the scan over layers."""
    return (self.num_layers - self.leading_layers) // self.period

  @property
  def attention_layers(self) -> tuple[Attention, ...]:
    """The attention layers of a period of the model, which may be longer than that of `attention` alone."""
    return self._attention_at(self.leading_layers, self.period)

  @property
  def routed_layers(self) -> tuple[bool, ...]:
    """Whether tokens can skip each layer of a period (mixture of depths)."""
    return tuple(self.depths.is_routed and (i + 1) % self.depths.every == 0 for i in range(self.period))

  @property
  def sparse_layers(self) -> tuple[bool, ...]:
    """Whether the feed-forward layer of each layer of a period is a mixture of experts."""
    return tuple(self.moe is not None and (i + 1) % self.moe.every == 0 for i in range(self.period))

  @property
  def routed_sparse_layers(self) -> tuple[bool, ...]:
    """Whether tokens can skip each of the sparse layers, from the first to the last of the model."""
    of_period = [routed for sparse, routed in zip(self.sparse_layers, self.routed_layers, strict=True) if sparse]
    return tuple(of_period) * self.num_periods

  @property
  def leading_attention(self) -> tuple[Attention, ...]:
    """The attention layers of the layers before the repeated ones."""
    return self._attention_at(0, self.leading_layers)

  @property
  def is_dense(self) -> bool:
    """Whether every token uses all parameters: there are no sparse layers and no mixture of depths."""
    return self.moe is None and not self.depths.is_routed

  @property
  def main(self) -> "Model":
    """The model without modules for multi-token prediction, as it is used after training."""
    return dataclasses.replace(self, multi_token_depth=0) if self.multi_token_depth else self

  @property
  def last_layer(self) -> "Model":
    """A model with one layer, which is like the last one of this model."""
    moe = self.moe and dataclasses.replace(self.moe, every=1, leading_dense=0)
    return dataclasses.replace(
      self,
      num_layers=1,
      attention=self.attention_layers[-1:],
      feed_forward=FeedForward() if moe else self.feed_forward,
      depths=Depths(),
      moe=moe,
      multi_token_depth=0,
    )

  def _attention_at(self, first: int, count: int) -> tuple[Attention, ...]:
    return tuple(self.attention[layer % len(self.attention)] for layer in range(first, first + count))

  def sum_of_attention(self, of_layer: Callable[[Attention], int]) -> int:
    """The sum of a count over the attention layers of all layers."""
    return sum(map(of_layer, self.leading_attention)) + self.num_periods * sum(map(of_layer, self.attention_layers))

  @property
  def num_sparse_layers(self) -> int:
    """Number of layers whose feed-forward layer is a mixture of experts."""
    return (self.num_layers - self.leading_layers) // self.moe.every if self.moe else 0

  @property
  def is_gated(self) -> bool:
    """Whether the activation multiplies by a gate."""
    return self.activation != "gelu"

  @property
  def feed_forward_matrices(self) -> int:
    """Number of matrices in an expert: gate, up and down, or up and down."""
    return 3 if self.is_gated else 2

  @property
  def auxiliary_losses(self) -> tuple[str, ...]:
    """Losses that the layers return, as fields of training.losses."""
    of_attention = ("attention_mutual_information",) if self.attention_experts else ()
    of_tokens = ("multi_token",) if self.multi_token_depth else ()
    of_depths = ("depths",) if self.depths.is_routed else ()
    return (*(self.moe.losses if self.moe else ()), *of_attention, *of_tokens, *of_depths)
