"""`moejax train`: train an experiment and evaluate it on held-out text."""

import argparse

from rich.text import Text

from moejax import api, lookup, processes
from moejax.command_line import NAME, path
from moejax.display import make_display
from moejax.overrides import override
from moejax.terminal import output
from moejax.verb_arguments import helped, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("name", nargs="?", metavar="NAME", help=NAME)
  parser.add_argument("--workdir", type=path, metavar="DIR", help="directory for checkpoints, metrics and results")
  parser.add_argument(
    "--profile", type=int, metavar="STEPS",
    help="trace this number of steps, after the first two, to DIR/profile for XProf and Perfetto, and compare the time "
    "of each scope with its prediction",
  )  # fmt: skip


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  experiment = override(lookup.find_experiment(required(known, "name", "NAME")), overrides)
  directory = required(known, "workdir", "--workdir DIR")
  api.join()
  with make_display(f"train {experiment.name}") as progress:
    trained = api.train(experiment, directory, profile=known.profile, progress=progress)
  if processes.is_first():
    output().print(trained, soft_wrap=True)
    if known.profile is not None:
      from moejax.planning.profile import write_profile

      output().print(write_profile(directory), soft_wrap=True)
    if experiment.model.moe is not None:
      from moejax.planning.measured_run import read_measured_run

      run = read_measured_run(directory, "--workdir")
      if run.loads:
        load = run.load(experiment.model.moe.num_experts)
        output().print(
          Text(f"router load: {load:.2f} times the mean on the busiest expert; --load {directory} plans with it"),
          soft_wrap=True,
        )
  return 0
