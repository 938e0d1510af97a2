"""`moejax watch`: serve the report of a comparison while it runs."""

import argparse

from moejax.command_line import path
from moejax.verb_arguments import helped, no_overrides, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("workdir", nargs="?", type=path, metavar="DIR", help="the --workdir of a comparison")
  parser.add_argument("--port", type=int, default=8321, help="port on 127.0.0.1; 0 uses any free port (default: 8321)")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  directory = required(known, "workdir", "DIR")
  from moejax.comparison.watch import Server

  with Server(directory, known.port) as server:
    print(f"{server.address} shows {directory}; press Ctrl-C to stop", flush=True)
    server.serve_forever()
  return 0
