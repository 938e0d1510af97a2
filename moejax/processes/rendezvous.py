"""Connects the processes of a program: process 0 listens at an address that all processes know."""

import contextlib
import dataclasses
import os
import select
import socket
import time
from typing import Any

from moejax.errors import Failure
from moejax.processes.link import Link

RETRY_S = 0.25
"""Seconds between two attempts to reach process 0."""

ANSWER_S = 15.0
"""Seconds after the deadline in which process 0 can still report which processes are missing."""


@dataclasses.dataclass(frozen=True)
class Place:
  """The index of a process in its program, and the address of process 0."""

  index: int
  count: int
  """Number of processes."""
  address: str
  """HOST:PORT at which the other processes reach process 0."""
  bind: str
  """The address on which process 0 listens. Empty for all addresses of its host."""
  job: str = ""
  """Identifies the program. Connections of processes with another value are refused."""

  @property
  def host(self) -> str:
    """Host of the address."""
    return self.address.rpartition(":")[0]

  @property
  def port(self) -> int:
    """Port of the address."""
    return int(self.address.rpartition(":")[2])


@dataclasses.dataclass(frozen=True)
class Connections:
  """The connections of a process, and what it has received while connecting."""

  links: dict[int, Link]
  """By index of the other process. Process 0 is connected to all others, and each of them to process 0."""
  names: list[str]
  """Names of all processes, by index."""
  coordinator: str
  """HOST:PORT for JAX's coordination service on process 0."""
  early: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  """Further messages of process 0 that have already arrived."""


def connect(place: Place, deadline_s: float) -> Connections:
  """Waits until all processes of the program are connected.

  Raises:
    Failure: If some are not connected before the deadline. The message names them.
  """
  return _await_others(place, deadline_s) if place.index == 0 else _reach_first(place, deadline_s)


def name_of_this(index: int) -> str:
  """Name of this process in messages."""
  return f"process {index} (host {socket.gethostname()}, pid {os.getpid()})"


def free_port(host: str) -> int:
  """Returns a port on which no program listens."""
  with contextlib.closing(_listen(host, 0)) as server:
    return server.getsockname()[1]


def _listen(host: str, port: int) -> socket.socket:
  """Listens on one address or, if `host` is empty, on all addresses."""
  if host or not socket.has_dualstack_ipv6():
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
  return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)


def _await_others(place: Place, deadline_s: float) -> Connections:
  try:
    server = _listen(place.bind, place.port)
  except OSError as error:
    raise Failure(
      f"process 0 cannot listen on port {place.port} of {place.bind or place.host}: {error.strerror}; choose another "
      "port with JAX_COORDINATOR_ADDRESS (or JAX_COORDINATOR_PORT)"
    ) from error
  end, strangers = time.monotonic() + deadline_s, list[Link]()
  links: dict[int, Link] = {}
  names = {0: name_of_this(0)}
  with contextlib.closing(server):
    while len(names) < place.count:
      if time.monotonic() > end:
        text = _missing([index for index in range(place.count) if index not in names], place, deadline_s)
        for link in links.values():
          link.send({"fail": [1, text, 0]})
        raise Failure(text)
      waiting: list[Any] = [server, *strangers]
      for ready in select.select(waiting, [], [], RETRY_S)[0]:
        if ready is server:
          strangers.append(Link(server.accept()[0]))
          continue
        strangers.remove(ready)
        hello = _hello(ready, place)
        if hello is None or hello["index"] in names:
          ready.close()
        else:
          links[hello["index"]], names[hello["index"]] = ready, str(hello["name"])
  for stranger in strangers:
    stranger.close()
  connections = Connections(
    links, [names[index] for index in range(place.count)], f"{place.host}:{free_port(place.bind)}"
  )
  for link in links.values():
    link.send({"names": connections.names, "coordinator": connections.coordinator})
  return connections


def _hello(link: Link, place: Place) -> dict[str, Any] | None:
  """The first message of a process of this program, or None if it is from another program."""
  messages, _ = link.receive()
  hello = messages[0] if messages else {}
  expected = {"count": place.count, "job": place.job}
  index = hello.get("index")
  is_ours = {name: hello.get(name) for name in expected} == expected
  return hello if is_ours and isinstance(index, int) and 0 < index < place.count else None


def _missing(missing: list[int], place: Place, deadline_s: float) -> str:
  shown = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
  return (
    f"{'process' if len(missing) == 1 else 'processes'} {shown} of {place.count} did not reach process 0 at "
    f"{place.address} within {deadline_s:g} s; see their logs, or raise MOEJAX_CONNECT_TIMEOUT_S"
  )


def _reach_first(place: Place, deadline_s: float) -> Connections:
  end = time.monotonic() + deadline_s
  hello = {"index": place.index, "count": place.count, "job": place.job, "name": name_of_this(place.index)}
  while time.monotonic() < end:
    try:
      link = Link(socket.create_connection((place.host.strip("[]"), place.port), timeout=RETRY_S * 8))
    except OSError:  # process 0 does not listen yet, or its host name cannot be resolved yet
      time.sleep(RETRY_S)
      continue
    link.send(hello)
    while time.monotonic() < end + ANSWER_S:
      if not select.select([link], [], [], RETRY_S)[0]:
        continue
      messages, gone = link.receive()
      if messages and "fail" in messages[0]:
        raise Failure(str(messages[0]["fail"][1]))
      if messages and "coordinator" in messages[0]:
        welcome, *early = messages
        return Connections({0: link}, list(welcome["names"]), str(welcome["coordinator"]), early)
      if gone:  # process 0 of another program, or it was stopped
        break
    link.close()
    time.sleep(RETRY_S)
  raise Failure(
    f"process 0 of {place.count} did not answer process {place.index} at {place.address} within {deadline_s:g} s; see "
    "its log, check the address, or raise MOEJAX_CONNECT_TIMEOUT_S"
  )
