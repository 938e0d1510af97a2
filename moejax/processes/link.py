"""A connection between two processes, with one JSON message per line."""

import json
import socket
import threading
from typing import Any

MAX_LINE = 2**26
"""Maximum number of bytes of a message."""

SEND_S = 10.0
"""Timeout in seconds for sending a message."""


class Link:
  """One end of a connection. Any thread may send; one thread receives."""

  def __init__(self, connection: socket.socket):
    self._socket = connection
    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._socket.settimeout(SEND_S)
    self._lock = threading.Lock()
    self._buffer = b""

  def fileno(self) -> int:
    """For `select`."""
    return self._socket.fileno()

  def send(self, message: dict[str, Any]) -> None:
    """Sends a message. Errors are ignored, because `receive` detects a closed connection."""
    try:
      with self._lock:
        self._socket.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
      pass

  def receive(self) -> tuple[list[dict[str, Any]], bool]:
    """Returns the messages that have arrived, and whether the connection is closed. Call it if `select` reports data.

    Data that is not a valid message counts as a closed connection.
    """
    try:
      received = self._socket.recv(2**16)
    except OSError:
      received = b""
    *lines, self._buffer = (self._buffer + received).split(b"\n")
    gone = not received or len(self._buffer) > MAX_LINE
    messages = []
    try:
      messages = [json.loads(line) for line in lines]
    except ValueError:
      gone = True
    return [message for message in messages if isinstance(message, dict)], gone

  def close(self) -> None:
    """Closes this end."""
    self._socket.close()
