"""Serves the report of a comparison to a browser on this machine while the comparison runs."""

import http.server
import socketserver
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moejax.comparison.page import waiting_page
from moejax.comparison.report import report_page
from moejax.errors import UserError

HOST = "127.0.0.1"
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Server(http.server.ThreadingHTTPServer):
  """Serves the page of a comparison, and the drawings in its report directory. It writes nothing."""

  daemon_threads = True
  allow_reuse_address = True

  def __init__(self, directory: Path, port: int):
    """Opens the port.

    Args:
      directory: the directory of the comparison, which may not have results yet.
      port: the port, or 0 for any that is free.

    Raises:
      UserError: If the directory does not exist or the port is not available.
    """
    if not directory.is_dir():
      raise UserError(f"{directory} does not exist; give the --workdir of `moejax compare`")
    self.directory = directory
    self._made: tuple[str, str] | None = None
    try:
      super().__init__((HOST, port), _Handler)
    except (OSError, OverflowError) as error:
      raise UserError(f"port {port} of {HOST} is not available ({error}); give another --port, or 0 for any") from error

  def server_bind(self) -> None:
    """Binds the port without asking for the name of this machine, which can take long."""
    socketserver.TCPServer.server_bind(self)
    self.server_name, self.server_port = HOST, self.server_address[1]

  @property
  def address(self) -> str:
    """The address of the page."""
    return f"http://{HOST}:{self.server_port}/"

  def version(self) -> str:
    """Changes when a file from which the page is made changes."""
    paths = [self.directory / "comparison.json", *sorted(self.directory.glob("runs/*/metrics.jsonl"))]
    states = []
    for path in paths:
      try:
        state = path.stat()
      except OSError:  # it does not exist yet, or has just been replaced
        continue
      states.append(f"{state.st_mtime_ns}-{state.st_size}")
    return "_".join(states)

  def page(self) -> str:
    """The page as it is now."""
    version = self.version()
    if self._made is None or self._made[0] != version:
      try:
        self._made = version, report_page(self.directory, live=True)
      except UserError as error:  # nothing is measured yet, or a file is being replaced
        return waiting_page(str(self.directory), str(error))
    return self._made[1]


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers GET and HEAD for the page, its version and the drawings of the report directory."""

  server: Server

  def answer(self) -> None:
    # Another site that resolves its own name to this machine must not read the page.
    if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
      return self._send(403, "text/plain", b"wrong host\n")
    path = unquote(urlsplit(self.path).path)
    if path in ("/", "/index.html"):
      return self._send(200, "text/html; charset=utf-8", self.server.page().encode())
    if path == "/version":
      return self._send(200, "text/plain", self.server.version().encode())
    content = self._drawing(path.removeprefix("/"))
    if content is None:
      return self._send(404, "text/plain", b"not found\n")
    return self._send(200, TYPES[path[-4:]], content)

  def _drawing(self, name: str) -> bytes | None:
    """The content of a drawing in the report directory itself, or None if there is none with this name."""
    report = (self.server.directory / "report").resolve()
    try:
      path = (report / name).resolve()
      if name[-4:] in TYPES and path.parent == report and "/" not in name:
        return path.read_bytes()
    except (OSError, ValueError):
      pass
    return None

  def _send(self, code: int, kind: str, content: bytes) -> None:
    self.send_response(code)
    for header, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(content))}).items():
      self.send_header(header, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def log_message(self, format: str, *arguments: object) -> None:
    """Prints nothing: the browser asks every two seconds."""


for _method in ("GET", "HEAD"):
  setattr(_Handler, f"do_{_method}", _Handler.answer)
