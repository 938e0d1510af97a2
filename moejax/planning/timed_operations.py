"""Times single operations on a device of this machine, and collectives between its devices, beside what the planner
predicts for them.

Each operation is compiled with the options of a train step, and priced as the operations of one are.

B batch  T query position  N query heads  H head dim  R routed rows  E experts  D embed  F hidden
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config.chips import CHIPS, Chip, chip_of
from moejax.errors import UserError
from moejax.kernels.attention import attention_for
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.planning.calibrated_chip import Calibration, with_calibration
from moejax.planning.calibration import LINK, TimedOperation
from moejax.planning.collectives import Network, Place, transfer
from moejax.planning.compile import step_options
from moejax.planning.cost import cost
from moejax.planning.devices import present_torus
from moejax.planning.program import DataDependentLoopError, parse
from moejax.progress import SILENT, Progress

LONGEST_PRODUCT_S = 0.02
"""Predicted seconds of the largest product."""

COPIES_S = (0.00025, 0.001, 0.004)
"""Predicted seconds of copies."""

COLLECTIVE_S = 0.004
"""Predicted seconds of a collective."""

ROUNDS, ROUND_S = 5, 0.1
"""The median of so many rounds counts, each of at least so many seconds."""

FULL = Calibration(matrix=1.0, kernel=1.0, memory=1.0)


def local_chip() -> Chip:
  """The chip of the first device of this machine.

  Raises:
    UserError: the planner does not know its kind.
  """
  device = jax.devices()[0]
  if device.platform == "cpu":
    return CHIPS["cpu"]
  chip = chip_of(device.device_kind)
  if chip is None:
    raise UserError(
      f"cannot calibrate: device_kind={device.device_kind!r} is not one that plans are made for ({', '.join(CHIPS)}); "
      "add it to CHIPS in moejax/config/chips.py"
    )
  return chip


def time_operations(chip: Chip, progress: Progress = SILENT) -> tuple[tuple[TimedOperation, ...], float]:
  """Products, copies, attention, grouped products and, if there are several devices, collectives between them; and the
  seconds of a step that does nothing."""
  overhead_s = _seconds(jax.jit(lambda x: x + 1), jnp.zeros(()))
  found = []
  for name, function, arguments in _operations(chip):
    progress.stage(f"measuring {name}")
    timed = _timed(name, function, arguments, chip)
    if timed is None:
      progress.note(f"{name} is left out: its program here has a loop whose length depends on the data")
    else:
      found.append(timed)
  if len(jax.local_devices()) > 1:
    progress.stage("measuring collectives")
    found += _timed_collectives(local_network(chip))
  return tuple(found), overhead_s


def local_network(chip: Chip) -> Network:
  """The devices of this host, with the bandwidth of their links according to the data sheet."""
  devices = jax.local_devices()
  if chip.torus:
    coordinates = np.array([device.coords for device in devices])
    coordinates -= coordinates.min(0)
    places = [Place(tuple(at.tolist()), 0) for at in coordinates]
  else:
    places = [Place((number,), 0) for number in range(len(devices))]
  torus = present_torus(chip, devices)
  return Network(with_calibration(chip, FULL), torus, tuple(places), {"data": len(devices)})


def _timed_collectives(network: Network) -> list[TimedOperation]:
  """All-gather, all-reduce and all-to-all over all devices of this host."""
  count = len(network.places)
  mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
  sharded = NamedSharding(mesh, PartitionSpec("data"))
  functions: dict[str, Callable[[jax.Array], jax.Array]] = {
    "all-gather": lambda x: jax.lax.all_gather(x, "data", tiled=True),
    "all-reduce": lambda x: jax.lax.psum(x, "data"),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
  }
  found = []
  for kind, function in functions.items():
    seconds, _ = transfer(network, kind, range(count), 2**20)
    size = round(2**20 * COLLECTIVE_S / seconds / 4 / count**2) * 4 * count**2  # whole numbers for each pair of devices
    of_device = size // 4 // (count if kind == "all-gather" else 1)
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")))
    x = jax.device_put(jnp.ones(of_device * count, jnp.float32), sharded)
    name = f"{kind} of {size / 2**20:.0f} MiB over {count}"
    predicted_s, _ = transfer(network, kind, range(count), size)
    found.append(TimedOperation(name=name, kind=LINK, predicted_s=predicted_s, measured_s=_seconds(run, x)))
  return found


def _timed(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], chip: Chip) -> TimedOperation | None:
  """None where the program has a loop whose length depends on the data, which the planner cannot price."""
  arguments = jax.device_put(arguments, jax.devices()[0])
  compiled = jax.jit(function).lower(*arguments).compile(compiler_options=step_options(chip, jax.devices()[0]))
  alone = Network(with_calibration(chip, FULL), (), (Place((0,), 0),), {"data": 1})
  try:
    found = cost(parse(compiled.as_text() or ""), alone)
  except DataDependentLoopError:
    return None
  seconds = {
    "matrix": found.breakdown_s["matrix"] - found.kernel_s,
    "kernel": found.kernel_s,
    "memory": found.breakdown_s["vector"] + found.breakdown_s["memory"],
  }
  return TimedOperation(
    name=name,
    kind=max(seconds, key=lambda kind: seconds[kind]),
    predicted_s=found.step_time_s,
    measured_s=_seconds(compiled, *arguments),
  )


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
  """Seconds of one call, where calls follow one another."""

  def times(calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
      result = run(*arguments)
    jax.block_until_ready(result)
    return time.perf_counter() - begin

  times(2)
  calls = max(1, round(ROUND_S / max(times(1), 1e-7)))
  return statistics.median(times(calls) / calls for _ in range(ROUNDS))


def _operations(chip: Chip) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
  """Name, function and arguments of each operation, of sizes that suit the speed of the chip."""
  dtype = jnp.float32 if chip.platform == "cpu" else jnp.bfloat16
  peak = chip.bfloat16_flops or chip.vector_flops
  widths = [2**n for n in range(7, 16) if 2 * 2 ** (3 * n) < LONGEST_PRODUCT_S * peak]
  keys = iter(jax.random.split(jax.random.key(0), 32))

  def normal(*shape: int) -> jax.Array:
    return jax.random.normal(next(keys), shape, dtype)

  for width in widths[-3:]:
    yield f"product {width}", lambda x, w: x @ w, (normal(width, width), normal(width, width))
  for seconds in COPIES_S:
    elements = round(seconds * chip.hbm_bandwidth / 2 / jnp.dtype(dtype).itemsize)
    yield f"copy of {elements * jnp.dtype(dtype).itemsize / 2**20:.0f} MiB", lambda x: x + 1, (normal(elements),)
  small = chip.platform == "cpu"
  B, N, H = (1, 4, 64) if small else (2, 16, 128)
  for T in (256, 512) if small else (2048, 4096):
    segments_BT = jnp.zeros((B, T), jnp.int32)
    arguments = (*(normal(B, T, N, H) for _ in range(3)), segments_BT)
    attend = attention_for(chip.platform, arguments[0], arguments[2])
    yield f"attention over {T}", _with_gradients(attend, 3), arguments
  R, E, D, F = (512, 4, 256, 256) if small else (16_384, 8, 2048, 2048)
  sizes_E = jnp.full(E, R // E, jnp.int32)
  yield f"grouped product of {E}", _with_gradients(grouped_matmul, 2), (normal(R, D), normal(E, D, F), sizes_E)


def _with_gradients(function: Callable[..., jax.Array], differentiated: int) -> Callable[..., Any]:
  """The function and its gradients of its first arguments, for a gradient of its result that is the result."""

  def both(*arguments: jax.Array) -> Any:
    first, others = arguments[:differentiated], arguments[differentiated:]
    result, backward = jax.vjp(lambda *given: function(*given, *others), *first)
    return result, backward(result)

  return both
