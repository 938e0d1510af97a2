"""How long an asynchronous save stalls training, beyond the copy of the state from the devices to the host.

    python tests/benchmarks/checkpoint.py                                   # the quickstart's smallest model
    python tests/benchmarks/checkpoint.py quick_small --model.d-model 512   # another experiment and its fields

Steps are timed one by one on one batch, each until its loss is known. A save begins after a step, as in training, with
its checksums; the step after it is timed from the end of the step before. The stall is that time minus the median of
steps without a save, and the part that the copy alone takes is measured by copying the state. While a save is written,
steps may be slower too, which is shown apart. All figures are medians.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from moejax.config import Checkpoints, Experiment
from moejax.lookup import find_experiment
from moejax.overrides import override
from moejax.partitioning import make_partitioner
from moejax.training.checkpoint import Checkpointer
from moejax.training.state import State, make_train_spec
from moejax.training.step import BATCH_TYPES, make_train_step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("experiment", nargs="?", default="quick_small")
  parser.add_argument("--saves", type=int, default=7, help="number of saves (default: 7)")
  known, overrides = parser.parse_known_args()
  times = measure(override(find_experiment(known.experiment), overrides), known.saves)
  step_s, copy_s = statistics.median(times["step"]), statistics.median(times["copy"])
  stall_s = statistics.median(times["after_save"]) - step_s
  print(f"step without a save          {step_s * 1e3:10.1f} ms   ({len(times['step'])} steps)")
  print(f"step while a save is written {statistics.median(times['while_writing']) * 1e3:10.1f} ms")
  print(f"copy to the host             {copy_s * 1e3:10.1f} ms   ({times['bytes'][0] / 1e6:,.0f} MB)")
  print(f"stall of a save              {stall_s * 1e3:10.1f} ms   ({known.saves} saves)")
  print(f"stall beyond the copy        {(stall_s - copy_s) / step_s:10.2f} steps (the aim is less than 1)")


def measure(experiment: Experiment, saves: int) -> dict[str, list[float]]:
  """Seconds by what was timed."""
  partitioner = make_partitioner(experiment.mesh.resolve(jax.device_count()), experiment.rules)
  spec = make_train_spec(experiment, partitioner)
  step, state = make_train_step(spec), spec.init_state(0)
  batch = jax.device_put(random_batch(experiment), partitioner.batch)
  times: dict[str, list[float]] = {name: [] for name in ("step", "after_save", "while_writing", "copy", "bytes")}

  def timed_step(state: State, begin: float) -> tuple[State, float]:
    state, metrics = step(state, batch, np.float32(1e-3))
    float(metrics["loss"])
    return state, time.perf_counter() - begin

  for _ in range(3):
    state, _ = timed_step(state, 0.0)
  with tempfile.TemporaryDirectory() as folder:
    checkpointer = Checkpointer(pathlib.Path(folder) / "checkpoints", Checkpoints(every=1, keep_last=1))
    for number in range(saves + 1):  # the first one compiles the checksums, and is not counted
      measured: dict[str, list[float]] = {name: [] for name in times}
      for _ in range(5):
        state, seconds = timed_step(state, time.perf_counter())
        measured["step"].append(seconds)
      begin = time.perf_counter()
      copied = jax.device_get(jax.tree.map(lambda leaf: leaf + 0, state))  # a copy that JAX has not cached
      measured["copy"].append(time.perf_counter() - begin)
      measured["bytes"].append(sum(leaf.nbytes for leaf in jax.tree.leaves(copied)))
      begin = time.perf_counter()
      checkpointer.save(state, number + 1, {"data": {}})
      state, seconds = timed_step(state, begin)
      measured["after_save"].append(seconds)
      state, seconds = timed_step(state, time.perf_counter())
      measured["while_writing"].append(seconds)
      checkpointer.finished()
      if number:
        times = {name: times[name] + measured[name] for name in times}
    checkpointer.close()
  return times


def random_batch(experiment: Experiment) -> dict[str, Any]:
  """Tokens by chance, one document in each row."""
  shape = (experiment.training.batch_size, experiment.data.sequence_length)
  tokens = np.random.default_rng(0).integers(0, 256, shape)
  batch = {
    "tokens": tokens, "targets": tokens, "segments": np.ones(shape), "weights": np.ones(shape),
    "positions": np.broadcast_to(np.arange(shape[1]), shape),
  }  # fmt: skip
  return {name: np.asarray(rows, BATCH_TYPES[name]) for name, rows in batch.items()}


if __name__ == "__main__":
  main()
