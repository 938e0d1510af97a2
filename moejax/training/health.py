"""Detects what fails while the loss looks normal: experts without tokens, collapsed entropy of routers, layers that all
tokens skip, and multi-token prediction without targets.

E experts
"""

import math
from collections.abc import Iterator

from moejax.config.model import Model
from moejax.training.metrics import Record, all_layers, routed_layers, sparse_layers

DEAD_STEPS = 100
"""Number of steps without a token after which an expert counts as dead."""

COLLAPSED = 0.02
"""Fraction of log E below which the entropy of a token counts as collapsed. It is not checked with a mutual-information
loss, which minimizes the entropy."""

SKIPPED = 0.05
"""Fraction of the share of a routed layer below which tokens count as skipping it."""


class Health:
  """Checks each logged record. A problem is reported once, and again if it disappears and returns."""

  def __init__(self, model: Model, losses: frozenset[str], start_step: int):
    """`losses` are the auxiliary losses with a coefficient. `start_step` is the step from which the run resumes."""
    self._model = model
    self._losses = losses
    self._seen: dict[str, int] = {}
    self._start = start_step
    self._told: set[str] = set()

  def warnings(self, record: Record) -> list[str]:
    """One line for each new problem in this record, with the name of the layer or the depth."""
    checks = (self._dead_experts, self._collapsed_routers, self._skipped_layers, self._depths_without_targets)
    found = {key: text for check in checks for key, text in check(record)}
    new = [text for key, text in found.items() if key not in self._told]
    self._told = set(found)
    return new

  def _dead_experts(self, record: Record) -> Iterator[tuple[str, str]]:
    step = record["step"]
    for layer, load_E in zip(sparse_layers(self._model), record.get("router/load", ()), strict=False):
      last_E = [self._last_seen(f"{layer}/{e}", share > 0, step) for e, share in enumerate(load_E)]
      dead = [e for e, last in enumerate(last_E) if step - last >= DEAD_STEPS]
      if dead:
        yield (
          f"dead {layer} {dead}",
          f"{layer}: expert{'s' if len(dead) > 1 else ''} {_listed(dead)} of {len(load_E)} received no token in any "
          "logged "
          f"step of the last {DEAD_STEPS} (step {step}); raise training.losses.load_balance or router.bias_rate",
        )

  def _last_seen(self, name: str, has_tokens: bool, step: int) -> int:
    if has_tokens:
      self._seen[name] = step
    return self._seen.get(name, self._start)

  def _skipped_layers(self, record: Record) -> Iterator[tuple[str, str]]:
    for layer in routed_layers(self._model):
      share = record.get(f"router/depth_share/{layer}", 1.0)
      if share < SKIPPED * self._model.depths.share:
        yield (
          f"skipped {layer}",
          f"{layer}: {share:.2%} of the tokens go through it (step {record['step']}), and only these train its router; "
          "lower training.losses.depths or depths.threshold, or use depths.kind=top_k",
        )

  def _depths_without_targets(self, record: Record) -> Iterator[tuple[str, str]]:
    for depth in range(1, self._model.multi_token_depth + 1):
      if record.get(f"multi_token/targets/depth_{depth}") == 0:
        yield (
          f"no targets {depth}",
          f"multi-token prediction: no document has a token {depth + 1} positions after another one in its sequence "
          f"(step {record['step']}), so loss/multi_token/depth_{depth} is 0; lower model.multi_token_depth, or use "
          "longer documents",
        )

  def _collapsed_routers(self, record: Record) -> Iterator[tuple[str, str]]:
    moe, heads = self._model.moe, self._model.attention_experts
    routers = []
    if moe and "mutual_information" not in self._losses:
      routers.append(("router/entropy", sparse_layers(self._model), moe.num_experts))
    if heads and "attention_mutual_information" not in self._losses:
      routers.append(("router/attention_entropy", all_layers(self._model), heads))
    for name, layers, experts in routers:
      for layer in layers:
        entropy = record.get(f"{name}/{layer}", math.inf)
        if experts > 1 and entropy < COLLAPSED * math.log(experts):
          yield (
            f"collapsed {name} {layer}",
            f"{layer}: {name} is {entropy:.3g} of at most {math.log(experts):.3g} nats (step {record['step']}): the "
            "router has collapsed; raise training.losses.router_z or lower the learning rate",
          )


def _listed(experts: list[int]) -> str:
  shown = ", ".join(map(str, experts[:8]))
  return shown if len(experts) <= 8 else f"{shown} and {len(experts) - 8} more"
