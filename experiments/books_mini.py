"""The suites books_mini, books_mini_cpu and books_cpu: dense versus MoE on books, with a BPE tokenizer of their own.

The text is read from token shards in the folder `books` of the current folder. To make them from books in .jsonl.gz
files with one book per line:

    moejax tokenizer train --source "train/*.jsonl.gz" --vocab-size 16384 --out books/books16k.json
    moejax data pack --source "train/*.jsonl.gz" --tokenizer books/books16k.json --out books/train
    moejax data pack --source "validation/*.jsonl.gz" --tokenizer books/books16k.json --out books/validation

books_cpu has a smaller vocabulary, so that the layers are not small compared with the embedding: for it, use
`--vocab-size 4096` and books4k.json. `--data.train`, `--data.validation` and `--data.tokenizer` set other paths.
"""

from dataclasses import replace

from moejax.config import (
  AdamW,
  Checkpoints,
  Data,
  Evaluation,
  Experiment,
  GroupedDispatch,
  LearningRateSweep,
  Losses,
  Model,
  MoE,
  Pair,
  Suite,
  TopKRouter,
  Training,
  Upcycled,
  WarmupStableDecay,
)


def books_mini() -> Suite:
  """Dense versus 8 and 16 experts on books: about 100M parameters per token, for one GPU."""
  dense = books_mini_dense()
  return Suite(name="books_mini", pairs=(Pair(dense=dense, candidates=(_sparse(dense, 8), _sparse(dense, 16))),))


def books_mini_cpu() -> Suite:
  """The same with 3M parameters per token and 12M tokens: an hour and a half on 2 CPU cores."""
  dense = books_mini_cpu_dense()
  base = replace(dense, model=replace(dense.model, d_ff=256))  # compensates for the time of the sparse layers
  return Suite(name="books_mini_cpu", pairs=(Pair(dense=dense, candidates=(_sparse(base, 16),)),))


def books_cpu() -> Suite:
  """Dense, MoE from random parameters and upcycled, 1.4M parameters per token: an hour and a half on 2 CPU cores.

  Every member has two seeds, and the learning rates are swept. The upcycled candidate starts after half of the budget,
  which counts.
  """
  dense = books_cpu_dense()
  narrow = replace(dense, model=replace(dense.model, d_ff=256))  # compensates for the time of the sparse layers
  moe = _sparse(narrow, 16)
  return Suite(
    name="books_cpu",
    pairs=(
      Pair(
        dense=dense,
        candidates=(moe, _upcycled(dense)),
        seeds=2,
        upcycled=(Upcycled(candidate="books_cpu_upcycled", parent_fraction=0.5),),
      ),
    ),
    learning_rates=LearningRateSweep(),
    shorter_budgets=(0.5,),
  )


def books_cpu_dense() -> Experiment:
  """Dense, 1.4M parameters, 0.5M of them in the embedding, 7M tokens: 12 minutes on 2 CPU cores."""
  small = books_mini_cpu_dense()
  return replace(
    small,
    name="books_cpu_dense",
    model=replace(small.model, vocab_size=4096),
    data=replace(small.data, tokenizer="books/books4k.json"),
    training=replace(small.training, steps=1800),
    optimizer=replace(small.optimizer, schedule=WarmupStableDecay()),
  )


def _upcycled(dense: Experiment) -> Experiment:
  """4 copies of every second dense layer, each in two experts of half the width, of which a token uses two: as many
  parameters per token as the dense model."""
  moe = MoE(
    num_experts=8,
    experts_per_token=2,
    d_ff=dense.model.d_ff // 2,
    every=2,
    dispatch=GroupedDispatch(),
    router=TopKRouter(renormalize=True, scale=2.0),
  )
  return replace(
    dense,
    name=dense.name.replace("dense", "upcycled"),
    model=replace(dense.model, moe=moe),
    training=replace(dense.training, steps=None, losses=Losses(load_balance=0.01)),
  )


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
    optimizer=AdamW(learning_rate=1e-3),
    evaluation=Evaluation(batch_size=64),
  )  # fmt: skip


def books_mini_cpu_dense() -> Experiment:
  """Dense, 3M parameters, 12M tokens, a fifth of the compute-optimal length: 40 minutes on 2 CPU cores."""
  dense = books_mini_dense()
  return replace(
    dense,
    name="books_mini_cpu_dense",
    model=replace(
      dense.model, num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=384, layers="unrolled"
    ),
    data=replace(dense.data, sequence_length=256),
    training=replace(dense.training, batch_size=16, steps=3000),
    optimizer=replace(dense.optimizer, learning_rate=3e-3),
    evaluation=replace(dense.evaluation, batch_size=16),
  )


def _sparse(dense: Experiment, num_experts: int) -> Experiment:
  """Experts of half the width, two per token, in every second layer: as many parameters per token as the dense
  model."""
  moe = MoE(
    num_experts=num_experts, experts_per_token=2, d_ff=dense.model.d_ff // 2, every=2, dispatch=GroupedDispatch()
  )
  return replace(
    dense,
    name=dense.name.replace("dense", f"{num_experts}e"),
    model=replace(dense.model, moe=moe),
    training=replace(dense.training, losses=Losses(load_balance=0.01, router_z=0.001)),
  )
