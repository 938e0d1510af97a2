"""Random fields: each experiment is refused in one line before anything compiles, or trains with finite numbers.

All of them are checked and described. Those that are accepted take a step on eight devices, and one in TRAINED is
trained as a whole command. The number of a draw is its seed.

B batch  T query position
"""

import json
import math
import pathlib
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_fields import DENSE, EDGES, FILE, SENSIBLE, SPARSE, draw_fields

from moejax.cli import main
from moejax.config import Experiment
from moejax.config.plain import from_plain, to_plain
from moejax.config.walk import leaves
from moejax.data.tokenizers import ByteTokenizer
from moejax.describe import experiment_page, facts
from moejax.errors import UserError
from moejax.field_values import option
from moejax.overrides import override
from moejax.training.not_finite import ESSENTIAL, is_finite
from moejax.training.prepare import on_devices
from moejax.training.state import make_train_spec
from moejax.training.step import BATCH_TYPES, make_train_step

TRAINED = 40

Fields = list[list[str]]
"""Options, each with its values."""

WORDS = ("alpha", "beta", "gamma", "delta", "dense", "router", "expert")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """Documents of many lengths, also with the text in other fields."""
  folder, chance = tmp_path_factory.mktemp("text"), random.Random(0)

  def words(most: int) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, most)))

  for name, body in (("a", lambda: {"inner": words(10)}), ("b", lambda: words(10))):
    lines = (json.dumps({"text": words(80), "body": body()}) for _ in range(80))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
  for name in ("held_out", "one"):
    (folder / f"{name}.txt").write_text(words(200))
  return folder


def described(base: Experiment, fields: Fields) -> Experiment:
  """The experiment with these fields, which JSON and every page can hold; raises UserError as `override`."""
  experiment = override(base, [word for field in fields for word in field])
  stored = json.dumps(to_plain(experiment), allow_nan=False)
  assert from_plain(Experiment, json.loads(stored)) == experiment
  numbers = {name: value for name, value in facts(experiment).items() if not isinstance(value, str | dict)}
  assert all(math.isfinite(value) and value >= 0 for value in numbers.values()), numbers
  experiment_page(experiment)
  return experiment


def check_line(text: str) -> None:
  assert text.isprintable() and len(text) < 2000, repr(text)


OPTIONS = st.lists(
  st.tuples(st.sampled_from(sorted(SENSIBLE)), st.lists(st.sampled_from(EDGES) | st.text(max_size=20), max_size=2)),
  max_size=4,
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.booleans(), OPTIONS)
def test_any_words_give_an_experiment_or_one_line(sparse, options):
  fields = [[name, *values] for name, values in options]
  try:
    described(SPARSE if sparse else DENSE, fields)
  except UserError as error:
    check_line(str(error))


def test_every_field_is_drawn():
  options = {option(path) for path, _ in leaves(SPARSE) if not path.startswith("rules.")}
  assert options <= SENSIBLE.keys(), "list them in random_fields.py"


def draw(seed: int, text: pathlib.Path) -> tuple[Experiment, Fields]:
  """An experiment and fields that are accepted on eight devices: while they are refused, one is taken away."""
  chance = random.Random(seed)
  base = SPARSE if chance.random() < 0.75 else DENSE
  fields = draw_fields(chance, base.model.moe is not None, text)
  while True:
    try:
      experiment = described(base, fields)
      if is_tiny(experiment):
        on_devices([experiment], ByteTokenizer())
        return base, fields
    except UserError as error:
      check_line(str(error))
    fields.remove(chance.choice(fields))


def is_tiny(experiment: Experiment) -> bool:
  """Whether it is traced and trained in seconds, as it is not where a value beyond a limit is accepted."""
  tokens = max(experiment.training.batch_size, experiment.evaluation.batch_size) * experiment.data.sequence_length
  return (
    facts(experiment)["parameters_total"] < 3_000_000
    and tokens <= 4096
    and experiment.model.num_layers <= 8
    and (experiment.training.steps or 1) <= 8
  )


def check_steps(experiment: Experiment) -> None:
  """Initializes the state and takes a step on random tokens, of which some are padding."""
  (placed,) = on_devices([experiment], ByteTokenizer())
  spec = make_train_spec(placed.experiment, placed.partitioner)
  draw = np.random.default_rng(0)
  shape = (experiment.training.batch_size, experiment.data.sequence_length)
  segments_BT = np.sort(draw.integers(1, 3, shape), axis=1)
  segments_BT[-1:, shape[1] // 2 :] = 0
  batch = {
    "tokens": draw.integers(0, 256, shape),
    "targets": draw.integers(0, 256, shape),
    "segments": segments_BT,
    "positions": np.broadcast_to(np.arange(shape[1]), shape),
    "weights": segments_BT > 0,
  }
  batch = {name: jax.device_put(x_BT.astype(BATCH_TYPES[name]), spec.partitioner.batch) for name, x_BT in batch.items()}
  state, metrics = make_train_step(spec)(spec.init_state(0), batch, np.float32(1e-3))
  found = jax.device_get({name: metrics[name] for name in (*ESSENTIAL, "skipped")})
  assert all(map(math.isfinite, found.values())) and not found["skipped"], found
  assert is_finite(state)
  assert segments_BT.any() == (4 < found["loss"] < 7), found  # near log(vocab_size)


def program_of(experiment: Experiment) -> str:
  """Experiments of which this is equal take the same step, but for its noise."""
  plain = to_plain(experiment)
  parts = [plain[name] for name in ("model", "optimizer", "mesh", "rules")]
  of_training = ("batch_size", "gradient_accumulation", "losses", "anomalies")
  return json.dumps([*parts, *(plain["training"][name] for name in of_training), experiment.data.sequence_length])


def check_trains(base: Experiment, fields: Fields, text: pathlib.Path, directory: pathlib.Path, capsys) -> None:
  given = {field[0] for field in fields}
  more = [["--data.train", str(text / "a.jsonl")], ["--training.steps", "2"]]
  words = [word for field in [*fields, *(field for field in more if field[0] not in given)] for word in field]
  capsys.readouterr()
  with pytest.raises(SystemExit) as end:
    main(["train", f"{FILE}:{base.name}", "--workdir", str(directory), *words])
  said = capsys.readouterr().err
  if end.value.code == 2:  # the text does not suit the fields
    assert not (directory / "checkpoints").exists()
    check_line(said.splitlines()[-1])
    return
  assert end.value.code == 0, said
  records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  summary = json.loads((directory / "summary.json").read_text())
  for name, value in [*summary.items(), *(item for record in records for item in record.items())]:
    assert not isinstance(value, float) or math.isfinite(value), (name, value)
  assert all(record["skipped"] == 0 for record in records if "loss" in record)
  assert 4 < records[0]["loss"] < 7  # that of the initial parameters is near log(vocab_size)


def check(seeds: range, text: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
  stepped = set[str]()
  for seed in seeds:
    base, fields = draw(seed, text)
    try:
      experiment = described(base, fields)
      if (program := program_of(experiment)) not in stepped:
        check_steps(experiment)
        stepped.add(program)
      if seed % TRAINED == 0:
        check_trains(base, fields, text, tmp_path / str(seed), capsys)
    except BaseException as error:
      error.add_note(f"seed {seed}: {base.name} with {' '.join(word for field in fields for word in field)}")
      raise


@pytest.mark.parametrize(
  "seeds", [pytest.param(range(8), marks=pytest.mark.slow), pytest.param(range(8, 16), marks=pytest.mark.nightly)]
)
def test_some_random_experiments_are_refused_in_one_line_or_train(seeds, text, tmp_path, capsys):
  check(seeds, text, tmp_path, capsys)


@pytest.mark.nightly
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_random_experiments_are_refused_in_one_line_or_train(hundred, text, tmp_path, capsys):
  check(range(1000 + 100 * hundred, 1100 + 100 * hundred), text, tmp_path, capsys)
