"""Every field does something: another value of it gives another program, state, schedule, input, report or file."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import types
import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effect_fixtures import DENSE, GROUPED_DISPATCH, GROUPED_QUERY, LATENT, MORE_BASES, MORE_CHANGES, sparse

from moejax.comparison import pod_match
from moejax.comparison.budget import allot
from moejax.comparison.match import match
from moejax.config import (
  Anomalies,
  Checkpoints,
  Data,
  DenseDispatch,
  DenseRouter,
  Evaluation,
  Experiment,
  ExpertChoiceRouter,
  GroupedQuery,
  Latent,
  Lion,
  LoRA,
  Mesh,
  Muon,
  Pair,
  Router,
  SpIEL,
  Suite,
  ThresholdRouter,
  TopPRouter,
  Training,
)  # fmt: skip
from moejax.config.kinds import OfSeveralKinds, kinds
from moejax.config.parameters import full_sequence_steps
from moejax.config.schedule import Cosine, Linear, WarmupStableDecay
from moejax.data import pipeline
from moejax.data.corpus import build_corpus
from moejax.data.mixture import training_mixture
from moejax.data.text import open_text
from moejax.data.tokenizer_training import train_tokenizer
from moejax.describe import facts, suite_facts
from moejax.evaluation import evaluators
from moejax.partitioning import make_partitioner
from moejax.progress import SILENT
from moejax.training.loop import ESSENTIAL, Run, train
from moejax.training.loss import loss_sums
from moejax.training.optimizers import learning_rate
from moejax.training.state import make_train_spec
from moejax.training.step import abstract_inputs, make_train_step


def changed(config, path: str, value):
  """The configuration with another value of one field, by its dotted name; of a tuple, that of the first."""
  if isinstance(config, tuple):
    return (changed(config[0], path, value), *config[1:])
  name, _, rest = path.partition(".")
  return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


# ---- what the train step of an experiment is

GROUPED = sparse(Mesh(data=1, expert=2), dispatch="grouped")
FOUR = Mesh(data=1, expert=2, model=2)
GROUPS = Router(expert_groups=4, groups_per_token=2)
BASES = {
  "dense": DENSE,
  "bfloat16": replace(DENSE, model=replace(DENSE.model, compute_dtype="bfloat16")),
  "einsum": sparse(),
  "top_p": sparse(router=TopPRouter(threshold=0.5)),
  "expert_choice": sparse(router=ExpertChoiceRouter()),
  "groups": sparse(router=GROUPS, num_experts=16),
  "threshold": sparse(router=ThresholdRouter(), experts_per_token=8),
  "grouped": GROUPED,
  "heads": replace(DENSE, model=replace(DENSE.model, attention_experts=2)),
  "latent": replace(DENSE, model=replace(DENSE.model, num_kv_heads=4, attention=(Latent(kv_rank=8, rotary_dim=4),))),
  "normed": replace(DENSE, model=replace(DENSE.model, qk_norm=True, remat="selected", save_activations=("context",))),
  "shared": sparse(num_shared_experts=1),
  "meshed": replace(sparse(FOUR), model=replace(sparse().model, num_heads=8, num_kv_heads=4)),
  **MORE_BASES,
  **{kind.__name__.lower(): replace(DENSE, optimizer=kind(learning_rate=1e-3)) for kind in (Lion, Muon, SpIEL)},
  "lora": replace(sparse(), optimizer=LoRA(learning_rate=1e-3)),
}
PROGRAM = {
  "dense": {
    "model.num_layers": 4, "model.d_model": 32, "model.num_heads": 8, "model.num_kv_heads": 4, "model.head_dim": 8,
    "model.d_ff": 32, "model.vocab_size": 272, "model.tie_embeddings": False, "model.qk_norm": True,
    "model.attention_bias": True, "model.rope_theta": 500.0, "model.norm_epsilon": 1e-6, "model.norm": "layer",
    "model.norm_places": "after", "model.embedding_scale": 4.0,
    "model.activation": "gelu", "model.attention_experts": 2, "model.logit_cap": 5.0, "model.logit_chunks": 4,
    "model.compute_dtype": "bfloat16", "model.remat": "products", "model.layers": "unrolled",
    "model.attention": (GroupedQuery(), GroupedQuery(window=4)),
    **{f"model.attention[grouped_query].{name}": value for name, value in GROUPED_QUERY.items()},
    "training.batch_size": 16, "training.gradient_accumulation": 2, "training.losses.z": 0.1,
    "training.anomalies.spike": 3.0, "optimizer.offload_moments": True,
    "optimizer.keep_zeros": True, "optimizer.weight_decay": 0.2, "optimizer.gradient_clip": 0.5,
    "optimizer[AdamW].beta1": 0.8,
    "optimizer[AdamW].beta2": 0.8, "optimizer[AdamW].epsilon": 1e-6, "optimizer[AdamW].moment_dtype": "bfloat16",
    "model.precision.attention": "fp8", "model.precision.feed_forward": "int8", "model.precision.logits": "fp8",
    "optimizer": Lion(learning_rate=1e-3),
  },
  "bfloat16": {"model.gradient_dtype": "compute"},
  "einsum": {
    "model.moe": None, "model.moe.num_experts": 16, "model.moe.experts_per_token": 3, "model.moe.d_ff": 16,
    "model.moe.every": 2, "model.moe.bias": True, "model.moe.leading_dense": 1,
    "model.moe.num_shared_experts": 1, "model.moe.dispatch": DenseDispatch(), "model.precision.experts": "fp8",
    "model.moe.capacity_factor": 0.5, "model.moe.group_size": 16, "model.moe.dispatch[einsum].priority": "token",
    "model.moe.router[top_k].scores": "sigmoid", "model.moe.router[top_k].renormalize": False,
    "model.moe.router.scale": 2.0, "model.moe.router[top_k].bias_rate": 0.01, "model.moe.router.jitter": 0.1,
    "model.moe.router[top_k].gumbel": 0.5, "model.moe.router[top_k].skip_below": 0.9,
    "model.moe.router": ExpertChoiceRouter(),
    "training.losses.load_balance": 0.1, "training.losses.sequence_balance": 0.1,
    "training.losses.global_balance": 0.1, "training.losses.router_z": 0.1, "training.losses.mutual_information": 0.1,
  },
  "top_p": {
    "model.moe.router[top_p].threshold": 0.9, "model.moe.router[top_p].renormalize": False,
    "model.moe.router[top_p].scores": "sigmoid", "model.moe.router[top_p].gumbel": 0.5,
  },
  "expert_choice": {"model.moe.router[expert_choice].scores": "sigmoid", "model.moe.router[expert_choice].gumbel": 0.5},
  "threshold": {"model.moe.router[threshold].threshold": 0.9, "model.moe.router[threshold].equal_counts": True},
  "groups": {"model.moe.router[top_k].expert_groups": 8, "model.moe.router[top_k].groups_per_token": 1},
  "grouped": {f"model.moe.dispatch[grouped].{name}": value for name, value in GROUPED_DISPATCH.items()},
  "heads": {"training.losses.attention_mutual_information": 0.1},
  "latent": {f"model.attention[latent].{name}": value for name, value in LATENT.items()},
  "normed": {
    "model.qk_norm_over": "all_heads", "model.save_activations": ("queries",),
    "model.offload_activations": ("context",),
  },
  "shared": {"model.moe.shared_gate": True},
  "meshed": {
    "mesh.data": 2, "mesh.expert": 1, "mesh.context": 2, "mesh.model": 1, "mesh.replica": 2,
    "rules": tuple((name, () if name == "expert_mlp" else axes) for name, axes in DENSE.rules),
  },
  "ahead": {"model.multi_token_depth": 2, "training.losses.multi_token": 0.1},
  **MORE_CHANGES,
}  # fmt: skip


@functools.cache
def spec_of(experiment: Experiment):
  devices = jax.devices()[: experiment.mesh.size]
  return make_train_spec(experiment, make_partitioner(experiment.mesh, experiment.rules, devices))


def inputs(experiment: Experiment) -> str:
  """The shapes and placements of what its program takes: if they differ, so do the programs."""
  return str(abstract_inputs(spec_of(experiment)))


def program(experiment: Experiment) -> str:
  """What is compiled, as JAX traces it: twice as fast as lowering it."""
  spec = spec_of(experiment)
  return ADDRESS.sub("", str(make_train_step(spec).trace(*abstract_inputs(spec)).jaxpr))


ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of Python functions, which a traced program prints and which differ each time."""


def forward(experiment: Experiment) -> str:
  """The forward pass alone."""
  spec = spec_of(experiment)
  state, batch, _ = abstract_inputs(spec)
  traced = jax.make_jaxpr(lambda parameters, batch: loss_sums(spec.model.module(parameters), batch))
  return ADDRESS.sub("", str(traced(state.parameters, batch)))


of_base = functools.cache(lambda what, name: what(BASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "path"), [(base, path) for base in PROGRAM for path in PROGRAM[base]])
def test_another_value_is_another_program(base, path):
  other = changed(BASES[base], re.sub(r"\[\w+\]", "", path), PROGRAM[base][path])
  # What is quick to make comes first: of another forward pass the program is another, too.
  assert any(what(other) != of_base(what, base) for what in (inputs, forward, program))


@pytest.mark.parametrize("base", ["dense", "grouped"])
def test_the_program_of_an_experiment_is_always_the_same(base):
  """What the inequality of programs rests on."""
  for what in (inputs, forward, program):
    assert what(replace(BASES[base], name="other")) == of_base(what, base)


UNIFORM = DenseRouter()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("router", "fields"),
  [
    (Router(), {}),
    (TopPRouter(threshold=0.5), {"experts_per_token": 4}),
    (ExpertChoiceRouter(), {"capacity_factor": 1.5}),
    (UNIFORM, {"experts_per_token": 8, "group_size": None}),
  ],
  ids=lambda value: value.kind if isinstance(value, Router) else "",
)
def test_a_receive_factor_decides_how_many_rows_a_device_has_with_every_router(router, fields):
  base = sparse(Mesh(data=1, expert=4), router=router, dispatch="grouped", d_ff=12, **fields)
  assert base.model.moe
  tokens_of_device = 8 * 32 // 4
  rows = math.ceil(0.3 * tokens_of_device * base.model.moe.choices_per_token(32))
  of_rows = f"f32[{rows},12]"  # hidden units
  assert of_rows not in forward(base)
  assert of_rows in forward(changed(base, "model.moe.dispatch.receive_factor", 0.3))


# ---- how long it trains, how fast, from what

STEPS = {
  "training.steps": 7, "training.budget.tokens_per_parameter": 5.0, "training.budget.parameters": "non_embedding",
}  # fmt: skip


@pytest.mark.parametrize("path", STEPS)
def test_another_value_is_another_length(path):
  assert full_sequence_steps(changed(DENSE, path, STEPS[path])) != full_sequence_steps(DENSE)


LEARNING_RATE = {
  "optimizer.learning_rate": (Cosine(), 2e-3),
  "optimizer.schedule": (Cosine(), Linear()),
  "optimizer.schedule.warmup_fraction": (Cosine(), 0.5),
  "optimizer.schedule[Cosine].final_fraction": (Cosine(), 0.5),
  "optimizer.schedule[Linear].final_fraction": (Linear(), 0.5),
  "optimizer.schedule[WarmupStableDecay].final_fraction": (WarmupStableDecay(), 0.5),
  "optimizer.schedule[WarmupStableDecay].decay_fraction": (WarmupStableDecay(), 0.5),
}


@pytest.mark.parametrize("path", LEARNING_RATE)
def test_another_value_is_another_learning_rate(path):
  schedule, value = LEARNING_RATE[path]
  base = changed(DENSE, "optimizer.schedule", schedule)
  plain = path.replace(f"[{schedule.kind}]", "")
  before, after = (
    [learning_rate(experiment.optimizer, step, 20) for step in range(20)]
    for experiment in (base, changed(base, plain, value))
  )
  assert before != after


# ---- what it reads


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
  """Two files of documents with two fields, one of held-out text, and ranks of a tokenizer."""
  folder = tmp_path_factory.mktemp("documents")
  random = np.random.default_rng(0)
  for name in ("a", "b", "held_out"):
    lines = (
      {field: f"{name} {field} " + "word " * int(random.integers(3, 40)) + str(i) for field in ("text", "body")}
      for i in range(60)
    )
    lines = [json.dumps(line) + "\n" for line in lines]
    (folder / f"{name}.jsonl").write_text("".join(lines + lines[:10]))  # ten of them twice
  return folder


def read(data: Data, folder) -> tuple:
  """The first batches and the held-out tokens."""
  corpus = build_corpus(open_text(data), folder / "cache")
  mixture = training_mixture(corpus, data)
  batches = [pipeline.batches_by_step(mixture, data, 8)[step] for step in range(2)]
  held_out = list(itertools.islice(pipeline.evaluation_batches(corpus.validation, 32, 8, None), 2))
  return tuple(array.tobytes() for batch in batches + held_out for _, array in sorted(batch.items()))


INPUT = {
  "data.train": lambda folder: (str(folder / "a.jsonl"),),
  "data.weights": lambda folder: (1.0, 9.0),
  "data.validation": lambda folder: (str(folder / "held_out.jsonl"),),
  "data.validation_fraction": lambda folder: 0.4,
  "data.text_field": lambda folder: "body",
  "data.deduplicate": lambda folder: True,
  "data.document_length": lambda folder: 40,
  "data.packing": lambda folder: "best_fit",
  "data.sequence_length": lambda folder: 16,
  "data.seed": lambda folder: 1,
}


@pytest.mark.parametrize("path", INPUT)
def test_another_value_is_another_input(path, documents):
  base = replace(DENSE, data=Data(train=tuple(str(documents / f"{name}.jsonl") for name in "ab"), sequence_length=32))
  other = changed(base, path, INPUT[path](documents))
  assert read(other.data, documents) != read(base.data, documents)


def test_another_tokenizer_gives_other_tokens(documents, tmp_path):
  pytest.importorskip("tokenizers", reason="of the extra `data`")
  train_tokenizer([str(documents / "a.jsonl")], 280, tmp_path / "words.json")
  base = Data(train=(str(documents / "a.jsonl"),), sequence_length=32)
  assert read(replace(base, tokenizer=str(tmp_path / "words.json")), documents) != read(base, documents)


def test_prefetch_is_how_many_batches_are_read_ahead(documents, monkeypatch):
  data = Data(train=(str(documents / "a.jsonl"),), sequence_length=32)
  mixture = training_mixture(build_corpus(open_text(data), documents / "cache"), data)
  asked = []
  real = pipeline.grain.ReadOptions
  monkeypatch.setattr(pipeline.grain, "ReadOptions", lambda **options: asked.append(options) or real(**options))
  for prefetch in (2, 5):
    pipeline.train_batches(mixture, replace(data, prefetch=prefetch), 8).close()
  assert [options["prefetch_buffer_size"] for options in asked] == [2, 5]


# ---- what a run writes


class NoInput:
  """Batches of zeros."""

  def __next__(self):
    return {name: np.zeros((8, 32), np.int32) for name in ("tokens", "targets", "segments", "positions", "weights")}

  def get_state(self):
    return {}


def files(experiment: Experiment, directory, skipped: tuple[int, ...] = ()) -> tuple:
  """Kept checkpoints, logged steps and evaluated states of eight steps that train nothing; some are skipped."""
  partitioner = make_partitioner(experiment.mesh, experiment.rules, jax.devices()[:1])
  spec = make_train_spec(experiment, partitioner)
  evaluated = []

  def step(state, batch, rate):
    metrics = dict.fromkeys((*ESSENTIAL, "target_tokens"), jnp.ones(()))
    return replace(state, step=state.step + 1), metrics | {"skipped": jnp.float32(int(state.step) + 1 in skipped)}

  def evaluate(state):
    evaluated.append(int(state.step))
    return {"score": 1.0}

  with contextlib.suppress(FloatingPointError):
    train(Run(spec, step, NoInput, steps=8, directory=directory, evaluators={"held_out": evaluate}))
  lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  kept = sorted(path.name for path in (directory / "checkpoints").iterdir() if path.name.isdigit())
  return kept, [line["step"] for line in lines if "loss" in line], evaluated


POLICY = replace(DENSE.training, steps=8, checkpoints=Checkpoints(every=2), log_every=2)
WRITING = replace(DENSE, training=POLICY)
FILES = {
  "training.checkpoints.every": 8, "training.checkpoints.keep_last": 1, "training.checkpoints.keep_every": 4,
  "training.checkpoints.every_minutes": 1e-9, "training.log_every": 3, "evaluation.every": 4,
}  # fmt: skip
IF_SKIPPED = {"training.anomalies.max_skipped": 3, "training.anomalies.then": "rewind"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  return files(WRITING, tmp_path_factory.mktemp("run") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES)
def test_another_value_is_another_set_of_files_and_lines(path, written, tmp_path):
  assert files(changed(WRITING, path, FILES[path]), tmp_path / "run") != written


@pytest.mark.slow
@pytest.mark.parametrize("path", IF_SKIPPED)
def test_another_value_does_something_else_if_steps_are_skipped(path, tmp_path):
  experiment, skipped = changed(WRITING, "training.anomalies", Anomalies(max_skipped=2)), (3, 4, 5)
  other = changed(experiment, path, IF_SKIPPED[path])
  assert files(experiment, tmp_path / "stops", skipped) != files(other, tmp_path / "other", skipped)


def test_another_seed_is_another_state():
  spec = make_train_spec(DENSE, make_partitioner(DENSE.mesh, DENSE.rules, jax.devices()[:1]))
  first, second = (spec.init_state(training.seed) for training in (DENSE.training, Training(batch_size=8, seed=1)))
  assert not np.array_equal(first.parameters["embedding_VD"], second.parameters["embedding_VD"])


@pytest.mark.parametrize(("name", "value"), [("batch_size", 16), ("max_tokens", 100)])
def test_what_is_evaluated_follows_the_configuration(name, value, documents, monkeypatch, tmp_path):
  data = Data(train=(str(documents / "a.jsonl"),), sequence_length=32)
  corpus = build_corpus(open_text(data), documents / "cache")
  seen: list = []

  def collect(spec, parameters, batches, *rest):
    seen.append([(batch["tokens"].shape, float(batch["weights"].sum())) for batch in batches])
    return types.SimpleNamespace(save=lambda path: None, summary=dict)

  monkeypatch.setattr(evaluators, "score_documents", collect)
  for evaluation in (Evaluation(batch_size=8), replace(Evaluation(batch_size=8), **{name: value})):
    experiment = replace(DENSE, data=data, evaluation=evaluation)
    spec = make_train_spec(experiment, make_partitioner(DENSE.mesh, DENSE.rules, jax.devices()[:1]))
    evaluate = evaluators.make_evaluator(spec, corpus, tmp_path, SILENT)
    evaluate(types.SimpleNamespace(parameters=None))
  assert seen[0] != seen[1]


# ---- what is compared and reported

OTHER = replace(sparse(), name="other")
SUITE = Suite(name="suite", pairs=(Pair(dense=DENSE, candidates=(sparse(), OTHER)),))
TIMES = {"dense": 1.0, "sparse": 1.1, "other": 2.0}


def compared(suite: Suite) -> tuple:
  matches = match(suite, TIMES)
  counter = types.SimpleNamespace(steps=lambda experiment: 100, tokens=lambda experiment, steps: 256 * steps)
  return matches, allot(suite, matches, TIMES, counter), suite.measurement, suite_facts(suite)["name"]


COMPARED = {
  "name": "another", "pairs": (Pair(dense=DENSE, candidates=(OTHER,)),), "tolerance": 0.2, "train": "matched",
  "measurement.warmup_steps": 7, "measurement.rounds": 7, "measurement.max_rounds": 9,
  "measurement.steps_per_round": 7,
}  # fmt: skip


@pytest.mark.parametrize("path", COMPARED)
def test_another_value_is_another_comparison(path):
  assert compared(changed(SUITE, path, COMPARED[path])) != compared(SUITE)


def test_another_name_is_another_report():
  assert facts(replace(DENSE, name="other"))["name"] == "other"


def test_match_varies_the_free_fields(monkeypatch):
  def plan(experiment, topology, progress):
    moe = experiment.model.moe
    seconds = moe.d_ff * moe.capacity_factor if moe else 1024.0
    return types.SimpleNamespace(experiment=experiment, fits=True, step_time_s=float(seconds))

  monkeypatch.setattr(pod_match, "plan", plan)
  found = []
  for free in ("model.moe.d_ff", "model.moe.capacity_factor"):
    pair = Pair(dense=DENSE, candidates=(changed(replace(sparse(), matchable=(free,)), "model.moe.d_ff", 512),))
    moe = pod_match.match_on_pod(pair, types.SimpleNamespace(name="pod"), 0.01).experiment.model.moe
    found.append((moe.d_ff, moe.capacity_factor))
  assert found == [(1024, 1.0), (512, 2.0)]


# ---- that this is all

ELSEWHERE = {
  "shorter_budgets": "a comparison's: tests/comparison/test_branches.py",
  **{f"learning_rates{part}": "a comparison's: tests/comparison" for part in ("", "[sweep].factors", "[sweep].budget")},
  **{f"evaluation.{name}": "needs lm-evaluation-harness" for name in ("tasks", "task_limit", "allow_cut_prompts")},
  "training.checkpoints.keep_best": "needs scores: tests/training/test_loop.py",
  "data.on_error": "needs damaged files: tests/data/test_damage.py",
  "model.feed_forward": "needs a layer of the user's: tests/models/test_feed_forward.py",
  "model.depths[predicted].every": "not for training: tests/models/test_depths.py",
  "evaluation.task_data": "needs lm-evaluation-harness: tests/evaluation/test_harness.py",
}
HERE = {
  "name", "matchable", "data.tokenizer", "data.prefetch", "training.seed",
  "evaluation.batch_size", "evaluation.max_tokens",
  *(path for changes in PROGRAM.values() for path in changes), *STEPS, *LEARNING_RATE, *INPUT, *FILES, *IF_SKIPPED,
  *COMPARED,
}  # fmt: skip


def leaves(kind: type, path: str = "") -> set[str]:
  """Dotted names of the fields of a configuration class, those of one kind as `optimizer[Lion].beta1`."""
  found = set()
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    name = f"{path}{field.name}"
    types_of = [hints[field.name], *typing.get_args(hints[field.name])]
    inner = [each for each in types_of if dataclasses.is_dataclass(each) and each not in (Pair, Experiment)]
    if not inner:
      found.add(name)
    for each in inner:
      found |= leaves(each, f"{name}.") | ({name} if len(types_of) > 1 else set())
      if issubclass(each, OfSeveralKinds):
        found.add(name)
        ours = [subclass for subclass in kinds(each).values() if subclass.__module__.startswith("moejax.")]
        for subclass in ours:
          found |= {leaf.replace(name, f"{name}[{subclass.kind}]", 1) for leaf in leaves(subclass, f"{name}.")
                    if leaf not in leaves(each, f"{name}.")}  # fmt: skip
  return found


def test_every_field_is_tested():
  fields = {path for path in leaves(Experiment) | leaves(Suite) if "].rope_scaling[" not in path}  # see test_rope.py
  assert fields - HERE == set(ELSEWHERE), "test their effect, above"
  assert fields >= HERE, "no such fields"
