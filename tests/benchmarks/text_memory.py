"""Peak memory of reading and tokenizing one large text file.

    python tests/benchmarks/text_memory.py --text "books/*.jsonl.gz" --tokenizer bpe.json --megabytes 50

Each row is a fresh process that builds the corpus of one .txt file of that size, made of the given text: with the file
as one document, and cut into documents of 10,000 characters.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile

from moejax.config import Data
from moejax.data.corpus import build_corpus
from moejax.data.sources import documents
from moejax.data.text import open_text

LENGTHS = (None, 10_000)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--text", default="python-standard-library", help="as data.train")
  parser.add_argument("--tokenizer", default="bytes", help="as data.tokenizer")
  parser.add_argument("--megabytes", type=int, default=50, help="size of the file")
  parser.add_argument("--corpus", help="only build this corpus (JSON of fields of data) and print the peak")
  chosen = parser.parse_args()
  if chosen.corpus:
    print(json.dumps(peaks(json.loads(chosen.corpus))))
    return
  with tempfile.TemporaryDirectory() as folder:
    path, held_out = pathlib.Path(folder, "large.txt"), pathlib.Path(folder, "held_out.txt")
    size = write(path, chosen.text, chosen.megabytes * 10**6)
    held_out.write_text("held out\n")
    for length in LENGTHS:
      fields = {"train": [str(path)], "validation": [str(held_out)], "document_length": length}
      fields |= {"tokenizer": chosen.tokenizer, "cache": str(pathlib.Path(folder, f"cache-{length}"))}
      answer = subprocess.run([sys.executable, __file__, "--corpus", json.dumps(fields)], check=True, stdout=-1)
      before, after = json.loads(answer.stdout)
      print(
        f"document_length={length}: {size / 1e6:.0f} MB of text, peak {after / 1e6:,.0f} MB "
        f"({(after - before) / size:.1f} bytes a byte of text above the {before / 1e6:.0f} MB of the imports)"
      )


def write(path: pathlib.Path, source: str, size: int) -> int:
  """A file of at least `size` bytes, repeating the source where it has fewer; returns its size."""
  with path.open("w") as file:
    while file.tell() < size:
      for text in documents(source):
        file.write(text + "\n\n")
        if file.tell() >= size:
          break
  return path.stat().st_size


def peaks(fields: dict) -> tuple[int, int]:
  """Peak resident bytes of this process before and after it builds the corpus."""
  cache = pathlib.Path(fields.pop("cache"))
  data = Data(
    **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}, sequence_length=128
  )
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  build_corpus(open_text(data), cache)
  return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
  main()
