"""The floors of the house, and how large a thing may become. Reads the source, imports none of it."""

import ast
import collections
import functools
import graphlib
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]

# A file imports from its own floor and from floors below it. Each stands as low as its imports allow.
FLOORS = (
  (
    "moejax",
    "moejax.errors",
    "moejax.files",
    "moejax.interrupts",
    "moejax.lock",
    "moejax.config",
    "moejax.processes",
    "moejax.display",
    "moejax.notebook",
    "moejax.progress",
    "moejax.results",
    "moejax.terminal",
    "moejax.command_line",
    "moejax.gpu_memory",
    "moejax.huge_pages",
    "moejax.optional",
    "moejax.field_values",
    "moejax.field_hints",
  ),
  ("moejax.experiments",),
  (
    "moejax.partitioning",
    "moejax.host_memory",
    "moejax.torus",
    "moejax.overrides",
    "moejax.user_files",
    "moejax.lookup",
    "moejax.describe",
    "moejax.interop.configs",
    "moejax.interop.foreign",
    "moejax.interop.hf_plans",
    "moejax.interop.maxtext",
    "moejax.interop.maxtext_files",
    "moejax.interop.families",
    "moejax.interop.field_types",
    "moejax.interop.layer_types",
    "moejax.interop.llama4_layers",
    "moejax.interop.same_function",
  ),
  ("moejax.kernels",),
  ("moejax.models",),
  ("moejax.data",),
  ("moejax.training",),
  ("moejax.inference", "moejax.interop"),
  ("moejax.evaluation", "moejax.planning", "moejax.scaling"),
  ("moejax.comparison", "moejax.decision"),
  ("moejax.api", "moejax.api_planning"),
  ("moejax.python_calls",),
  ("moejax.verb_arguments",),
  ("moejax.commands",),
  ("moejax.cli", "moejax.launch"),
  ("moejax.__main__",),
)
FLOOR_OF = {name: i + 1 for i, names in enumerate(FLOORS) for name in names}

BEHIND_A_COMMAND = {
  "moejax.evaluation.harness": {"lm_eval"},
  "moejax.evaluation.harness_model": {"lm_eval"},
  "moejax.evaluation.task_data": {"datasets"},
  "moejax.evaluation.task_lookup": {"lm_eval", "datasets", "huggingface_hub"},
}
"""Files that subclass or call a library of an extra, and so import it at their top."""

ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}
"""What takes seconds to import."""

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_CONFIG_FIELDS = 237
"""A quarter of them are what the literature's routers and dispatches differ in, each field named for its paper;
another third are what published families of models differ in, most of them in values of attention and RoPE."""
MAX_OF_TRAINING = (190, 23_000)
"""Files and lines that `moejax train` imports, of which processes/ has 6 and 750."""
MAX_OF_TRAINING_WITHOUT_INPUT = (148, 18_300)
"""The same without data/ and experiments/."""
SAYS_NOTHING = ("utils", "util", "common", "helpers", "helper", "misc", "types")

NOT_SOURCE = re.compile(r"\.git|\.hypothesis|\.venv.*|__pycache__|build|dist|.*\.egg-info|.*_cache")
TEXT_SUFFIXES = (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".cfg", ".html", ".css", ".js", "")


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir() and not path.is_symlink() and not NOT_SOURCE.fullmatch(path.name):
      yield from _files(path)
    elif path.is_file():
      yield path


TEXTS = [path for path in _files(ROOT) if path.suffix in TEXT_SUFFIXES and path.name != ".git"]
SOURCES = [path for path in TEXTS if path.suffix == ".py"]
OURS = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("moejax", "experiments", "launch")]


def offenders(paths: list[pathlib.Path], fault: Callable[[pathlib.Path], Any]) -> dict[str, Any]:
  """What is wrong with each file, of those with which anything is."""
  return {str(path.relative_to(ROOT)): found for path in paths if (found := fault(path))}


def below(*names: str) -> list[pathlib.Path]:
  """Files of these modules and packages."""
  return [path for path in OURS if any(f"{module(path)}.".startswith(f"{name}.") for name in names)]


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(), str(path))


def module(path: pathlib.Path) -> str:
  """Its name to `import`; experiments/ and launch/ are linked into moejax/."""
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
  return name if name.startswith("moejax") else f"moejax.{name}"


BY_MODULE = {module(path): path for path in OURS}


@functools.cache
def imported(path: pathlib.Path, also_local: bool = True) -> frozenset[str]:
  """Modules that a file imports: of ours the very module, of others the package. `also_local`: in functions too."""
  return names_imported(path, _walk(tree(path), also_local))


def names_imported(path: pathlib.Path, nodes: Iterable[ast.AST]) -> frozenset[str]:
  """Modules that the import statements among these nodes of a file name."""
  names = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
      submodules = [f"{node.module}.{alias.name}" for alias in node.names]
      names |= {name if name in BY_MODULE else str(node.module) for name in submodules}
  return frozenset(name if is_ours(name) else name.partition(".")[0] for name in names)


def _walk(node: ast.AST, into_functions: bool) -> Iterator[ast.AST]:
  for child in ast.iter_child_nodes(node):
    yield child
    if into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
      yield from _walk(child, into_functions)


def is_ours(name: str) -> bool:
  return name.partition(".")[0] == "moejax"


def floor(name: str) -> int | None:
  """The floor of a module: its own, or that of the package it is in. The package moejax itself gives its files none."""
  parts = name.split(".")
  names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
  return next((FLOOR_OF[stem] for stem in names if stem in FLOOR_OF and (stem != "moejax" or stem == name)), None)


def reached(name: str, also_local: bool = True) -> set[str]:
  """All that importing a module of ours imports, directly or not."""
  seen: set[str] = set()
  waiting = [name]
  while waiting:
    name = waiting.pop()
    # Importing a module imports the packages that it is in.
    for found in imported(BY_MODULE[name], also_local) if name in BY_MODULE else ():
      parents = [found.rsplit(".", depth)[0] for depth in range(found.count(".") + 1)] if is_ours(found) else [found]
      waiting += [parent for parent in parents if parent not in seen]
      seen |= set(parents)
  return seen


def test_every_file_stands_on_a_floor():
  homeless = [module(path) for path in OURS if floor(module(path)) is None]
  assert not homeless, "add them to FLOORS as low as their imports allow"


def test_a_file_imports_only_from_its_own_floor_and_below():
  def above(path: pathlib.Path) -> list[str]:
    here = floor(module(path)) or 0
    ours = [name for name in imported(path) if is_ours(name)]
    return sorted(f"{name} (floor {floor(name)})" for name in ours if (floor(name) or len(FLOORS)) > here)

  assert not offenders(OURS, above)


def test_every_floor_is_there():
  gone = [name for name in FLOOR_OF if not below(name)]
  assert not gone, f"FLOORS names {gone}, which no longer exist"


def test_the_configuration_imports_only_the_standard_library_and_the_errors():
  allowed = {*sys.stdlib_module_names, *map(module, below("moejax.config", "moejax.errors"))}
  assert not offenders(below("moejax.config", "moejax.errors"), lambda path: imported(path) - allowed)


def test_experiments_import_only_the_configuration():
  allowed = {*sys.stdlib_module_names, *map(module, below("moejax.experiments", "moejax.config"))}
  assert not offenders(below("moejax.experiments"), lambda path: imported(path) - allowed)


def test_the_input_pipeline_never_reaches_jax():
  assert not offenders(below("moejax.data"), lambda path: reached(module(path)) & (ACCELERATED - {"grain"}))


def test_the_input_pipeline_asks_for_no_accelerated_library():
  def asked(path: pathlib.Path) -> set[str]:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    arguments = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "library"]
    return {ast.literal_eval(argument).partition(".")[0] for argument in arguments} & ACCELERATED

  assert not offenders(below("moejax.data"), asked)


def test_a_file_imports_only_what_every_installation_has():
  """Libraries of extras are asked for through moejax.optional, or by files that a command imports when needed."""
  calls = [node for node in ast.walk(tree(ROOT / "setup.py")) if isinstance(node, ast.Call)]
  (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup"]
  (required,) = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "install_requires"]
  installed = {re.split(r"[-<>=]", requirement)[0] for requirement in required}
  # PyYAML is imported as yaml, vl-convert-python as vl_convert, and etils has the paths of Orbax.
  allowed = {*installed, *sys.stdlib_module_names, "jaxlib", "yaml", "vl_convert", "etils"}

  def others(path: pathlib.Path) -> set[str]:
    return {name for name in imported(path) if not is_ours(name)} - allowed - BEHIND_A_COMMAND.get(module(path), set())

  assert not offenders(OURS, others)


def test_what_needs_an_extra_is_imported_by_the_commands_alone():
  found = {module(path) for path in OURS if set(BEHIND_A_COMMAND) & imported(path)}
  assert found <= {"moejax.api", *BEHIND_A_COMMAND}


def test_the_commands_import_nothing_slow_before_they_need_it():
  commands = ["moejax.cli", *map(module, below("moejax.commands"))]
  assert not {name for name in commands if reached(name, also_local=False) & ACCELERATED}


def test_a_launcher_answers_without_jax():
  assert not offenders(below("moejax.launch"), lambda path: reached(module(path), also_local=False) & ACCELERATED)


def test_only_the_commands_import_inside_functions():
  commands = ("moejax.api", "moejax.api_planning", "moejax.__main__", *map(module, below("moejax.commands")))
  others = [path for path in OURS if module(path) not in commands]
  local = offenders(others, lambda path: imported(path) - imported(path, also_local=False))
  assert not local, "import at the top, or move what is shared down a floor"


def test_no_import_is_for_types_only():
  def for_types(path: pathlib.Path) -> set[str]:
    names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return names & {"TYPE_CHECKING"}

  assert not offenders(OURS, for_types), "it hides a cycle; move what is shared down a floor"


def test_no_file_imports_itself_through_others():
  graph = {name: {other for other in imported(path) if other in BY_MODULE} for name, path in BY_MODULE.items()}
  cycle: list[str] = []
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    cycle = error.args[1]
  assert not cycle, f"import cycle: {' <- '.join(cycle)}"


def test_nothing_is_there_for_tests_alone():
  """Functions, classes and constants that a docs page names are for users' own code, as all of interop is."""
  words = [word for path in OURS for word in re.findall(r"\w+", path.read_text())]
  words += [word for path in (ROOT / "docs").rglob("*.md") for word in re.findall(r"\w+", path.read_text())]
  used = collections.Counter(words)

  def unused(path: pathlib.Path) -> set[str]:
    defined = set()
    for node in tree(path).body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list:
        defined.add(node.name)
      elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in defined if used[name] < 2 and not name.startswith("__")}

  found = offenders(
    [path for path in below("moejax") if path not in below("moejax.interop", "moejax.experiments")], unused
  )
  assert not found, "delete it, or move it into the tests"


def test_the_page_on_the_architecture_names_what_is_there_from_the_top_down():
  page = (ROOT / "docs" / "architecture.md").read_text()
  rows = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
  paths = [path.strip("`") for row in rows for path in row.split(", ")]
  assert all((ROOT / path).exists() or (ROOT / "moejax" / path).exists() for path in paths)
  packages = {name.split(".")[1] for name, path in BY_MODULE.items() if name != "moejax" and path.stem == "__init__"}
  assert not {name for name in packages if not any(path.strip("/").endswith(name) for path in paths)}
  floors = [
    floor(path.strip("/").replace("/", ".").removesuffix(".py")) for path in paths if path.startswith("moejax/")
  ]
  assert floors == sorted(floors, key=lambda number: -(number or 0))
  files = re.findall(r"`(\w+(?:/\w+)*\.py)`", page)
  assert all((ROOT / name).exists() or (ROOT / "moejax" / name).exists() for name in files)
  dotted = re.findall(r"`(moejax(?:\.\w+)+)`", page)
  stems = {name for name in dotted if name not in BY_MODULE and name.rpartition(".")[0] not in BY_MODULE}
  assert not stems, "neither a module nor a name in one"


def test_no_file_is_longer_than_500_lines():
  def beyond(path: pathlib.Path) -> str:
    lines = len(path.read_text().splitlines())
    return f"{lines} lines" if lines > MAX_FILE_LINES else ""

  assert not offenders(SOURCES, beyond), "it holds more than one noun; split it"


def test_no_function_is_longer_than_80_lines():
  def beyond(path: pathlib.Path) -> dict[str, int]:
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f.name: size for f in functions if (size := (f.end_lineno or 0) - f.lineno + 1) > MAX_FUNCTION_LINES}

  assert not offenders(SOURCES, beyond), "name its parts and call them"


def test_a_file_is_named_by_its_content():
  wrong = [path.name for path in SOURCES if path.stem.removeprefix("test_") in SAYS_NOTHING]
  wrong += [path.name for path in SOURCES if path.stem.endswith(("_v2", "_new", "_old", "_legacy"))]
  assert not wrong


def test_the_configuration_stays_small():
  classes = [node for path in below("moejax.config") for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
  fields = [item for node in classes for item in node.body if isinstance(item, ast.AnnAssign)]
  assert len(fields) <= MAX_CONFIG_FIELDS, f"{len(fields)} fields: delete one, or argue for a new number"


def imported_by(path: pathlib.Path, functions: list[str]) -> frozenset[str]:
  """What functions of a file import when they are called, and those that they name of the same file."""
  defined = {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}
  seen: set[str] = set()
  waiting = [name for name in functions if name in defined]
  while waiting:
    name = waiting.pop()
    seen.add(name)
    named = {node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)}
    waiting += [other for other in named & {*defined} if other not in seen]
  return frozenset().union(*(names_imported(path, ast.walk(defined[name])) for name in seen))


def imported_for_training() -> dict[str, int]:
  """Lines of every file that `moejax train` imports for an experiment without benchmarks."""
  begin = imported_by(BY_MODULE["moejax.api"], ["train"]) - set(BEHIND_A_COMMAND)
  names = {"moejax.__main__", "moejax.cli", "moejax.commands.train", *begin}
  names |= {found for name in names for found in reached(name, also_local=False)}
  return {name: len(BY_MODULE[name].read_text().splitlines()) for name in names if name in BY_MODULE}


def test_training_imports_no_more_than_it_needs():
  lines = imported_for_training()
  assert {"moejax.training.loop", "moejax.models.transformer", "moejax.evaluation.held_out"} <= {*lines}
  elsewhere = ("moejax.planning", "moejax.comparison", "moejax.inference", "moejax.interop", "moejax.describe")
  assert not [name for name in lines if name.startswith(elsewhere)]
  without_input = {n: size for n, size in lines.items() if not n.startswith(("moejax.data", "moejax.experiments"))}
  for found, (files, most) in ((lines, MAX_OF_TRAINING), (without_input, MAX_OF_TRAINING_WITHOUT_INPUT)):
    size = sum(found.values())
    assert len(found) <= files and size <= most, f"{len(found)} files, {size} lines: move what training can spare"


def test_no_file_names_a_folder_of_somebodys_machine():
  private = re.compile(r"(?<![\w.~}\-])/(" + "|".join(("work", "root", "home")) + ")/")

  def lines(path: pathlib.Path) -> list[str]:
    numbered = enumerate(path.read_text(errors="replace").splitlines(), 1)
    return [f"line {i}: {line.strip()[:100]}" for i, line in numbered if private.search(line)]

  assert not offenders(TEXTS, lines)


def test_every_smoke_test_is_there():
  """Reads conftest.py, whose import would be a second one."""
  assigned = [node for node in tree(ROOT / "tests" / "conftest.py").body if isinstance(node, ast.Assign)]
  (names,) = [ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "SMOKE"]
  for name in names:
    file, _, test = name.partition("[")[0].partition("::")
    path = ROOT / "tests" / file
    assert path.exists() and (not test or f"def {test}" in path.read_text()), name


def test_no_two_test_files_have_the_same_name():
  """pytest imports them by their names, and cannot collect the second."""
  names = [path.name for path in SOURCES if path.name.startswith("test_")]
  assert not {name for name in names if names.count(name) > 1}
