"""Models how concurrent collectives share links.

Collectives along the same dimension of the torus share its links equally, independently of the order in which they
started. Collectives along different dimensions do not share links. A collective along several dimensions runs at the
lowest of its shares.
"""

import dataclasses

from moejax.planning.collectives import Collective


@dataclasses.dataclass
class _Flow:
  links: frozenset[str]
  left_s: float
  """Seconds that it would still take without other collectives."""


class Links:
  """The links of a chip while a computation runs. Times are in seconds since the start of the computation."""

  def __init__(self) -> None:
    self._now = 0.0
    self._flows: dict[str, _Flow] = {}

  def begin(self, key: str, moved: Collective, now: float) -> None:
    """Starts a collective. One that moves nothing is done at once."""
    self._advance(now)
    if moved.time_s > 0:
      self._flows[key] = _Flow(moved.links, moved.time_s)

  def end(self, key: str, now: float) -> float:
    """The time at which a collective is done, but not before `now`."""
    self._advance(now)
    while key in self._flows:
      self._advance(self._now + self._next())
    return max(now, self._now)

  def _advance(self, until: float) -> None:
    while self._flows and self._now < until:
      step = min(until - self._now, self._next())
      for flow, others in self._shared():
        flow.left_s -= step / others
      self._flows = {key: flow for key, flow in self._flows.items() if flow.left_s > 1e-12 * max(1.0, self._now)}
      self._now += step
    self._now = max(self._now, until)

  def _next(self) -> float:
    """Seconds until the first one is done."""
    return min(flow.left_s * others for flow, others in self._shared())

  def _shared(self) -> list[tuple[_Flow, int]]:
    """Each collective, and the number of collectives on its busiest dimension."""
    flows = list(self._flows.values())
    busy = {link: sum(link in flow.links for flow in flows) for flow in flows for link in flow.links}
    return [(flow, max((busy[link] for link in flow.links), default=1)) for flow in flows]
