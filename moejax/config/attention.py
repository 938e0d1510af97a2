"""Attention layers. `moejax/models/attentions.py` implements them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from moejax.config import checks
from moejax.config.feed_forward import Shape
from moejax.config.kinds import OfSeveralKinds, described
from moejax.config.plain import typed
from moejax.config.rope import NoScaling, RopeScaling
from moejax.errors import UserError

MATRIX = "w_"
"""How the names of parameters begin that are matrices of products. Others are biases, scales and sinks."""


class Rotary(NamedTuple):
  """A rotary embedding. Layers with equal ones share their angles."""

  width: int
  theta: float
  scaling: RopeScaling = NoScaling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(OfSeveralKinds, default="grouped_query", functions="moejax.models.attentions.ATTENTIONS"):
  """Base class of attention layers. `Attention()` returns `GroupedQuery()`, the default. The output of a token must
  depend only on that token and on earlier tokens of its document.

  To add a layer, subclass this, define `shapes` and `cached`, and add its module to
  `moejax.models.attentions.ATTENTIONS`. Each method gets the `Model`, whose fields such as num_heads may be used.
  """

  def shapes(self, model: Any) -> Mapping[str, Shape]:
    """Shape of each parameter by its name, which begins with w_ for matrices of products."""
    raise UserError(f"{described(type(self))} does not define shapes; define it as Attention.shapes says")

  def cached(self, model: Any) -> Mapping[str, Shape]:
    """Shape of each array that the KV cache has for one token."""
    raise UserError(f"{described(type(self))} does not define cached; define it as Attention.cached says")

  def rotary(self, model: Any) -> Rotary | None:
    """The rotary embedding whose angles the layer needs."""
    return None

  def score_flops_per_token(self, model: Any, sequence_length: int) -> int:
    """FLOPs of scores and values to train on one token. Causal masking is not deducted."""
    return 12 * model.num_heads * model.head_dim * sequence_length

  def check_model(self, model: Any) -> None:
    """Checks that the layer supports the fields of the model.

    Raises:
      UserError: If it does not.
    """

  def matrix_parameters(self, model: Any) -> int:
    """Number of parameters in matrices."""
    return sum(_size(shape) for name, shape in self.shapes(model).items() if name.startswith(MATRIX))

  def other_parameters(self, model: Any) -> int:
    """Number of parameters that are not in matrices."""
    return sum(_size(shape) for name, shape in self.shapes(model).items() if not name.startswith(MATRIX))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQuery(Attention, kind="grouped_query"):
  """Grouped-query attention (arXiv 2305.13245) to all earlier tokens of the document, or to the nearest ones."""

  window: int | None = None
  """Number of tokens that a token attends to, itself included (sliding window: Mistral, Gemma 3, gpt-oss). None: all
  tokens."""
  chunk: int | None = None
  """A token attends only to its chunk of this number of tokens, counted from the start of the document (Llama 4)."""
  rotary_embedding: bool = True
  """Whether queries and keys have a rotary embedding. Some layers of Llama 4 have none."""
  rope_theta: float | None = None
  """Base of the rotary embedding of this layer (Gemma 3: 10,000 in local layers). None: model.rope_theta."""
  rope_scaling: RopeScaling = RopeScaling()
  """Scaling of the rotary embedding for long texts (Llama 3.1, gpt-oss)."""
  norm_after_rotary: bool = False
  """Whether queries and keys are divided by their root mean square over each head, after the rotary embedding and
  without a learned scale (Llama 4 Scout). model.qk_norm is before it, and has a scale."""
  score_scale: float = 1.0
  """Factor of the scores, which are also divided by the square root of model.head_dim."""
  score_log_scale: float = 0.0
  """The scores of a query at position p of its document, counted from 0, are multiplied by 1 + score_log_scale x
  ln(1 + floor((p + 1) / score_log_length)) (Llama 4: 0.1 in layers without rotary embedding; compare arXiv 2501.19399).
  0: they are not."""
  score_log_length: int = 8192
  """Number of positions after which the factor of scores rises, where score_log_scale is above 0."""
  sinks: bool = False
  """Whether the softmax has an additional learned logit for each head, which has no value (gpt-oss)."""
  output_bias: bool = False
  """Whether the output projection has a bias (gpt-oss)."""

  def __post_init__(self) -> None:
    for name in ("window", "chunk", "rope_theta"):
      if getattr(self, name) is not None:
        checks.positive(self, name)
    if self.window is not None and self.chunk is not None:
      raise UserError(f"attention.window={self.window} and attention.chunk={self.chunk} exclude each other; set one")
    checks.positive(self, "score_scale", "score_log_length")
    checks.not_negative(self, "score_log_scale")
    object.__setattr__(self, "rope_scaling", typed(RopeScaling, self.rope_scaling, "attention.rope_scaling"))
    for name in ("rope_theta", "rope_scaling", "norm_after_rotary"):
      self._check_effect(name, "rotary_embedding")
    self._check_effect("score_log_length", "score_log_scale")

  def _check_effect(self, name: str, needed: str) -> None:
    (default,) = (field.default for field in dataclasses.fields(self) if field.name == name)
    value, default = (each.kind if isinstance(each, RopeScaling) else each for each in (getattr(self, name), default))
    if value != default and not getattr(self, needed):
      raise UserError(
        f"attention.{name}={value} would have no effect with attention.{needed}={getattr(self, needed)}; set it to "
        f"{default}"
      )

  def check_model(self, model: Any) -> None:
    _check_rotary(self.rotary(model))

  def shapes(self, model: Any) -> Mapping[str, Shape]:
    D, H, N, K = model.d_model, model.head_dim, model.num_heads, model.num_kv_heads
    keys: Shape = {"embed": D, "kv_heads": K, "head_dim": H}
    found: dict[str, Shape] = {
      "w_q": {"embed": D, "heads": N, "head_dim": H},
      "w_k": keys,
      "w_v": keys,
      "w_out": {"heads": N, "head_dim": H, "embed": D},
    }
    if model.attention_experts:
      found["w_router"] = {None: D * model.attention_experts}
    if model.attention_bias:
      found["b_q"] = {"heads": N, "head_dim": H}
      found["b_k"] = found["b_v"] = {"kv_heads": K, "head_dim": H}
    of_queries, of_keys = model.qk_norm_widths
    if model.qk_norm:
      found["q_norm"], found["k_norm"] = {None: of_queries}, {None: of_keys}
    if self.sinks:
      found["sinks"] = {"heads": N}
    if self.output_bias:
      found["b_out"] = {"embed": D}
    return found

  def cached(self, model: Any) -> Mapping[str, Shape]:
    of_token: Shape = {"kv_heads": model.num_kv_heads, None: model.head_dim}
    return {"k": of_token, "v": of_token}

  def rotary(self, model: Any) -> Rotary | None:
    if not self.rotary_embedding:
      return None
    return Rotary(model.head_dim, self.rope_theta or model.rope_theta, self.rope_scaling)

  def score_flops_per_token(self, model: Any, sequence_length: int) -> int:
    seen = min(sequence_length, self.window or self.chunk or sequence_length)
    return 12 * model.num_heads * model.head_dim * seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Attention, kind="latent"):
  """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values are computed from a
  narrow vector for each token, which alone is cached. model.head_dim is the part of a head without rotary embedding."""

  kv_rank: int = 512
  """Width of the vector from which the keys and values of a token are computed."""
  q_rank: int | None = None
  """Width of the vector from which queries are computed (DeepSeek-V3: 1536). None: they are computed from the input."""
  rotary_dim: int = 64
  """Additional dimensions of queries and keys with a rotary embedding. All heads share those of the keys."""
  value_dim: int | None = None
  """Dimension of the values of a head. None: model.head_dim."""
  rope_scaling: RopeScaling = RopeScaling()
  """Scaling of the rotary embedding for long texts (DeepSeek-V3)."""
  score_scale: float = 1.0
  """Factor of the scores, which are also divided by the square root of model.head_dim + rotary_dim."""

  def __post_init__(self) -> None:
    checks.positive(self, "kv_rank", "rotary_dim", "score_scale")
    object.__setattr__(self, "rope_scaling", typed(RopeScaling, self.rope_scaling, "attention.rope_scaling"))
    checks.divides(2, "rotary pair", self.rotary_dim, "attention.rotary_dim")
    for name in ("q_rank", "value_dim"):
      if getattr(self, name) is not None:
        checks.positive(self, name)

  def values(self, model: Any) -> int:
    """Dimension of the values of a head."""
    return self.value_dim or model.head_dim

  def shapes(self, model: Any) -> Mapping[str, Shape]:
    D, H, N, R, V = model.d_model, model.head_dim, model.num_heads, self.kv_rank, self.values(model)
    found: dict[str, Shape] = {
      "w_kv_down": {"embed": D, None: R + self.rotary_dim},
      "kv_norm": {None: R},
      "w_kv_up": {None: R, "heads": N, "head_dim": H + V},
      "w_out": {"heads": N, "head_dim": V, "embed": D},
    }
    if self.q_rank is None:
      return found | {"w_q": {"embed": D, "heads": N, "head_dim": H + self.rotary_dim}}
    return found | {
      "w_q_down": {"embed": D, None: self.q_rank},
      "q_norm": {None: self.q_rank},
      "w_q_up": {None: self.q_rank, "heads": N, "head_dim": H + self.rotary_dim},
    }

  def cached(self, model: Any) -> Mapping[str, Shape]:
    return {"latent": {"kv_heads": 1, None: self.kv_rank + self.rotary_dim}}

  def rotary(self, model: Any) -> Rotary:
    return Rotary(self.rotary_dim, model.rope_theta, self.rope_scaling)

  def score_flops_per_token(self, model: Any, sequence_length: int) -> int:
    return 6 * model.num_heads * (model.head_dim + self.rotary_dim + self.values(model)) * sequence_length

  def check_model(self, model: Any) -> None:
    _check_rotary(self.rotary(model))
    if model.num_kv_heads != model.num_heads:
      raise UserError(
        f"model.num_kv_heads={model.num_kv_heads} must be model.num_heads={model.num_heads} with latent attention, in "
        "which every head has its own keys; set it to that"
      )
    for name in ("qk_norm", "attention_bias", "attention_experts"):
      if getattr(model, name):
        raise UserError(
          f"model.{name}={getattr(model, name)} would have no effect with latent attention; set it to its default"
        )


def _check_rotary(rotary: Rotary | None) -> None:
  """Checks that a rotary embedding can be scaled."""
  if rotary is not None:
    rotary.scaling.multipliers(rotary.width, rotary.theta)


def _size(shape: Shape) -> int:
  return math.prod(shape.values())
