"""The suite books_mini: a small trial on whole books, dense against MoE, with a BPE of its own.

Its text is token shards in the folder `books` of the current folder, from any books as .jsonl.gz, a book a line:

    moejax tokenizer train --source "train/*.jsonl.gz" --vocab-size 16384 --out books/books16k.json
    moejax data pack --source "train/*.jsonl.gz" --tokenizer books/books16k.json --out books/train
    moejax data pack --source "validation/*.jsonl.gz" --tokenizer books/books16k.json --out books/validation

`--data.train`, `--data.validation` and `--data.tokenizer` name others.
"""

from dataclasses import replace

from moejax.config import (
  Checkpoints,
  Data,
  Evaluation,
  Experiment,
  Losses,
  Model,
  MoE,
  Optimizer,
  Pair,
  Suite,
  Training,
)


def books_mini() -> Suite:
  """Dense against 8 and 16 experts on books: about 100M parameters a token, for one GPU."""
  dense = books_mini_dense()
  return Suite(name="books_mini", pairs=(Pair(dense=dense, candidates=(_sparse(dense, 8), _sparse(dense, 16))),))


def books_mini_dense() -> Experiment:
  """Dense, 98M parameters, on books; for one GPU."""
  return Experiment(
    name="books_mini_dense",
    model=Model(
      num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, head_dim=64, d_ff=2048, vocab_size=16_384, qk_norm=True
    ),
    data=Data(
      train=("books/train",),
      validation=("books/validation",),
      tokenizer="books/books16k.json",
      sequence_length=1024,
    ),
    training=Training(batch_size=64, checkpoints=Checkpoints(every=500)),
    optimizer=Optimizer(learning_rate=1e-3),
    evaluation=Evaluation(batch_size=64),
  )  # fmt: skip


def _sparse(dense: Experiment, num_experts: int) -> Experiment:
  """Experts of half the width, two a token, in every second layer: as many parameters a token as the dense model."""
  moe = MoE(num_experts=num_experts, experts_per_token=2, d_ff=dense.model.d_ff // 2, every=2, dispatch="grouped")
  return replace(
    dense,
    name=f"books_mini_{num_experts}e",
    model=replace(dense.model, moe=moe),
    training=replace(dense.training, losses=Losses(load_balance=0.01, router_z=0.001)),
  )
