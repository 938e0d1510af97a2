"""Published laws that predict the loss of a model from its shape and the number of its training tokens.

Each law has its source, the range of the runs that it was fitted to, and the standard deviation of its error. Losses
are in nats per token of the text and tokenizer of the source, so that a law compares dense and MoE models with each
other, and not with models of another law.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moejax.scaling.shapes import Shape

Array = np.ndarray[Any, np.dtype[np.float64]]

Loss = Callable[[Shape, Array], Array]
"""The loss of a shape for each number of tokens."""

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Law:
  """A law, its source, and its limits. Laws are equal if they are the same object."""

  name: str
  source: str
  """The paper, and which of its laws and constants."""
  loss: Loss
  """Nats per token."""
  draws: Loss | None = None
  """The loss for each draw of a Monte Carlo simulation, with different constants for each. None: as `loss`."""
  error: float
  """Standard deviation of the error of a loss within the range, in nats."""
  error_source: str = "our own choice"
  """Where this standard deviation comes from."""
  ranges: Mapping[str, Range]
  """Smallest and largest values of the runs that the law was fitted to, by quantity (see `quantities`)."""
  applies: Callable[[Shape], bool] = lambda shape: True
  """Whether the law is defined for a shape."""
  has_tokens: bool = True
  """Whether the law separates the effects of model size and tokens, so that it can choose between sizes."""
  weight: float = 1.0
  """Weight in the ensemble before it is compared with finished runs."""
  widens: bool = True
  """Whether the error grows outside the range. Otherwise `draws` has this growth."""
  caution: str = ""
  """A warning to show with every result of this law."""

  def outside(self, shape: Shape, tokens: float) -> dict[str, float]:
    """The factor by which each quantity lies outside the range, for those that do by more than 1 %."""
    found = {}
    for name, value in quantities(shape, tokens).items():
      low, high = self.ranges.get(name, (0.0, math.inf))
      factor = max(low / value, value / high)
      if factor > 1.01:
        found[name] = factor
    return found

  def spread(self, shape: Shape, tokens: float) -> float:
    """Standard deviation of the error of a loss: it doubles for the first factor of 10 outside the range, and grows by
    the same amount for each further factor of 10. This growth is an assumption."""
    beyond = self.outside(shape, tokens).values() if self.widens else ()
    return self.error * (1 + math.log10(math.prod(beyond)))


def quantities(shape: Shape, tokens: float) -> dict[str, float]:
  """The quantities that a range may limit."""
  return {
    "active parameters": shape.active,
    "total parameters": shape.total,
    "tokens": tokens,
    "tokens per active parameter": tokens / shape.active,
    "expansion": shape.expansion,
    "granularity": shape.granularity,
    "training FLOPs": shape.training_flops * tokens,
  }


def saturated(experts: float, start: float, most: float) -> float:
  """Ê, the transformed number of experts of arXiv 2202.01169: `start` for one expert, at most `most`."""
  return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


JOINT = {
  "a": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098, "b": 35.98, "beta": -0.1775, "omega": 0.5529,
  "zeta": -0.0259, "c": 1.3637,
}  # fmt: skip
"""Constants of `joint_loss` in arXiv 2502.05172."""

JOINT_START, JOINT_MOST = 2.0732, 290.4521


def joint_loss(constants: Mapping[str, Any], active: Any, tokens: Any, expansion: Any) -> Any:
  """a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, with N active parameters and D tokens."""
  k = constants
  e = np.log(saturated(expansion, JOINT_START, JOINT_MOST))
  n, d = np.log(active), np.log(tokens)
  of_size = k["a"] * np.exp(k["delta"] * e + (k["alpha"] + k["gamma"] * e) * n)
  of_data = k["b"] * np.exp(k["omega"] * e + (k["beta"] + k["zeta"] * e) * d)
  return of_size + of_data + k["c"]


def _joint(shape: Shape, tokens: Array) -> Array:
  return joint_loss(JOINT, shape.active, tokens, shape.expansion)


def _dense(active: float, tokens: Array) -> Array:
  """The dense case of the joint law, onto which laws of the gain by experts are carried."""
  return joint_loss(JOINT, active, tokens, 1.0)


def _fine_grained(shape: Shape, tokens: Array) -> Array:
  """c + (g / G^gamma + a) / N^alpha + b / D^beta, with N all parameters except embeddings."""
  n = shape.total_non_embedding
  if shape.is_dense:
    return 0.47 + 16.3 / n**0.126 + 26.7 / tokens**0.127
  return 0.47 + (2.1 / shape.granularity**0.58 + 18.1) / n**0.115 + 30.8 / tokens**0.147


def routed_loss(active: float, expansion: float) -> float:
  """The loss of S-BASE models after 130B tokens: log L = a log N + b log Ê + c log N log Ê + d, in base 10."""
  n, e = math.log10(active), math.log10(saturated(expansion, 1.847, 314.478))
  return 10 ** (-0.082 * n - 0.108 * e + 0.009 * n * e + 1.104)


def effective_parameters(active: float, expansion: float) -> float:
  """The size of the dense model with the loss of a routed model, by `routed_loss`."""
  n, e, first = math.log10(active), math.log10(saturated(expansion, 1.847, 314.478)), math.log10(1.847)
  return 10 ** ((-0.082 * n + (0.009 * n - 0.108) * e + 0.108 * first) / (-0.082 + 0.009 * first))


def _routed(shape: Shape, tokens: Array) -> Array:
  equal = effective_parameters(shape.active_non_embedding, shape.expansion)
  return _dense(max(equal, shape.active_non_embedding) + shape.embedding, tokens)


def efficiency_leverage(activation: float, granularity: float, flops: Any) -> Any:
  """Compute of a dense model divided by that of an MoE with the same loss.

  It is Â^(a + d log C + gamma (log G)^2 + beta log G).

  The paper does not print the bases of its logarithms. Base 10 for C and base 2 for G give its examples: more than 7
  for an activation ratio of 0.031, a granularity of 12 and 1e22 FLOPs, and a best granularity between 8 and 12.
  """
  start, most = 0.0163, 5.28e16
  saturating = 1 / (1 / (activation + 1 / (1 / start - 1 / most)) + 1 / most)
  g = math.log2(granularity)
  return saturating ** (1.23 - 0.0761 * np.log10(flops) + 0.0167 * g**2 - 0.117 * g)


def _leverage(shape: Shape, tokens: Array) -> Array:
  if shape.is_dense:
    return _dense(shape.active, tokens)
  gain = np.sqrt(efficiency_leverage(1 / shape.expansion, shape.granularity, shape.training_flops * tokens))
  return joint_loss(JOINT, shape.active * gain, tokens * gain, 1.0)


def _sparsity(shape: Shape, tokens: Array) -> Array:
  """a / N^alpha + b / D^beta + c / (1 - S)^lambda + d / ((1 - S)^delta N^gamma) + e, with N all parameters and S the
  inactive fraction of experts."""
  active, n = 1 / shape.expansion, shape.total
  return (
    16612.50 / n**0.5962 + 5455.67 / tokens**0.3954 + 0.4598 * active**0.1666
    + 17.26 / (active**0.1603 * n**0.1595) + 0.94
  )  # fmt: skip


def marin_loss(flops: Any, sparse: bool) -> Any:
  """Loss on Paloma of marin's dense models (20 tokens per active parameter) or MoE models (60)."""
  return 1.2 + (58.67 * flops**-0.0842 if sparse else 66.70 * flops**-0.0844)


def _marin(shape: Shape, tokens: Array) -> Array:
  return marin_loss(shape.training_flops * tokens, not shape.is_dense)


def grug_v16(flops: float) -> tuple[float, float, float]:
  """Active parameters, tokens and loss of marin's compute-optimal MoE (64 experts, top 4)."""
  return 1.09e-2 * flops**0.535, 16.0 * flops**0.464, 1.6 + 95.18 * flops**-0.0941


def _within(factor: float, of: float) -> Callable[[Shape], bool]:
  return lambda shape: shape.is_dense or of / factor <= shape.expansion <= of * factor


LAWS = {
  law.name: law
  for law in (
    Law(
      name="joint", source="arXiv 2502.05172, the joint law of dense and MoE models", loss=_joint, error=0.02,
      ranges={"active parameters": (0, 2.7e9), "total parameters": (0, 5e9), "expansion": (1, 32),
              "granularity": (1, 1)},
    ),
    Law(
      name="fine-grained", source="arXiv 2402.07871, the laws of MoE and of dense models", loss=_fine_grained,
      error=0.019, error_source="the RMSE of the paper",
      ranges={"total parameters": (129e6, 3.7e9), "expansion": (1, 64), "granularity": (1, 16)},
      applies=_within(2, 64), caution="fitted for 64 times as many parameters in experts as active; used up to a "
      "factor of 2 from that",
    ),
    Law(
      name="routed", source="arXiv 2202.01169, constants of S-BASE, carried onto the dense case of arXiv 2502.05172",
      loss=_routed, error=0.03, weight=0.5,
      ranges={"active parameters": (15e6, 1.3e9), "tokens": (130e9, 130e9), "expansion": (1, 512)},
      caution="fitted at 130B tokens; later work finds larger gains for large models",
    ),
    Law(
      name="efficiency leverage",
      source="arXiv 2507.17702, equation 13, carried onto the dense case of arXiv 2502.05172",
      loss=_leverage, error=0.03,
      ranges={"total parameters": (0, 28e9), "granularity": (1, 16)},
      caution="the bases of its logarithms are inferred; dense and MoE models are compute-optimal in the source",
    ),
    Law(
      name="sparsity", source="arXiv 2501.12370, the law of parameters, tokens and sparsity", loss=_sparsity,
      error=0.04, weight=0.5, ranges={"expansion": (1, 20)},
      caution="its R2 falls from 99 % to 68 % for a sparsity of 98 % that it was not fitted to",
    ),
    Law(
      name="marin", source="marin, experiments/grug/fast_track: fits to its dense and MoE ladders", loss=_marin,
      error=0.02, has_tokens=False, applies=_within(2, 32),
      ranges={"active parameters": (18e6, 292e6), "training FLOPs": (9e16, 4.4e19),
              "tokens per active parameter": (15, 80)},
      caution="one recipe; loss as a function of compute alone",
    ),
  )
}  # fmt: skip
"""The ensemble, by name."""

BEST_ACTIVATION = 0.2
"""The fraction of active parameters that arXiv 2506.12119 finds best at equal parameters, compute and tokens."""
