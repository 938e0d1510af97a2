"""docs/ledger.py: rows become experiments, half-widths cover, and what is committed is whole."""

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def ledger() -> Any:
  spec = importlib.util.spec_from_file_location("ledger", DOCS / "ledger.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


DENSE = {
  "id": "a", "shape": {"layers": 32, "d_model": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "d_ff": 14336,
                       "vocab": 128256, "tied": False},
  "chip": "v5e", "topology": "16x16", "chips": 256, "slices": 2, "sequence": 2048, "global_batch": 1024,
  "sharding": "fsdp 64 x tensor 4 inside, data 2 between slices", "remat": "full",
  "precision": "bf16", "framework": "MaxText", "given": True,
  "published_teraflops": 100,
}  # fmt: skip
SPARSE = DENSE | {
  "id": "b", "chip": "h100", "topology": "gpu:h100:64", "chips": 64, "slices": 1, "needs": ["sliding window"],
  "shape": DENSE["shape"] | {"d_ff": 768, "experts": 128, "top_k": 8, "every": 1, "qk_norm": True},
  "sharding": "fsdp 64, experts over the same 64; local batch 4, 4 parts", "given": False,
}  # fmt: skip


def test_a_row_has_its_shape_mesh_and_published_time(ledger):
  row = ledger.read_row(DENSE)
  assert row.experiment.mesh.shape == {"replica": 2, "data": 64, "expert": 1, "model": 4}
  assert row.experiment.model.remat == "layer_inputs" and row.missing == ()
  flops = 6 * 7.5e9 * 1024 * 2048
  assert row.published_s == pytest.approx(flops / 256 / 1e14, rel=0.2)


def test_a_sparse_row_is_dropless_and_says_what_it_is_planned_without(ledger):
  row = ledger.read_row(SPARSE)
  moe = row.experiment.model.moe
  assert (moe.num_experts, moe.experts_per_token, moe.dispatch.kind) == (128, 8, "grouped")
  assert row.experiment.mesh.expert == 64 and row.experiment.training.gradient_accumulation == 4
  assert row.missing == ("sliding window", "fused attention on GPU") and row.published_s is None


def test_a_row_that_cannot_be_expressed_names_the_feature(ledger):
  for need in ("fp8", "MLA"):  # v5e has int8 alone
    with pytest.raises(ledger.InexpressibleError, match=need):
      ledger.read_row(DENSE | {"needs": [need]})


def test_a_row_in_8_bits_is_predicted_faster_than_in_bfloat16(ledger):
  plain, low = (ledger.predicted(ledger.read_row(DENSE | {"needs": of}), True) for of in ([], ["int8"]))
  assert low["predicted_s"] < plain["predicted_s"] and low["missing"] == ["int8"]


def test_a_row_in_8_bits_has_the_shape_of_its_bfloat16_row(ledger):
  base = DENSE | {"id": "v5e-llama70b-256", "given": True}
  same = "as its bf16 row"
  low = {
    "id": "v5e-llama70b-int8", "model": "llama70b", "chip": "v5e", "topology": same, "chips": same, "sequence": 0,
    "sharding": same, "precision": "int8", "needs": ["int8"], "note": "", "given": False, "source": "",
  }  # fmt: skip
  found = ledger.read_row(ledger.whole_row(low, [DENSE, base, low]))
  assert found.id == low["id"] and found.experiment.model == ledger.read_row(base).experiment.model
  assert found.speedup > 1.5 and found.missing == ("int8",) and found.published_s is None


def test_a_row_with_more_shards_than_its_width_has_is_planned_with_replicas(ledger):
  found = ledger.read_row(DENSE | {"shape": DENSE["shape"] | {"d_model": 32 * 96}, "sharding": "fsdp 256"})
  assert found.experiment.mesh.shape == {"replica": 2, "data": 256, "expert": 1, "model": 1} and not found.missing
  found = ledger.read_row(DENSE | {"shape": DENSE["shape"] | {"d_model": 32 * 97}, "sharding": "fsdp 256"})
  assert found.experiment.mesh.shape == {"replica": 16, "data": 32, "expert": 1, "model": 1} and found.missing


def test_the_formula_is_fitted_to_all_rows_but_the_one_that_it_predicts(ledger):
  """A row with another time changes the predictions of the others, and not its own."""
  rows = [ledger.read_row(DENSE | {"id": str(n), "published_teraflops": 90 + 10 * n}) for n in range(2)]
  _, before = ledger.fit(rows)
  fast = dataclasses.replace(rows[0], published_s=0.5 * rows[0].published_s)
  _, after = ledger.fit([fast, *rows[1:]])
  assert after["0"] == before["0"] and after["1"] < 0.9 * before["1"]


def test_the_committed_ledger_has_every_key_and_an_interval_around_each_prediction():
  lines = [json.loads(line) for line in (DOCS / "ledger.jsonl").read_text().splitlines()]
  assert len({line["id"] for line in lines}) == len(lines) > 70
  for line in lines:
    assert {"id", "predicted_s", "interval_s", "fits", "hbm_bytes_per_device", "missing", "moejax", "jax"} <= set(line)
    if line["predicted_s"] is None:
      assert line["missing"], line["id"]
    else:
      low, high = line["interval_s"]
      assert ("left_out_s" in line) == ("published_s" in line)
      assert 0 < low < line["predicted_s"] < high, line["id"]
