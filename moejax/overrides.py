"""Fields of a configuration from the command line: dotted paths, typed by the dataclass, one-line errors."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from moejax.config.experiment import Experiment, Suite
from moejax.config.moe import LOSSES_OF_SPARSE_LAYERS
from moejax.config.sharding import Rules
from moejax.errors import UserError

Configuration = TypeVar("Configuration", bound=Experiment | Suite)

# --model.tie-embeddings False rather than a pair of flags; the fields of what an optional field holds, without choice.
STYLE = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)

RULES_BY_NAME = ConstructorRegistry()


@RULES_BY_NAME.struct_rule
def _rules_by_name(info: StructTypeInfo) -> StructConstructorSpec | None:
  """Sharding rules as one option for each logical axis: `--rules.embed data expert`; no axes leave it whole."""
  if info.type != Rules:
    return None
  meaning = "Mesh axes that shard it."
  fields = [StructFieldSpec(name, tuple[str, ...], axes, meaning) for name, axes in dict(info.default).items()]
  return StructConstructorSpec(instantiate=lambda **axes: tuple(axes.items()), fields=tuple(fields))


OF_EVERY_MEMBER = tuple(field.name for field in dataclasses.fields(Experiment) if field.name != "name")
OF_SPARSE_MEMBERS = ("model.moe.", *(f"training.losses.{name}" for name in LOSSES_OF_SPARSE_LAYERS))


def override(configuration: Configuration, arguments: Sequence[str]) -> Configuration:
  """The configuration with fields set, as in `--model.num-layers 4 --data.train a.txt b.jsonl --rules.embed data`.

  A field of an experiment, given for a suite, is set in every member, one of sparse layers in every sparse member;
  `--pairs.0.dense.model.d-ff 512` sets it in one.

  Raises:
    UserError: an unknown field, a value of the wrong type, or a configuration that is not valid.
  """
  if isinstance(configuration, Experiment):
    return _parse(configuration, arguments)
  groups = _groups(arguments)
  shared = [group for group in groups if _path(group).split(".")[0] in OF_EVERY_MEMBER]
  own = [argument for group in groups if group not in shared for argument in group]
  suite = _parse(cast(Suite, configuration), own)
  of_all = [argument for group in shared for argument in group]
  of_dense = [argument for group in shared if not _path(group).startswith(OF_SPARSE_MEMBERS) for argument in group]
  pairs = tuple(
    dataclasses.replace(
      pair,
      dense=_parse(pair.dense, of_dense),
      candidates=tuple(_parse(candidate, of_all) for candidate in pair.candidates),
    )
    for pair in suite.pairs
  )
  return cast(Configuration, dataclasses.replace(suite, pairs=pairs))


def override_pair(dense: Experiment, moe: Experiment, arguments: Sequence[str]) -> tuple[Experiment, Experiment]:
  """Both with fields set: `--dense.mesh.data 64` those of the dense experiment, `--mesh.data 64` those of the MoE.

  Raises:
    UserError: as `override`.
  """
  mark = "--dense."
  of_dense: list[str] = []
  of_moe: list[str] = []
  for option, *values in _groups(arguments):
    if option.startswith(mark):
      of_dense += [f"--{option.removeprefix(mark)}", *values]
    else:
      of_moe += [option, *values]
  return override(dense, of_dense), override(moe, of_moe)


def print_field_help(configuration: Configuration, command: str) -> None:
  """Prints every field of a configuration with its type, meaning and value."""
  if isinstance(configuration, Suite):
    print("A field of an experiment, as in --training.steps 200, is set in every member; those of one member follow.\n")
  with contextlib.suppress(SystemExit):
    _tyro(configuration, ["--help"], command)


def _parse(configuration: Configuration, arguments: Sequence[str]) -> Configuration:
  if not arguments:
    return configuration
  _check_names(configuration, arguments)
  complaint = io.StringIO()
  try:
    with contextlib.redirect_stderr(complaint):
      return _tyro(configuration, arguments)
  except SystemExit as error:
    # A configuration's own complaint as it is; tyro boxes and wraps it.
    raise _own(error) or UserError(_first_paragraph(complaint.getvalue())) from error


def _tyro(configuration: Configuration, arguments: Sequence[str], program: str | None = None) -> Configuration:
  return tyro.cli(
    type(configuration),
    default=configuration,
    args=list(arguments),
    prog=program,
    config=STYLE,
    registry=RULES_BY_NAME,
  )


def _check_names(configuration: Any, arguments: Sequence[str]) -> None:
  known = _leaves(configuration)
  for group in _groups(arguments):
    path = _path(group)
    if path in known:
      continue
    if any(name.startswith(f"{path}.") for name in known):
      example = "embed data" if path == "rules" else "FIELD VALUE"
      raise UserError(f"{path} is a group of fields; set one of them, as in --{path}.{example}")
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5) or [
      name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]
    ]
    of_moe = ".moe" in path and not any(".moe." in name for name in known)
    hint = "; it has no sparse layers: start from an MoE experiment" if of_moe else ""
    hint = hint or (f"; did you mean {' or '.join('--' + name.replace('_', '-') for name in near)}?" if near else "")
    raise UserError(f"{configuration.name!r} has no field {path!r}{hint}")


def _leaves(value: Any, path: str = "") -> list[str]:
  """Dotted names of all fields that can be set."""
  if dataclasses.is_dataclass(value):
    items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    items = [(name, item) for name, item in items if name != "moe" or item is not None]
  elif path.rpartition(".")[2] == "rules":
    items = [(name, ()) for name in dict(value)]
  elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
    items = [(str(i), item) for i, item in enumerate(value)]
  else:
    return [path]
  return [leaf for name, item in items for leaf in _leaves(item, f"{path}.{name}" if path else name)]


def _groups(arguments: Sequence[str]) -> list[list[str]]:
  """Each option with the values that follow it.

  Raises:
    UserError: a value that no option precedes.
  """
  groups: list[list[str]] = []
  for argument in arguments:
    if re.match(r"--[A-Za-z]", argument):
      groups.append([argument])
    elif groups:
      groups[-1].append(argument)
    else:
      raise UserError(f"unexpected argument {argument!r}; fields are set as --PATH VALUE, as in --model.num-layers 4")
  return groups


def _path(group: list[str]) -> str:
  return group[0].removeprefix("--").partition("=")[0].replace("-", "_")


def _own(error: BaseException) -> UserError | None:
  """The UserError that this exception was raised in the course of handling, if any."""
  cause = error.__cause__ or error.__context__
  return cause if cause is None or isinstance(cause, UserError) else _own(cause)


def _first_paragraph(box: str) -> str:
  """What a boxed message of tyro says below its title, on one line; where the output is ASCII, rules are its box."""
  lines = [line.strip("│╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
  paragraph = itertools.takewhile(_is_text, itertools.dropwhile(lambda line: not _is_text(line), lines))
  return " ".join(paragraph).removeprefix("Error parsing ")


def _is_text(line: str) -> bool:
  """False for a rule or an empty line."""
  return not set(line) <= set("─-")
