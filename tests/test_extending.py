"""The file of docs/extending.md, as a user has it: it trains, resumes, plans and generates."""

import json
import pathlib
import re

import pytest

import moejax
from moejax.config import Evaluation, Experiment
from moejax.config.plain import from_plain, to_plain
from moejax.errors import UserError
from moejax.models.moe.router import ROUTERS
from moejax.training.optimizers import OPTIMIZERS

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
  """mine.py:my_moe, small; what its file adds to the tables goes when the tests are done."""
  (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  path = tmp_path_factory.mktemp("mine") / "mine.py"
  path.write_text(code)
  before = dict(ROUTERS), dict(OPTIMIZERS)
  made = moejax.find(f"{path}:my_moe")
  assert isinstance(made, Experiment)
  small = {
    "model.num_layers": 1, "data.sequence_length": 32, "training.batch_size": 8, "training.steps": 4,
    "training.checkpoints.every": 2, "training.log_every": 1, "evaluation": Evaluation(batch_size=8, max_tokens=512),
    "mesh.data": 4, "mesh.expert": 2,
  }  # fmt: skip
  yield moejax.replace(made, **small)
  for table, content in zip((ROUTERS, OPTIMIZERS), before, strict=True):
    table.clear()
    table.update(content)


def test_it_trains_resumes_and_generates(mine, tmp_path):
  half = moejax.train(moejax.replace(mine, **{"training.steps": 2}), tmp_path / "run")
  assert half.steps == 2
  whole = moejax.train(mine, tmp_path / "run")
  assert whole.steps == 4
  stored = json.loads((tmp_path / "run" / "experiment.json").read_text())
  assert stored["model"]["moe"]["router"]["kind"] == "relu"
  assert (stored["optimizer"]["kind"], stored["optimizer"]["schedule"]["kind"]) == ("Sgd", "InverseRoot")
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  choices = [record["router/choices_per_token/layer_00"] for record in records if "loss" in record]
  assert len(choices) == 4 and all(0 < count < 8 for count in choices)
  assert len(moejax.generate(tmp_path / "run", ["def "], max_tokens=4)) == 1


def test_it_is_planned(mine, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert moejax.plan(moejax.replace(mine, **{"model.moe.dispatch": "einsum"}), "cpu:8").fits
  with pytest.raises(UserError, match=r"has a loop whose length depends on the data .*dispatch einsum"):
    moejax.plan(mine, "cpu:8")


def test_its_values_come_back_from_json_and_an_unknown_kind_is_refused(mine):
  plain = json.loads(json.dumps(to_plain(mine)))
  assert from_plain(Experiment, plain) == mine
  plain["model"]["moe"]["router"]["kind"] = "elu"
  with pytest.raises(UserError, match=r"router\.kind is 'elu', not one of top_k, .*, relu; .* --import FILE\.py"):
    from_plain(Experiment, plain)


def test_a_router_without_a_function_is_refused(mine, monkeypatch, tmp_path):
  relu = type(mine.model.moe.router)
  monkeypatch.delitem(ROUTERS, relu)
  with pytest.raises(UserError, match=r"router ReluRouter has no function; add one, as in .*ROUTERS\[ReluRouter\]"):
    moejax.train(mine, tmp_path / "run")
