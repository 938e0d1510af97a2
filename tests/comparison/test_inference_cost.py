"""A comparison with a DS-MoE: a candidate like any MoE, whose inference cost is measured beside those of the others."""

import dataclasses
import json

import pytest

import moejax
from moejax.comparison.inference_cost import FOLDER, _is_ds_moe, with_inference
from moejax.comparison.record import Comparison, MatchedPair, Member
from moejax.config import (
  AdamW,
  Data,
  DenseDispatch,
  DenseRouter,
  Evaluation,
  Experiment,
  Losses,
  Measurement,
  Mesh,
  Model,
  MoE,
  Pair,
  Suite,
  Training,
)
from moejax.config.depths import TopKDepths
from moejax.config.parameters import parameter_counts
from moejax.inference.sparse import parse_sparse, sparse_model

pytestmark = pytest.mark.slow  # trains three members and compiles several programs for each


def suite(text) -> Suite:
  dense = Experiment(
    name="dense",
    model=Model(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, vocab_size=264),
    data=Data(sequence_length=32, train=(str(text),), validation_fraction=0.2),
    training=Training(batch_size=8, steps=10, log_every=5),
    optimizer=AdamW(learning_rate=1e-2),
    evaluation=Evaluation(batch_size=8, max_tokens=2000),
    mesh=Mesh(data=1),
  )

  def candidate(name: str, moe: MoE, losses: Losses) -> Experiment:
    training = dataclasses.replace(dense.training, losses=losses)
    return dataclasses.replace(dense, name=name, model=dataclasses.replace(dense.model, moe=moe), training=training)

  sparse = MoE(num_experts=4, experts_per_token=2, d_ff=16, dispatch="grouped")
  all_experts = MoE(num_experts=4, experts_per_token=4, d_ff=8, router=DenseRouter(), dispatch=DenseDispatch())
  return Suite(
    name="tiny",
    pairs=(
      Pair(
        dense=dense,
        candidates=(
          candidate("smoe", sparse, Losses(load_balance=0.01)),
          candidate("ds_moe", all_experts, Losses(mutual_information=0.01)),
        ),
      ),
    ),
    tolerance=0.9,
    measurement=Measurement(warmup_steps=1, rounds=1, steps_per_round=4),
  )


def test_a_ds_moe_with_a_mixture_of_depths_costs_what_it_was_trained_with():
  """It has no sparser modes, which its inference cost would otherwise be measured for, after all training."""
  _, found = suite("text.jsonl").pairs[0].candidates
  assert _is_ds_moe(found)
  model = dataclasses.replace(found.model, num_layers=2, depths=TopKDepths(share=0.5))
  losses = dataclasses.replace(found.training.losses, depths=0.01)
  routed = dataclasses.replace(found, model=model, training=dataclasses.replace(found.training, losses=losses))
  assert not _is_ds_moe(routed)


def test_a_ds_moe_is_a_candidate_whose_inference_cost_stands_beside_those_of_the_others(tmp_path):
  (tmp_path / "text.jsonl").write_text(
    "".join(json.dumps({"text": f"Document {i} counts to {i + 1}. " * 4}) + "\n" for i in range(200))
  )
  tried = suite(tmp_path / "text.jsonl")
  compared = moejax.compare(tried, tmp_path / "work")
  assert compared.pairs[0].moe in ("smoe", "ds_moe")
  members = {
    member["name"]: member for member in json.loads((tmp_path / "work" / "comparison.json").read_text())["members"]
  }
  costs = {name: member["inference"] for name, member in members.items()}
  assert [*costs] == ["dense", "smoe", "ds_moe"]
  assert all(cost["tokens_per_s"]["1"] > 0 and cost["tokens_per_s"]["16"] > 0 for cost in costs.values())
  assert costs["dense"]["mode"] is costs["smoe"]["mode"] is None
  assert costs["smoe"]["parameters_active"] == members["smoe"]["parameters_active"]
  cost, model = costs["ds_moe"], tried.pairs[0].candidates[1].model
  assert cost["perplexity_increase"] <= 0.03
  if cost["mode"].startswith("top_k"):
    assert cost["parameters_active"] == parameter_counts(sparse_model(model, parse_sparse(cost["mode"]))).active
  assert cost["parameters_active"] <= members["ds_moe"]["parameters_total"]
  page = (tmp_path / "work" / "report" / "index.html").read_text()
  assert 'id="inference"' in page and cost["mode"] in page
  # It is measured once, and kept by later reports.
  again = moejax.compare(tried, tmp_path / "work")
  assert {member.name: member.more["inference"] for member in again.members} == costs


@pytest.mark.parametrize("content", ["", "null", '{"dense": 3}', '{"dense": {"mode": NaN}}', "[" * 100_000])
def test_damaged_costs_are_not_used(tmp_path, content):
  path = tmp_path / FOLDER / "dense" / "costs.json"
  path.parent.mkdir(parents=True)
  path.write_text(content)
  members = tuple(Member(name=kind, kind=kind, pair="dense", matched=True) for kind in ("dense", "moe"))
  comparison = Comparison(suite="suite", members=members, pairs=(MatchedPair(dense="dense", moe="moe"),))
  assert with_inference(comparison, tmp_path) == comparison
