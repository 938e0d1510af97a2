"""Compiles the training step for a topology, without the hardware, and caches the result."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import time
import zlib
from importlib import metadata

import jax

from moejax.config.chips import Chip
from moejax.config.experiment import Experiment
from moejax.config.fields import with_fields
from moejax.config.model import Model
from moejax.data.integrity import content_checksum
from moejax.errors import UserError
from moejax.files import read_json, write_json, write_whole
from moejax.partitioning import make_partitioner
from moejax.planning import gpu_target
from moejax.planning.collectives import Network
from moejax.planning.devices import describe_devices, network
from moejax.planning.meshes import on_topology
from moejax.planning.topology import Topology
from moejax.progress import SILENT, Progress
from moejax.training.compiler import Options, compiler_options
from moejax.training.memory import argument_bytes, program_memory
from moejax.training.state import make_train_spec
from moejax.training.step import abstract_inputs, make_train_step

VERSIONED = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt")

# Nothing can be autotuned without a GPU, so Triton's products would keep its smallest tiles. cuBLAS is used instead.
WITHOUT_GPU: Options = {"xla_gpu_enable_triton_gemm": False}

# libtpu then returns a program that is too large for the memory instead of an error.
BEYOND_MEMORY: Options = {"xla_tpu_no_crash_on_oom": True}

# The GPU compiler writes its own estimate of each operation's time into the program.
ESTIMATES: Options = {"xla_gpu_collect_cost_model_stats": True}

FORMAT = 4
"""Of what is cached; another number leaves what was cached before."""

DURATIONS = "durations.json"
"""The file in the cache with the seconds of compilations."""

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class RefusedError(UserError):
  """The compiler rejects a program, but not for lack of memory. It may accept the program of another mesh."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled train step."""

  experiment: Experiment
  """The experiment with a complete mesh."""
  network: Network
  text: str
  """The program as text. Empty if the compiler rejected it because it does not fit in memory."""
  memory: dict[str, int]
  """Bytes on a device: arguments, temporaries, output, code; `total`, by the compiler's own count, what of them is
  there at once; `host`, if there are any, bytes of the host. Only the total where the compiler found no room."""
  compile_time_s: float
  """Seconds of the compilation, also if the result comes from the cache."""
  cached: bool
  beyond_memory: bool = False
  """Whether the program was compiled although it does not fit in memory."""
  moments_bytes: int = 0
  """Bytes of the moments that the experiment keeps on the host and that the text has on the device. They are among the
  bytes of the host in `memory`, and their copies are not in the text."""


def compile_step(
  experiment: Experiment, topology: Topology, progress: Progress = SILENT, beyond_memory: bool = False
) -> Compiled:
  """Compiles the training step of an experiment for a topology, or reads it from the cache. Uses only shapes, no data.

  Args:
    experiment: its step is compiled.
    topology: the devices.
    progress: is told what takes time.
    beyond_memory: whether to compile the program even if it does not fit. Compilers for GPU and CPU always do.

  Raises:
    UserError: If the mesh does not fit the topology or the tensors, the chip lacks 8-bit products of the model, or
      libtpu is not installed.
    RefusedError: If the compiler rejects the program.
  """
  progress.stage(f"describing {topology.name}")
  experiment = on_topology(experiment, topology)
  partitioner = make_partitioner(experiment.mesh, experiment.rules, describe_devices(topology))
  joined = network(topology, partitioner.mesh, experiment.mesh)
  progress.stage(f"lowering {experiment.name}")
  # XLA describes the arguments of programs for GPU in device memory, wherever they are.
  offloads = experiment.optimizer.offload_moments and topology.chip.platform == "gpu"
  spec = make_train_spec(
    with_fields(experiment, {"optimizer.offload_moments": False}) if offloads else experiment, partitioner
  )
  inputs = abstract_inputs(spec)
  lowered = make_train_step(spec).lower(*inputs)
  options = step_options(topology.chip, partitioner.device, experiment.model, argument_bytes(inputs))
  order = [device.id for device in partitioner.mesh.devices.flat]
  shown = lowered.as_text()

  def compiled_with(options: Options) -> Compiled:
    directory = _cache(shown, topology, order, options)
    found = _read(directory)
    if found is not None:
      return Compiled(experiment, joined, *found, cached=True)
    before_s = _durations(directory.parent).get(f"{experiment.name} {topology.name} {topology.slices}")
    first = ", which can take several minutes" if topology.chip.platform == "tpu" else ""
    expected = first if before_s is None else f", which took {before_s:.0f} s the last time"
    devices = f"{topology.devices:,} device{'s' if topology.devices > 1 else ''}"
    progress.stage(f"compiling {experiment.name} for {devices}{expected}")
    text, memory, seconds = _compiled(lowered, options)
    _write(directory, text, memory, seconds)
    _write_duration(directory.parent, f"{experiment.name} {topology.name} {topology.slices}", seconds)
    return Compiled(experiment, joined, text, memory, seconds, cached=False)

  found = compiled_with(options)
  if beyond_memory and not found.text:
    found = dataclasses.replace(compiled_with(options | BEYOND_MEMORY), beyond_memory=True)
  return with_moments_on_host(found, argument_bytes(spec.abstract_state.optimizer)) if offloads else found


def with_moments_on_host(compiled: Compiled, moments: int) -> Compiled:
  """A program that has so many bytes of moments on the device, with the memory of a step that keeps them on the host:
  the device has those of one array of a parameter at a time, which its peak does not count."""
  before = compiled.memory
  less = {name: before[name] - moments for name in ("arguments", "output", "total") if name in before}
  memory = before | less | {"host": before.get("host", 0) + moments}
  return dataclasses.replace(compiled, memory=memory, moments_bytes=moments)


def _compiled(lowered: jax.stages.Lowered, options: Options) -> tuple[str, dict[str, int], float]:
  """The text, the memory and the seconds of a compilation. The text is empty if the program does not fit.

  Raises:
    RefusedError: If the compiler rejects the program for another reason.
  """
  begin = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    text, memory = "", _shortage(str(error))
  else:
    text, memory = compiled.as_text() or "", _memory(compiled)
  return text, memory, time.perf_counter() - begin


def step_options(chip: Chip, device: jax.Device, model: Model | None = None, arguments: int = 0) -> Options:
  """The options with which a program is compiled that is to be priced."""
  options = compiler_options(device, model, arguments)
  if chip.platform == "gpu":
    options = options | WITHOUT_GPU | (ESTIMATES if gpu_target.is_priced(chip.name) else {})
  return options


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  statistics = compiled.memory_analysis()
  assert statistics is not None
  memory = {
    "arguments": statistics.argument_size_in_bytes,
    "temporaries": statistics.temp_size_in_bytes,
    "output": statistics.output_size_in_bytes,
    "code": statistics.generated_code_size_in_bytes,
  }
  on_host = statistics.host_argument_size_in_bytes + statistics.host_temp_size_in_bytes
  on_host += statistics.host_output_size_in_bytes - statistics.host_alias_size_in_bytes
  return memory | ({"host": on_host} if on_host else {}) | {"total": program_memory(compiled).total}


def _shortage(message: str) -> dict[str, int]:
  """The bytes that a program needs, if the compiler rejected it for lack of memory.

  Raises:
    RefusedError: If it was rejected for another reason.
  """
  needed = re.search(r"Used ([\d.]+)([KMGT]?) of|HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
  space = re.search(r"memory space (\w+)", message)  # that of a core may be too small for one operation
  if "RESOURCE_EXHAUSTED" not in message or needed is None or (space and space[1] != "hbm"):
    reason = " ".join(message.split("\n", 1)[0].split())
    version = f"libtpu {_version('libtpu')} and jax {_version('jax')}"
    raise RefusedError(f"the compiler rejected the program: {reason} ({version}); try other versions or another mesh")
  number, unit = needed[1] or needed[3], needed[2] or needed[4] or ""
  return {"total": int(float(number) * UNITS[unit])}


def _cache(lowered: str, topology: Topology, order: list[int], options: Options) -> pathlib.Path:
  """The cache folder of this program for these devices, in this order, compiled with these versions."""
  root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  versions = {name: _version(name) for name in VERSIONED}
  more = os.environ.get("LIBTPU_INIT_ARGS", "")
  target = gpu_target.describe(topology.chip.name) if topology.chip.platform == "gpu" else ""
  key = json.dumps([FORMAT, lowered, topology.name, topology.slices, order, options, more, target, versions])
  return root / "moejax" / "plans" / hashlib.sha256(key.encode()).hexdigest()[:24]


def _version(name: str) -> str | None:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None


def _read(directory: pathlib.Path) -> tuple[str, dict[str, int], float] | None:
  try:
    checksum, facts = read_json(directory / "facts.json")
    program = (directory / "program.txt.gz").read_bytes()
    if checksum != content_checksum(facts) or not program:
      return None
    return gzip.decompress(program).decode(), facts["memory"], facts["seconds"]
  except (OSError, ValueError, TypeError, EOFError, zlib.error):  # missing or damaged: it is compiled again
    return None


def _write(directory: pathlib.Path, text: str, memory: dict[str, int], seconds: float) -> None:
  facts = {"memory": memory, "seconds": seconds}
  with contextlib.suppress(OSError):  # the cache is optional
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "program.txt.gz", gzip.compress(text.encode(), 6))
    write_json(directory / "facts.json", [content_checksum(facts), facts])  # last: `_read` opens it first


def _durations(plans: pathlib.Path) -> dict[str, float]:
  """Seconds of the latest compilation, by experiment, topology and slices. Empty if there are none."""
  try:
    found = read_json(plans / DURATIONS)
    return {name: seconds for name, seconds in found.items() if type(seconds) in (int, float) and 0 <= seconds < 1e6}
  except (OSError, ValueError, AttributeError):
    return {}


def _write_duration(plans: pathlib.Path, name: str, seconds: float) -> None:
  with contextlib.suppress(OSError):  # it is only shown
    write_json(plans / DURATIONS, _durations(plans) | {name: seconds})
