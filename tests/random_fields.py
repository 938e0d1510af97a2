"""Random fields of an experiment as words of a command line: most of them sensible, some at or beyond a limit."""

import dataclasses
import pathlib
import random
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moejax.config.kinds import KIND, OfSeveralKinds, base_of, kinds
from moejax.config.sharding import LOGICAL_AXES, MESH_AXES
from moejax.config.walk import holds_configurations, join
from moejax.field_values import option
from moejax.lookup import find_experiment

COUNTS = ("1", "2", "3", "4", "8")
SMALL = ("0", "1e-3", "0.1", "1", "1e3")
FRACTIONS = ("0", "0.1", "0.5", "1")
DEVICES = ("1", "1", "2", "4")

NUMBERS_AND_TEXT = {
  "model.num-layers": ("1", "2", "4", "6"),
  "model.d-model": ("2", "8", "16", "24", "32"),
  "model.num-heads": ("1", "2", "4", "8"),
  "model.num-kv-heads": ("1", "2", "4"),
  "model.head-dim": ("2", "4", "8", "16"),
  "model.d-ff": ("1", "8", "16", "32"),
  "model.vocab-size": ("264", "272", "259", "512"),
  "model.rope-theta": ("1e-30", "1e-3", "1", "500", "1e9"),
  "model.embedding-scale": ("1e-30", "1", "4"),
  "model.norm-epsilon": ("1e-30", "1e-5", "1"),
  "model.attention-experts": ("None", "1", "2", "4"),
  "model.logit-cap": ("None", "1e-6", "5", "1e6"),
  "model.logit-chunks": ("1", "2", "4"),
  "model.offload-activations": ("", "attention", "products layer_inputs", "layer_inputs"),
  "model.save-activations": ("", "context", "queries keys_values", "attention", "experts_in", "feed_forward_in"),
  "model.depths.every": ("1", "2", "3"),
  "model.depths.share": ("1e-3", "0.25", "0.5", "1"),
  "model.depths.threshold": ("1e-3", "0.5", "0.9"),
  "model.multi-token-depth": ("0", "1", "2", "100"),
  "model.attention.0.window": ("None", "1", "3", "8", "100"),
  "model.attention.0.chunk": ("None", "1", "3", "8", "100"),
  "model.attention.0.rope-theta": ("None", "1e-3", "500"),
  "model.attention.0.score-scale": ("1e-30", "0.5", "1"),
  "model.attention.0.score-log-scale": ("0", "0.1", "1"),
  "model.attention.0.score-log-length": ("1", "3", "8192"),
  "model.attention.0.rope-scaling.factor": ("0.5", "1", "8"),
  "model.attention.0.rope-scaling.low-frequency": ("0.5", "1", "8"),
  "model.attention.0.rope-scaling.high-frequency": ("1", "4"),
  "model.attention.0.rope-scaling.original-length": ("1", "16", "8192"),
  "model.attention.0.rope-scaling.beta-fast": ("1", "32"),
  "model.attention.0.rope-scaling.beta-slow": ("1e-30", "1"),
  "model.attention.0.rope-scaling.attention-factor": ("None", "0.5", "2"),
  "model.attention.0.kv-rank": ("1", "4", "16"),
  "model.attention.0.q-rank": ("None", "1", "8"),
  "model.attention.0.rotary-dim": ("2", "4", "8"),
  "model.attention.0.value-dim": ("None", "1", "4", "16"),
  "model.moe.num-experts": ("1", "2", "4", "8", "16"),
  "model.moe.experts-per-token": ("1", "2", "3", "4", "8"),
  "model.moe.d-ff": ("1", "8", "12", "16"),
  "model.moe.every": ("1", "2", "3"),
  "model.moe.leading-dense": ("0", "1", "2"),
  "model.moe.num-shared-experts": ("0", "1", "2"),
  "model.moe.capacity-factor": ("1e-30", "0.5", "1", "1.25", "2", "100"),
  "model.moe.group-size": ("None", "1", "8", "16", "32", "64", "128"),
  "model.moe.router.scale": ("0.5", "2.5"),
  "model.moe.router.jitter": ("0", "0.1", "0.99"),
  "model.moe.router.gumbel": ("0", "0.5", "1", "100"),
  "model.moe.router.bias-rate": ("0", "0.001", "1"),
  "model.moe.router.skip-below": ("0", "0.5", "1"),
  "model.moe.router.expert-groups": ("1", "2", "4"),
  "model.moe.router.groups-per-token": ("1", "2"),
  "model.moe.router.threshold": ("1e-3", "0.5", "0.9", "1"),
  "model.moe.dispatch.exchange-chunks": ("1", "2", "3"),
  "model.moe.dispatch.receive-factor": ("None", "1e-30", "0.5", "1", "2", "100"),
  "data.train": ("{text}/a.jsonl", "{text}/a.jsonl {text}/b.jsonl", "{text}/b.jsonl", "{text}/one.txt"),
  "data.weights": ("", "1", "1 3", "1e-9 1"),
  "data.validation": ("", "{text}/held_out.txt", "{text}/held_out.txt {text}/one.txt"),
  "data.validation-fraction": ("0", "1e-6", "0.05", "0.5"),
  "data.text-field": ("text", "body", "body.inner"),
  "data.document-length": ("None", "1", "7", "100"),
  "data.tokenizer": ("bytes",),
  "data.sequence-length": ("1", "2", "8", "16", "24", "32", "64"),
  "data.seed": ("0", "-1", "4294967296"),
  "data.prefetch": ("1", "8"),
  "training.batch-size": ("1", "2", "4", "8", "12", "16"),
  "training.steps": ("1", "2", "3"),
  "training.budget.tokens-per-parameter": ("0.01", "20"),
  "training.gradient-accumulation": ("1", "2", "4", "8"),
  "training.seed": ("0", "1", "4294967295"),
  "training.losses.z": SMALL,
  "training.losses.load-balance": SMALL,
  "training.losses.sequence-balance": SMALL,
  "training.losses.global-balance": SMALL,
  "training.losses.router-z": SMALL,
  "training.losses.mutual-information": SMALL,
  "training.losses.attention-mutual-information": SMALL,
  "training.losses.multi-token": SMALL,
  "training.losses.depths": SMALL,
  "training.checkpoints.every": COUNTS,
  "training.checkpoints.every-minutes": ("None", "1e-9", "10"),
  "training.checkpoints.keep-last": COUNTS,
  "training.checkpoints.keep-best": ("0", "1", "2"),
  "training.checkpoints.keep-every": ("None", *COUNTS),
  "training.anomalies.max-skipped": ("0", "3"),
  "training.anomalies.spike": ("None", "0.1", "5"),
  "training.log-every": COUNTS,
  "optimizer.learning-rate": ("1e-30", "1e-4", "0.1"),
  "optimizer.schedule.warmup-fraction": FRACTIONS,
  "optimizer.schedule.final-fraction": FRACTIONS,
  "optimizer.schedule.decay-fraction": FRACTIONS,
  "optimizer.weight-decay": ("0", "0.1", "10"),
  "optimizer.gradient-clip": ("1e-6", "1", "1e6"),
  "optimizer.beta1": ("0", "0.9", "0.99999999999"),
  "optimizer.beta2": ("0", "0.9", "0.999"),
  "optimizer.epsilon": ("1e-30", "1e-8", "1"),
  "optimizer.beta": ("0", "0.95", "0.999"),
  "optimizer.iterations": ("1", "5", "12"),
  "optimizer.update-rms": ("1e-3", "0.2", "1"),
  "optimizer.adam-beta1": ("0", "0.9"),
  "optimizer.adam-beta2": ("0", "0.99"),
  "evaluation.batch-size": ("1", "2", "8", "16"),
  "evaluation.max-tokens": ("None", "1", "100", "10000"),
  "evaluation.every": ("None", "1", "2"),
  "evaluation.tasks": ("",),
  "evaluation.task-limit": ("None", "3"),
  "evaluation.task-data": ("None",),
  "mesh.replica": DEVICES,
  "mesh.data": ("None", *DEVICES),
  "mesh.expert": DEVICES,
  "mesh.context": DEVICES,
  "mesh.model": DEVICES,
  "matchable": ("", "model.moe.d_ff", "model.d_ff model.num_layers"),
  "name": ("mine", "a b", "名前"),
}  # fmt: skip
"""Values of each field that give a tiny experiment, alone or with others."""


def choices(owner: Any, path: str = "") -> dict[str, tuple[str, ...]]:
  """The values of all fields of a configuration and of its kinds that are true or false or one of some words."""
  is_several = isinstance(owner, OfSeveralKinds)
  own = {name: kind for name, kind in kinds(base_of(type(owner))).items() if kind.__module__.startswith("moejax.")}
  found = {option(join(path, KIND)): tuple(own)} if is_several else {}
  for kind in own.values() if is_several else [type(owner)]:
    for name, hint in get_type_hints(kind).items():
      value = getattr(owner, name, None)
      if dataclasses.is_dataclass(value):
        found |= choices(value, join(path, name))
      elif holds_configurations(value):
        for i, part in enumerate(value):
          found |= choices(part, join(path, f"{name}.{i}"))
      elif hint is bool or get_origin(hint) is Literal:
        found[option(join(path, name))] = ("True", "False") if hint is bool else get_args(hint)
  return found


FILE = pathlib.Path(__file__).with_name("conftest.py")
"""Where the experiments are whose fields are drawn."""
DENSE, SPARSE = (find_experiment(f"{FILE}:{name}") for name in ("dense", "sparse"))

SENSIBLE = choices(SPARSE) | {f"--{name}": values for name, values in NUMBERS_AND_TEXT.items()}
"""The values of each option."""

EDGES = (
  "", "0", "-1", "1", "1.5", "7", "nan", "inf", "-inf", "1e-45", "1e-400", "1e308", "1e400", "1e5", "99999",
  "2147483648", "9223372036854775808", "None", "none", "True", "0x10", "1_0", "text", "../x", "a b", "-", "--", "\x00",
  "\n", "é", "{}", "%s", "seqio:x", "tfds:x", "/", "." * 300,
)  # fmt: skip
"""Words that few fields accept."""


def draw_fields(chance: random.Random, sparse: bool, text: pathlib.Path) -> list[list[str]]:
  """Options of some random fields, each with its values."""
  names = [name for name in SENSIBLE if sparse or not name.startswith("--model.moe.")]
  weights = [3 if name.startswith(("--model.", "--mesh.")) else 1 for name in names]
  chosen = dict.fromkeys(chance.choices(names, weights, k=chance.choice((1, 2, 3, 5, 8, 12))))
  fields = [[name, *_values(chance, name, text)] for name in chosen]
  return [*fields, _rule(chance)] if chance.random() < 0.2 else fields


def _values(chance: random.Random, name: str, text: pathlib.Path) -> list[str]:
  if chance.random() < 0.04:
    return [chance.choice(EDGES) for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 2)))]
  return chance.choice(SENSIBLE[name]).format(text=text).split()


def _rule(chance: random.Random) -> list[str]:
  return [f"--rules.{chance.choice(LOGICAL_AXES)}", *chance.sample(MESH_AXES, chance.choice((0, 1, 1, 2)))]
