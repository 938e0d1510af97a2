"""How fast packed shards are read, beside how fast the quickstart trains, and what starting with many documents costs.

    python tests/benchmarks/input.py                     # both parts; 2 minutes
    python tests/benchmarks/input.py --documents 10000   # start-up with fewer documents

Reading: the standard library as bytes, packed by `moejax data pack` into one folder (and that folder three times, mixed
by weight), in batches of the quickstart's shape, by one process on one core. Training: the quickstart's smallest and
fastest model, on all cores, as `moejax train quick_small` reports it.

Start-up: a packed folder with 10 million documents of 8 tokens is opened and its first batch read, and what the process
reads of it until then is counted.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from moejax.config import Data
from moejax.data.mixture import Mixture
from moejax.data.pack import pack
from moejax.data.packing import Concatenated
from moejax.data.pipeline import train_batches
from moejax.data.shards import ShardWriter, TokenBlock, open_packed
from moejax.data.tokenizers import ByteTokenizer

LENGTH, BATCH = 128, 16
"""Of the quickstart."""
TOKENIZER = ByteTokenizer()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--documents", type=int, default=10_000_000, help="of the start-up")
  parser.add_argument("--start", type=pathlib.Path, help="only start with this packed folder, and print what it took")
  chosen = parser.parse_args()
  if chosen.start:
    print(json.dumps(start(chosen.start)))
    return
  with tempfile.TemporaryDirectory() as folder:
    compare(pathlib.Path(folder))
    start_up(pathlib.Path(folder), chosen.documents)


def compare(folder: pathlib.Path) -> None:
  """Prints both speeds and their ratio."""
  trained = training_speed(folder / "run")
  print(f"quick_small trains at {trained:,.0f} tokens/s on {os.cpu_count()} cores")
  pack(["python-standard-library"], "bytes", folder / "packed")
  whole = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(whole)})
  for name, streams, weights in (("packed shards", 1, ()), ("three mixed by weight", 3, (0.5, 0.3, 0.2))):
    read = statistics.median(reading_speed(folder / "packed", streams, weights) for _ in range(5))
    print(f"{name}: {read:,.0f} tokens/s on one core, {read / trained:.1f} times as fast")
  os.sched_setaffinity(0, whole)


def training_speed(directory: pathlib.Path) -> float:
  """Median tokens/s of the steps that `moejax train quick_small` logs behind its first hundred."""
  command = [sys.executable, "-m", "moejax", "train", "quick_small", "--workdir", str(directory)]
  subprocess.run([*command, "--training.steps", "500"], check=True, capture_output=True)
  records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  return statistics.median(record["tokens_per_s"] for record in records if record["step"] > 100 and "loss" in record)


def reading_speed(folder: pathlib.Path, streams: int, weights: tuple[float, ...], batches: int = 2000) -> float:
  """Tokens/s of the batches behind the first."""
  stream = open_packed(folder, TOKENIZER.identity, TOKENIZER.padding)
  mixture = Mixture((Concatenated(stream, LENGTH),) * streams, weights)
  iterator = train_batches(mixture, Data(sequence_length=LENGTH), BATCH)
  next(iterator)
  begin = time.perf_counter()
  for _ in range(batches):
    next(iterator)
  elapsed_s = time.perf_counter() - begin
  iterator.close()
  return batches * BATCH * LENGTH / elapsed_s


def start_up(folder: pathlib.Path, documents: int) -> None:
  """Prints what a fresh process needs for its first batch of a folder with few documents and of one with many."""
  for count in (1000, documents):
    write_documents(folder / str(count), count)
    size = sum(path.stat().st_size for path in (folder / str(count)).iterdir())
    answer = subprocess.run([sys.executable, __file__, "--start", str(folder / str(count))], check=True, stdout=-1)
    facts = json.loads(answer.stdout)
    print(
      f"{count:,} documents ({size / 1e6:,.1f} MB): first batch after {1e3 * facts['first_batch_s']:.1f} ms, "
      f"{facts['read_bytes'] / 1e3:,.1f} kB read, {facts['mapped_bytes'] / 1e3:,.1f} kB more in memory"
    )


def write_documents(folder: pathlib.Path, documents: int) -> None:
  writer = ShardWriter(folder, {"tokenizer": TOKENIZER.identity}, TOKENIZER.vocab_size)
  random = np.random.default_rng(0)
  while documents:
    count = min(documents, 1_000_000)
    tokens = random.integers(0, 256, (count, 8))
    tokens[:, 0] = TOKENIZER.begin
    writer.add(TokenBlock(tokens.reshape(-1), np.full(count, 8), None, None))
    documents -= count
  writer.finish({"text_bytes": None})


def start(folder: pathlib.Path) -> dict[str, float]:
  """From opening the folder to its first batch: seconds, bytes that were read, and how much this process grew."""
  begin, before, resident = time.perf_counter(), _bytes_read(), _resident_bytes()
  stream = open_packed(folder, TOKENIZER.identity, TOKENIZER.padding)
  data = Data(sequence_length=LENGTH, prefetch=1)
  iterator = train_batches(Mixture((Concatenated(stream, LENGTH),)), data, BATCH if len(stream) > 10**5 else 1)
  next(iterator)
  facts = {
    "first_batch_s": time.perf_counter() - begin,
    "read_bytes": _bytes_read() - before,
    "mapped_bytes": _resident_bytes() - resident,
  }
  iterator.close()
  return facts


def _bytes_read() -> int:
  """Bytes that this process asked the system for so far; what is mapped does not count."""
  return int(pathlib.Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _resident_bytes() -> int:
  """Memory of this process, mapped files included."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  main()
