"""Channel between the processes of a program: heartbeats, shared values, signals and failures.

Every process has a connection to process 0. It carries a heartbeat every second, the values that process 0 shares with
all processes, signals that a process received, and the reason why a process failed. If a connection closes, or a
process does not respond or falls behind for too long, all processes exit with a message that names this process, so
that no process waits forever in a collective operation.
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
from moejax.processes.rendezvous import Connections, Place

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats."""

EXIT_GRACE_S = 20.0
"""Seconds within which the other processes must exit after one process has exited."""

STALL_FACTOR = 10
"""Maximum duration of a step in which all processes are equally far, as a multiple of the hang timeout."""


@dataclasses.dataclass
class Peer:
  """The state of another process, as known to this one."""

  index: int
  link: Link
  last_message: float = dataclasses.field(default_factory=time.monotonic)
  step: int | None = None
  """The training step that it has started, or None outside training."""
  since: float = dataclasses.field(default_factory=time.monotonic)
  """Time at which it started the step."""
  left: int | None = None
  """Its exit code, after it has reported that it exits."""
  ends: bool = False
  """Whether it knows that the program has failed."""
  gone: bool = False


class Channel:
  """The connections of this process and, after `start`, the thread that reads from them."""

  def __init__(self, place: Place, connections: Connections, silence_s: float):
    self.place = place
    self.names, self._silence_s = connections.names, silence_s
    self._peers = {index: Peer(index, link) for index, link in connections.links.items()}
    self._early = connections.early
    self._step: int | None = None
    self._since = time.monotonic()
    self._values: dict[int, Any] = {}
    self._reports: dict[int | str, dict[int, Any]] = collections.defaultdict(dict)
    self._exchange = 0
    self._arrived = threading.Condition()
    self._signal_lock = threading.Lock()
    """Held while the others are told of a signal. This process must not end in between."""
    self._forwarded = False
    self._ends = False
    self.failed: int | None = None
    """The exit code that this process has passed to `fail`."""

  def start(self) -> None:
    """Starts to read messages. After this call, another process can end this one, so exit handlers must be registered
    before it."""
    threading.Thread(target=self._listen, name="processes", daemon=True).start()

  def report_step(self, step: int | None) -> None:
    """Reports that this process starts a training step, or None outside training, where no time limit applies."""
    self._step, self._since = step, time.monotonic()

  def share(self, value: Any = None) -> Any:
    """Returns the value of process 0 on every process. All processes must make the same calls in the same order."""
    self._exchange += 1
    if self.place.index == 0:
      self._send({"share": [self._exchange, value]})
      return json.loads(json.dumps(value))
    return self._await_value()

  def gather(self, value: Any) -> list[Any]:
    """Returns the values of all processes on every process. The calls must be in the same order on all processes."""
    self._exchange += 1
    if self.place.index != 0:
      self.report(self._exchange, value)
      return self._await_value()
    values = [value, *self.await_reports(self._exchange)]
    self._send({"share": [self._exchange, values]})
    return values

  def report(self, key: int | str, value: Any) -> None:
    """Sends a value to process 0 from any thread. A key is used once."""
    self._send({"say": [key, value]})

  def await_reports(self, key: int | str) -> list[Any]:
    """Waits, on process 0, until all others have reported a value for the key; returns the values by process."""
    with self._arrived:
      while len(received := self._reports[key]) < self.place.count - 1:
        self._arrived.wait(0.25)
      return [received[index] for index in range(1, self.place.count)]

  def _await_value(self) -> Any:
    with self._arrived:
      while self._exchange not in self._values:
        self._arrived.wait(0.25)  # signals are handled between two waits
      return self._values.pop(self._exchange)

  def fail(self, code: int, message: str) -> None:
    """Makes all other processes exit with this code and message. The caller must end this process."""
    self.failed = code
    if not self._ends:
      self._ends = True
      self._send({"fail": [code, message, self.place.index]})
      self._await_end(EXIT_GRACE_S / 4)

  def leave(self, code: int) -> None:
    """Tells the other processes that this process exits with this code, and that no more messages follow."""
    if not self._ends:
      self._ends = True
      self._send_signal()
      self._send({"left": code})
      if self.place.index == 0:  # the others need its coordination service until they exit
        self._await_end(EXIT_GRACE_S)

  def _await_end(self, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(peer.gone or peer.ends for peer in self._peers.values()):
      if threading.current_thread().name == "processes":
        self._receive()
      else:
        time.sleep(HEARTBEAT_S / 50)

  def _send(self, message: dict[str, Any]) -> None:
    for peer in self._peers.values():
      if not peer.gone:
        peer.link.send(message)

  def _listen(self) -> None:
    last_beat = 0.0
    if self._early:
      self._handle(self._peers[0], self._early)
    pause_s, now = min(5 * HEARTBEAT_S, self._silence_s / 2), time.monotonic()
    while True:
      begin = time.monotonic()
      self._receive()
      previous, now = now, time.monotonic()
      if now - previous > pause_s:  # this process was suspended, perhaps with all others: reset timers
        for peer in self._peers.values():
          peer.last_message = peer.since = now
        self._since = now
      if now - last_beat >= HEARTBEAT_S:
        last_beat = now
        self._send({"at": self._step})
      if not self._ends:
        self._send_signal()
        self._check_peers(begin)

  def _send_signal(self) -> None:
    """Reports a signal that this process has received."""
    with self._signal_lock:
      number = interrupts.first_signal()
      if number is not None and not self._forwarded:
        self._send({"signal": number})
        self._forwarded = True

  def _receive(self) -> None:
    """Waits for messages for at most a quarter of a second, and handles them."""
    peers = [peer for peer in self._peers.values() if not peer.gone]
    links = [peer.link for peer in peers]
    ready = select.select(links, [], [], HEARTBEAT_S / 4)[0]
    for peer in peers:
      if peer.link in ready:
        self._read(peer)

  def _read(self, peer: Peer) -> None:
    messages, peer.gone = peer.link.receive()
    peer.last_message = time.monotonic()
    self._handle(peer, messages)
    if peer.gone and peer.left is None:
      self._end(1, "it ended without a message; it was killed, or its host failed", peer.index)

  def _handle(self, peer: Peer, messages: list[dict[str, Any]]) -> None:
    for message in messages:
      if "at" in message and message["at"] != peer.step:
        peer.step, peer.since = message["at"], peer.last_message
      if "share" in message:
        number, value = message["share"]
        with self._arrived:
          self._values[number] = value
          self._arrived.notify_all()
      if "say" in message:
        key, value = message["say"]
        with self._arrived:
          self._reports[key][peer.index] = value
          self._arrived.notify_all()
      if "left" in message:
        peer.left = int(message["left"])
      if "signal" in message:
        self._forward_signal(int(message["signal"]))
      if "fail" in message:
        peer.ends = True
        code, text, index = message["fail"]
        self._end(int(code), str(text), int(index))

  def _forward_signal(self, number: int) -> None:
    """Handles a signal that another process received as if this process had received it. Process 0 forwards it."""
    if not self._forwarded and self.place.index == 0:
      self._send({"signal": number})
    self._forwarded = True
    interrupts.deliver(number)

  def _check_peers(self, now: float) -> None:
    """Ends the program if a process does not respond or falls behind. Process 0 checks all processes; the others check
    process 0.

    All messages that had arrived at the time `now` are read, however late this process was scheduled.
    """
    for peer in self._peers.values():
      if peer.left is None and now - peer.last_message > self._silence_s:
        self._end(1, f"it has not responded for {self._silence_s:g} s; it hangs, or its host failed", peer.index)
      if peer.left and now - peer.last_message > EXIT_GRACE_S:
        self._end(peer.left, f"it has exited, and this process did not exit within {EXIT_GRACE_S:g} s", peer.index)
    steps = {peer.index: (peer.step, peer.since) for peer in self._peers.values()}
    steps[self.place.index] = (self._step, self._since)
    training = {index: (step, since) for index, (step, since) in steps.items() if step is not None}
    if self.place.index == 0 and len(training) == self.place.count:
      self._check_steps(training, now)

  def _check_steps(self, training: dict[int, tuple[int, float]], now: float) -> None:
    """Ends the program if, while all processes are training, one of them does not start the next step, or none does."""
    first, (top, _) = max(training.items(), key=lambda item: item[1][0])
    last, (step, _) = min(training.items(), key=lambda item: item[1][0])
    idle_s = now - max(since for _, since in training.values())
    if step < top and idle_s > self._silence_s:
      text = f"it has not started step {step + 1} for {idle_s:.0f} s while other processes wait for it; it hangs"
      self._end(1, text, last)
    elif idle_s > STALL_FACTOR * self._silence_s:
      self._end(1, f"no process has finished step {step} for {idle_s:.0f} s; a collective operation hangs", first)

  def _end(self, code: int, message: str, index: int) -> None:
    """Ends this process because of the failure of process `index`. On process 0, also ends all others."""
    if self.place.index == 0:
      self._send({"fail": [code, message, index]})
    if not self._ends:
      self._ends = True
      if self.place.index == 0:
        self._await_end(EXIT_GRACE_S / 4)
      interrupts.end(code, f"moejax: {self.names[index]}: {message}")
