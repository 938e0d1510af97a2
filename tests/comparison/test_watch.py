"""The server of the report: what it serves, what it does not, and that it stops."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading

import pytest

from moejax.comparison.watch import Server
from moejax.errors import UserError

pytestmark = pytest.mark.usefixtures("without_library")


@contextlib.contextmanager
def serving(directory):
  with Server(directory, 0) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


def answer(server, path, method="GET", host=None) -> tuple[int, bytes]:
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
  connection.request(method, path, headers={"Host": host} if host else {})
  response = connection.getresponse()
  content = response.read()
  connection.close()
  return response.status, content


def test_it_serves_the_page_and_its_drawings_and_nothing_else(comparison, write_comparison):
  directory = write_comparison(comparison, tuple(member["name"] for member in comparison["members"]))
  report = directory / "report"
  report.mkdir()
  (report / "speed_accuracy.png").write_bytes(b"PNG")
  (report / "secret.txt").write_text("secret")
  (report / "link.svg").symlink_to(directory / "comparison.json")
  with serving(directory) as server:
    code, page = answer(server, "/")
    assert code == 200 and b"quickstart" in page and b"connect-src 'self'" in page
    assert b"../comparison.json" not in page and b"../runs" not in page
    assert answer(server, "/speed_accuracy.png") == (200, b"PNG")
    assert answer(server, "/", "HEAD") == (200, b"")
    others = [
      "/../comparison.json",
      "/%2e%2e/comparison.json",
      "/..%2f..%2fx.svg",
      "/secret.txt",
      "/link.svg",
      "/comparison.json",
      "/runs/dense_small/metrics.jsonl",
      "/%00.svg",
      "/" + "a" * 300 + ".png",
    ]
    for path in others:
      assert answer(server, path)[0] == 404, path
    assert answer(server, "/", host="evil.example")[0] == 403
    assert answer(server, "/", "POST")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_the_version_and_the_page_change_with_the_results(comparison, tmp_path, write_comparison):
  with serving(tmp_path) as server:
    code, page = answer(server, "/")
    assert code == 200 and b"No results yet" in page
    directory = server.directory = write_comparison(comparison, tuple(m["name"] for m in comparison["members"]))
    before = answer(server, "/version")[1]
    assert b"No results yet" not in answer(server, "/")[1]
    (directory / "comparison.json").write_text(json.dumps(comparison | {"finding": "A new finding."}))
    assert answer(server, "/version")[1] != before and b"A new finding." in answer(server, "/")[1]
    (directory / "comparison.json").write_text("{")
    assert b"is not JSON" in answer(server, "/")[1]


def test_a_port_in_use_or_out_of_range_and_a_missing_directory_are_mistakes(tmp_path):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with pytest.raises(UserError, match=r"not available .*--port"):
      Server(tmp_path, taken.getsockname()[1])
  with pytest.raises(UserError, match="port 70000"):
    Server(tmp_path, 70000)
  with pytest.raises(UserError, match="does not exist"):
    Server(tmp_path / "none", 0)


@pytest.mark.slow
def test_the_command_says_where_it_serves_and_ends_with_the_code_of_its_signal(tmp_path):
  command = [sys.executable, "-m", "moejax", "watch", str(tmp_path), "--port", "0"]
  for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
      line = process.stdout.readline()
      assert line.startswith("http://127.0.0.1:") and str(tmp_path) in line
      process.send_signal(number)
      assert process.wait(30) == code
      assert "Traceback" not in process.stderr.read()
