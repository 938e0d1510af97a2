"""The moejax command that a job runs. Names, fields and mesh are checked before it is submitted. Imports no JAX."""

import argparse
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import NoReturn

from moejax import lookup
from moejax.config.experiment import Experiment, Suite
from moejax.errors import UserError
from moejax.overrides import override
from moejax.planning.meshes import on_topology
from moejax.planning.topology import Topology

FORMATTER = argparse.RawDescriptionHelpFormatter


@dataclasses.dataclass(frozen=True)
class Job:
  """A command that runs on every host of a job."""

  verb: str
  """train or compare."""
  configuration: Experiment | Suite
  command: tuple[str, ...]

  @property
  def experiments(self) -> tuple[Experiment, ...]:
    """The experiments that it trains."""
    return self.configuration.members if isinstance(self.configuration, Suite) else (self.configuration,)

  @property
  def label(self) -> str:
    """Its name as a DNS label, which starts with a letter: `moe_6b4_64e` becomes `moe-6b4-64e`."""
    text = re.sub(r"[^a-z0-9]+", "-", self.configuration.name.lower()).strip("-")
    return text if re.match("[a-z]", text) else f"job-{text}".rstrip("-")

  def __str__(self) -> str:
    return shlex.join(self.command)


class Parser(argparse.ArgumentParser):
  """A parser that raises UserError with a message of one line."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see `{self.prog} --help`")


def make_parser(module: str, description: str, epilog: str, workdir: str) -> Parser:
  """The parser of a launcher, with the options that all launchers have."""
  parser = Parser(prog=f"python -m {module}", description=description, epilog=epilog, formatter_class=FORMATTER)
  parser.add_argument("verb", choices=("train", "compare"), help="the moejax command that the job runs")
  parser.add_argument(
    "experiment", metavar="NAME",
    help="experiment or suite: a listed name, FILE.py:FUNCTION, or RUN/experiment.json; a file must have the same path "
    "on the hosts",
  )  # fmt: skip
  parser.add_argument("--workdir", required=True, metavar="DIR", help=workdir)
  parser.add_argument(
    "--topology", required=True, metavar="NAME",
    help="topology of one slice, as for `moejax plan`: v4:4x4x4, v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x8",
  )  # fmt: skip
  parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices (default: 1)")
  return parser


def make_job(verb: str, name: str, workdir: str, overrides: Sequence[str], topology: Topology) -> Job:
  """The job of a command line.

  Raises:
    UserError: If the experiment or a field does not exist, or the mesh does not tile the topology.
  """
  found = lookup.find_experiment(name) if verb == "train" else lookup.find_suite(name)
  configuration = override(found, list(overrides))
  if not pathlib.PurePosixPath(workdir).is_absolute():
    raise UserError(f"--workdir {workdir!r} is not an absolute path; give its path on the hosts, as in /data/run1")
  job = Job(verb, configuration, ("moejax", verb, name, "--workdir", workdir, *overrides))
  for experiment in job.experiments:
    try:
      on_topology(experiment, topology)
    except UserError as error:
      raise UserError(f"{experiment.name} on {topology.name}: {error}") from error
  return job
