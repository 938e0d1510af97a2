"""Tiny benchmarks in a folder, as `--data` reads them, and a tiny run of a byte model."""

import dataclasses
import json
from pathlib import Path

from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, MoE, Training

DENSE = Experiment(
  name="byte_llama",
  model=Model(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, vocab_size=264),
  data=Data(sequence_length=64),
  training=Training(batch_size=4, steps=2),
  optimizer=AdamW(learning_rate=1e-2),
  evaluation=Evaluation(batch_size=4),
  mesh=Mesh(data=1),
)
SPARSE = dataclasses.replace(
  DENSE,
  name="byte_moe",
  model=dataclasses.replace(DENSE.model, moe=MoE(num_experts=4, experts_per_token=2, d_ff=16, group_size=32)),
)

CHOICES = {"text": ["a stone", "the sun", "a fish", "salt"], "label": ["A", "B", "C", "D"]}
SPLITS = {
  "arc_easy/test": [
    {"id": str(i), "question": f"What shines at {i} o'clock?", "choices": CHOICES, "answerKey": "ABCD"[i % 4]}
    for i in range(6)
  ],
  "lambada_openai/test": [
    {"text": "She looked at the sea and the sea looked at her"}, {"text": "Every evening he fed the old grey cat"},
    {"text": "A long " + "winding " * 12 + "road leads to the village"},
  ],
  "triviaqa/validation": [
    {"question": f"Which number follows {i}", "answer": {"value": str(i + 1), "aliases": [str(i + 1), f"no {i + 1}"]}}
    for i in range(4)
  ],
  "webqs/train": [{"url": "", "question": "who was first?", "answers": ["Adam", "Eve"]}],
  "webqs/test": [{"url": "", "question": f"who was number {i}?", "answers": ["Cain", "Abel"]} for i in range(2)],
  "wikitext/test": [{"page": " = Stone = \n \n A stone is a hard thing . " * 5}, {"page": " = Sea = \n \n Wet ."}],
  "gsm8k/test": [{"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"}],
  "mmlu/anatomy/dev": [{"question": f"Is it {i}?", "choices": ["y", "n", "m", "x"], "answer": 1} for i in range(6)],
  "mmlu/anatomy/test": [{"question": f"Is it {i}?", "choices": ["y", "n", "m", "x"], "answer": 0} for i in range(3)],
}  # fmt: skip


def write_benchmarks(folder: Path) -> Path:
  """Writes SPLITS; returns the folder."""
  for name, rows in SPLITS.items():
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder
