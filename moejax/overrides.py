"""Sets fields of a configuration from the command line, by dotted paths."""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from moejax.config.experiment import Experiment, Suite
from moejax.config.fields import OF_SPARSE_MEMBERS, with_members
from moejax.config.kinds import KIND, OfSeveralKinds, base_of, kinds, path_of
from moejax.config.plain import IF_YOUR_OWN
from moejax.config.sharding import Rules
from moejax.config.walk import holds_configurations, join, leaves, walk
from moejax.errors import UserError
from moejax.field_hints import hint
from moejax.field_values import option, parse_values

Configuration = TypeVar("Configuration", bound=Experiment | Suite)

# --model.tie-embeddings False instead of a pair of flags; no subcommands for optional fields.
STYLE = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)

RULES_BY_NAME = ConstructorRegistry()


@RULES_BY_NAME.struct_rule
def _rules_by_name(info: StructTypeInfo) -> StructConstructorSpec | None:
  """One option per logical axis for sharding rules: `--rules.embed data expert`. Without values, it is not sharded."""
  if info.type != Rules:
    return None
  meaning = "Mesh axes that shard this logical axis."
  fields = [StructFieldSpec(name, tuple[str, ...], axes, meaning) for name, axes in dict(info.default).items()]
  return StructConstructorSpec(instantiate=lambda **axes: tuple(axes.items()), fields=tuple(fields))


OF_EVERY_MEMBER = tuple(field.name for field in dataclasses.fields(Experiment) if field.name != "name")


def override(configuration: Configuration, arguments: Sequence[str]) -> Configuration:
  """Sets fields, as in `--model.num-layers 4 --data.train a.txt b.jsonl --rules.embed data`.

  For a suite, a field of an experiment is set in every member, and a field of sparse layers in every member with sparse
  layers. `--pairs.0.dense.model.d-ff 512` sets the field of one member.

  Raises:
    UserError: If a field is unknown, a value has the wrong type, or the configuration is not valid.
  """
  if isinstance(configuration, Experiment):
    return _parse(configuration, arguments)
  groups = _groups(arguments)
  shared = [group for group in groups if _path(group).split(".")[0] in OF_EVERY_MEMBER]
  own = [argument for group in groups if group not in shared for argument in group]
  known = [*dict.fromkeys(leaf for member in configuration.members for leaf in _leaves(member))]
  of_all = [argument for group in shared for argument in group]
  of_dense = [argument for group in shared if not _path(group).startswith(OF_SPARSE_MEMBERS) for argument in group]
  # The members first, so that the suite is checked with them, and a field of one member replaces that of all.
  changed = with_members(
    cast(Suite, configuration),
    lambda dense: _parse(dense, of_dense, known),
    lambda candidate: _parse(candidate, of_all, known),
  )
  return cast(Configuration, _parse(changed, own, known))


def override_pair(dense: Experiment, moe: Experiment, arguments: Sequence[str]) -> tuple[Experiment, Experiment]:
  """Sets fields of two experiments: `--dense.mesh.data 64` of the dense experiment, `--mesh.data 64` of the MoE.

  Raises:
    UserError: See `override`.
  """
  mark = "--dense."
  of_dense: list[str] = []
  of_moe: list[str] = []
  for given, *values in _groups(arguments):
    if given.startswith(mark):
      of_dense += [f"--{given.removeprefix(mark)}", *values]
    else:
      of_moe += [given, *values]
  return override(dense, of_dense), override(moe, of_moe)


def print_field_help(configuration: Configuration, command: str) -> None:
  """Prints every field of a configuration with its type, description and value."""
  if isinstance(configuration, Suite):
    print("A field of an experiment, as in --training.steps 200, is set in every member.\n")
  with contextlib.suppress(SystemExit):
    tyro.cli(
      type(configuration),
      default=configuration,
      args=["--help"],
      prog=command,
      config=STYLE,
      registry=RULES_BY_NAME,
    )
  for path, owner in _several_kinds(configuration):
    base = base_of(type(owner))
    print(f"{option(join(path, KIND))} or {option(path)} one of {', '.join(kinds(base))} (default: {owner.kind})")
    for name in kinds(base):
      own = [option(join(path, field)) for field in _fields(kinds(base)[name]) if field not in _fields(base)]
      if own and name != owner.kind:
        print(f"  {name}: {' '.join(own)}")


def _parse(configuration: Configuration, arguments: Sequence[str], known: Sequence[str] = ()) -> Configuration:
  """Sets fields. `known` lists additional fields that messages can suggest."""
  several = [path for path, _ in _several_kinds(configuration)]
  given: dict[str, list[str]] = {}
  for group in _groups(arguments):
    _, equals, value = group[0].partition("=")
    path = _path(group)
    # --optimizer Lion means --optimizer.kind Lion
    given[join(path, KIND) if path in several else path] = [value, *group[1:]] if equals else group[1:]
  configuration = _of_kinds(configuration, given)
  _check_names(configuration, given, known)
  return _with(configuration, given)


def _of_kinds(owner: Any, given: Mapping[str, list[str]], path: str = "") -> Any:
  """Replaces parts with several kinds, such as the optimizer, if a kind is given, as in `--optimizer.kind Lion`.

  Fields that all kinds have keep their values. The other fields of the new kind have their defaults, or no value.
  Nothing is checked before `_with` sets the given fields.
  """
  if holds_configurations(owner):
    return tuple(_of_kinds(item, given, join(path, str(i))) for i, item in enumerate(owner))
  if not dataclasses.is_dataclass(owner) or not any(name.rpartition(".")[2] == KIND for name in given):
    return owner
  kind, fields = type(owner), {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner)}
  if isinstance(owner, OfSeveralKinds) and join(path, KIND) in given:
    base = base_of(kind)
    choice = Literal[tuple(kinds(base))]  # type: ignore[valid-type]  # known only at run time
    with _hint_of_import():
      name = parse_values(given[join(path, KIND)], choice, join(path, KIND), owner.kind)
    kind = kinds(base)[name]
    defaults = {field.name: field.default for field in dataclasses.fields(cast(Any, kind))}
    shared = {name: fields[name] for name in _fields(base)}
    fields = {name: value for name, value in (defaults | shared).items() if value is not dataclasses.MISSING}
  made = object.__new__(kind)
  for name, value in fields.items():
    object.__setattr__(made, name, _of_kinds(value, given, join(path, name)))
  return made


@contextlib.contextmanager
def _hint_of_import() -> Iterator[None]:
  """Adds to the error for an unknown kind, unless it looks like a typo, how to use a custom kind."""
  try:
    yield
  except UserError as error:
    hint = "" if "did you mean" in str(error) else f"; {IF_YOUR_OWN}"
    raise UserError(f"{error}{hint}") from error


def _with(owner: Configuration, given: Mapping[str, list[str]], path: str = "") -> Configuration:
  """Sets the given fields of `owner`, whose path is `path`. Each class is constructed, and therefore checked, once."""
  hints = get_type_hints(type(owner))
  changes: dict[str, Any] = {}
  for field in dataclasses.fields(cast(Any, owner)):
    name = join(path, field.name)
    now: Any = getattr(owner, field.name, None)
    below = {other: values for other, values in given.items() if other == name or other.startswith(f"{name}.")}
    if not below and not hasattr(owner, field.name):
      raise UserError(f"{name} is missing; add it, as in {option(name)} VALUE")
    if not below:
      continue
    if dataclasses.is_dataclass(now):
      changes[field.name] = _with(cast(Any, now), below, name)
    elif field.name == "rules":
      axes = {rule: _rule(below.get(join(name, rule)), join(name, rule), now) for rule, now in dict(now).items()}
      changes[field.name] = tuple(axes.items())
    elif holds_configurations(now):
      changes[field.name] = tuple(_with(item, below, join(name, str(i))) for i, item in enumerate(now))
    else:
      changes[field.name] = parse_values(below[name], hints[field.name], name, now)
  try:
    return dataclasses.replace(cast(Any, owner), **changes)
  except UserError as error:
    # The message of a class has a path such as checkpoints.every, without the path of the class itself.
    short, text = f"{path_of(type(owner))}.", str(error)
    raise UserError(f"{path}.{text.removeprefix(short)}" if path and text.startswith(short) else text) from error


def _rule(values: list[str] | None, path: str, now: tuple[str, ...]) -> tuple[str, ...]:
  if values is None:
    return now
  return parse_values([axis for axis in values if axis], tuple[str, ...], path, now)


def _check_names(configuration: Any, given: Iterable[str], others: Sequence[str]) -> None:
  known = _leaves(configuration)
  for path in given:
    if path in known:
      continue
    if any(name.startswith(f"{path}.") for name in known):
      example = "embed data" if path.rpartition(".")[2] == "rules" else "FIELD VALUE"
      raise UserError(f"{path} is a group of fields; set a field in it, as in {option(path)}.{example}")
    if remedy := _of_other_kind(configuration, path):
      raise UserError(f"{configuration.name!r} has no field {path!r}, but {remedy}")
    of_moe = "model.moe." in f"{path}." and not any(".moe." in name for name in known)
    without = "; it has no sparse layers; use an MoE experiment"
    # In a suite, a field is set in all members unless its path names one member.
    near = known if path.startswith("pairs") else [name for name in (*known, *others) if not name.startswith("pairs")]
    raise UserError(f"{configuration.name!r} has no field {path!r}{without if of_moe else hint(path, near)}")


def _of_other_kind(configuration: Any, path: str) -> str:
  """The remedy for a field that another kind of router, dispatch or optimizer has, or an empty string."""
  for owner_path, owner in _several_kinds(configuration):
    base = base_of(type(owner))
    having = [name for name in kinds(base) if path in [join(owner_path, field) for field in _fields(kinds(base)[name])]]
    if having:
      choose = option(join(owner_path, KIND))
      return (
        f"{path_of(base)} {' and '.join(having)} ha{'s' if len(having) == 1 else 've'} it: add {choose} {having[0]}"
      )
  return ""


def _leaves(configuration: Any) -> list[str]:
  """Dotted paths of all fields that can be set."""
  return [path for path, value in leaves(configuration) if value is not None or path.rpartition(".")[2] != "moe"]


def _several_kinds(configuration: Any) -> list[tuple[str, Any]]:
  """Path and value of each field whose class has several kinds."""
  return [(path, value) for path, value in walk(configuration) if isinstance(value, OfSeveralKinds)]


def _fields(kind: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(kind)]


def _groups(arguments: Sequence[str]) -> list[list[str]]:
  """Groups each option with the values that follow it.

  Raises:
    UserError: If a value does not follow an option.
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
