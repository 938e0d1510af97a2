"""What the processes of one program tell each other beside their computations, and what ends all of them.

Every process has a connection to process 0. On it go a sign of life every second, the values that process 0 decides for
all, a signal that one of them received, and why one failed. Where a connection closes, or a process is silent or behind
for too long, every process ends with a message that names it, so that none waits forever in a collective operation.
"""

import collections
import dataclasses
import json
import select
import threading
import time
from typing import Any

from moejax import interrupts
from moejax.processes.link import Link
from moejax.processes.rendezvous import Met, Place

BEAT_S = 1.0
"""Seconds between two signs of life."""

LEAVE_S = 20.0
"""Seconds that the others have to end by themselves once one process has stopped."""

NO_STEP = 10
"""How many times the bound on silence a step may take where no process is ahead of another."""


@dataclasses.dataclass
class Peer:
  """Another process, as seen from here."""

  index: int
  link: Link
  heard: float = dataclasses.field(default_factory=time.monotonic)
  step: int | None = None
  """The training step that it has begun; None outside training."""
  since: float = dataclasses.field(default_factory=time.monotonic)
  """When it began that."""
  left: int | None = None
  """The exit code with which it said that it ends."""
  ends: bool = False
  """Whether it knows that the program ends."""
  gone: bool = False


class Channel:
  """The connections of this process, and from `start` on the thread that listens to them."""

  def __init__(self, place: Place, met: Met, silence_s: float):
    self.place = place
    self.names, self._silence_s = met.names, silence_s
    self._peers = {index: Peer(index, link) for index, link in met.links.items()}
    self._early = met.early
    self._step: int | None = None
    self._since = time.monotonic()
    self._values: dict[int, Any] = {}
    self._said: dict[int, dict[int, Any]] = collections.defaultdict(dict)
    self._shared = 0
    self._arrived = threading.Condition()
    self._passed_on = False
    self._ends = False
    self.failed: int | None = None
    """The exit code with which this process has ended the others."""

  def start(self) -> None:
    """Begins to listen. From here on another process may end this one, which must know by then how it leaves."""
    threading.Thread(target=self._listen, name="processes", daemon=True).start()

  def at(self, step: int | None) -> None:
    """Says which training step this process begins; None outside training, where it may take as long as it wants."""
    self._step, self._since = step, time.monotonic()

  def share(self, value: Any = None) -> Any:
    """The value that process 0 gives, on every process. All of them call it, in the same order."""
    self._shared += 1
    if self.place.index == 0:
      self._tell({"share": [self._shared, value]})
      return json.loads(json.dumps(value))
    return self._await_value()

  def gather(self, value: Any) -> list[Any]:
    """The values of all processes, on every process. All of them call it, in the same order as `share`."""
    self._shared += 1
    if self.place.index != 0:
      self._tell({"say": [self._shared, value]})
      return self._await_value()
    with self._arrived:
      while len(said := self._said[self._shared]) < self.place.count - 1:
        self._arrived.wait(0.25)
    values = [value, *(said[index] for index in range(1, self.place.count))]
    self._tell({"share": [self._shared, values]})
    return values

  def _await_value(self) -> Any:
    with self._arrived:
      while self._shared not in self._values:
        self._arrived.wait(0.25)  # a signal is handled in between
      return self._values.pop(self._shared)

  def fail(self, code: int, message: str) -> None:
    """Ends all other processes with this exit code and message; the caller ends this one."""
    self.failed = code
    if not self._ends:
      self._ends = True
      self._tell({"fail": [code, message, self.place.index]})
      self._await_end(LEAVE_S / 4)

  def leave(self, code: int) -> None:
    """Says that this process ends now, after which the others expect nothing more of it."""
    if not self._ends:
      self._ends = True
      self._tell_signal()
      self._tell({"left": code})
      if self.place.index == 0:  # the others need its services to the end
        self._await_end(LEAVE_S)

  def _await_end(self, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(peer.gone or peer.ends for peer in self._peers.values()):
      if threading.current_thread().name == "processes":
        self._receive()
      else:
        time.sleep(BEAT_S / 50)

  def _tell(self, message: dict[str, Any]) -> None:
    for peer in self._peers.values():
      if not peer.gone:
        peer.link.send(message)

  def _listen(self) -> None:
    beaten = 0.0
    if self._early:
      self._handle(self._peers[0], self._early)
    awake = time.monotonic()
    while True:
      self._receive()
      if time.monotonic() - awake > 5 * BEAT_S:  # this process was stopped, perhaps with all others: they begin anew
        for peer in self._peers.values():
          peer.heard = peer.since = time.monotonic()
        self._since = time.monotonic()
      awake = time.monotonic()
      if time.monotonic() - beaten >= BEAT_S:
        beaten = time.monotonic()
        self._tell({"at": self._step})
      if not self._ends:
        self._tell_signal()
        self._judge()

  def _tell_signal(self) -> None:
    """Tells the others of a signal that this process has received."""
    number = interrupts.first_signal()
    if number is not None and not self._passed_on:
      self._passed_on = True
      self._tell({"signal": number})

  def _receive(self) -> None:
    """Reads what has arrived, for a quarter of a second at most."""
    peers = [peer for peer in self._peers.values() if not peer.gone]
    links = [peer.link for peer in peers]
    ready = select.select(links, [], [], BEAT_S / 4)[0]
    for peer in peers:
      if peer.link in ready:
        self._hear(peer)

  def _hear(self, peer: Peer) -> None:
    messages, peer.gone = peer.link.receive()
    peer.heard = time.monotonic()
    self._handle(peer, messages)
    if peer.gone and peer.left is None:
      self._end(1, "it ended without a message: it was killed, or its host is gone", peer.index)

  def _handle(self, peer: Peer, messages: list[dict[str, Any]]) -> None:
    for message in messages:
      if "at" in message and message["at"] != peer.step:
        peer.step, peer.since = message["at"], peer.heard
      if "share" in message:
        number, value = message["share"]
        with self._arrived:
          self._values[number] = value
          self._arrived.notify_all()
      if "say" in message:
        number, value = message["say"]
        with self._arrived:
          self._said[number][peer.index] = value
          self._arrived.notify_all()
      if "left" in message:
        peer.left = int(message["left"])
      if "signal" in message:
        self._pass_signal_on(int(message["signal"]))
      if "fail" in message:
        peer.ends = True
        code, text, index = message["fail"]
        self._end(int(code), str(text), int(index))

  def _pass_signal_on(self, number: int) -> None:
    """Process 0 tells all others; this process acts as if it had received the signal itself."""
    if not self._passed_on and self.place.index == 0:
      self._tell({"signal": number})
    self._passed_on = True
    interrupts.deliver(number)

  def _judge(self) -> None:
    """Ends the program if a process is silent or behind for too long. Process 0 judges all, the others process 0."""
    now = time.monotonic()
    for peer in self._peers.values():
      if peer.left is None and now - peer.heard > self._silence_s:
        self._end(1, f"it has not responded for {self._silence_s:g} s: it is stopped, or its host is gone", peer.index)
      if peer.left and now - peer.heard > LEAVE_S:
        self._end(peer.left, f"it has ended, and this process had to end within {LEAVE_S:g} s", peer.index)
    steps = {peer.index: (peer.step, peer.since) for peer in self._peers.values()}
    steps[self.place.index] = (self._step, self._since)
    training = {index: (step, since) for index, (step, since) in steps.items() if step is not None}
    if self.place.index == 0 and len(training) == self.place.count:
      self._judge_steps(training, now)

  def _judge_steps(self, training: dict[int, tuple[int, float]], now: float) -> None:
    """The same, of processes that are all training: each step needs all of them."""
    first, (top, _) = max(training.items(), key=lambda item: item[1][0])
    last, (step, _) = min(training.items(), key=lambda item: item[1][0])
    idle_s = now - max(since for _, since in training.values())
    if step < top and idle_s > self._silence_s:
      text = f"it has not begun step {step + 1} for {idle_s:.0f} s, and the others wait for it: it hangs"
      self._end(1, text, last)
    elif idle_s > NO_STEP * self._silence_s:
      self._end(1, f"no process has finished step {step} for {idle_s:.0f} s: a collective operation hangs", first)

  def _end(self, code: int, message: str, index: int) -> None:
    """Ends this process because of that one and, on process 0, all others."""
    if self.place.index == 0:
      self._tell({"fail": [code, message, index]})
    if not self._ends:
      self._ends = True
      if self.place.index == 0:
        self._await_end(LEAVE_S / 4)
      interrupts.end(code, f"moejax: {self.names[index]}: {message}")
