"""docs/ledger.py: rows become experiments, half-widths cover, and what is committed is whole."""

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import pytest

from moejax.config import GroupedDispatch, Precision
from moejax.config.parameters import parameter_counts
from moejax.planning.estimate import estimate

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
  "id": "b", "chip": "h100", "topology": "gpu:h100:64", "chips": 64, "slices": 1,
  "needs": ["sliding window", "context parallelism"],
  "shape": DENSE["shape"] | {"d_ff": 768, "experts": 128, "top_k": 8, "every": 1, "qk_norm": True},
  "sharding": "fsdp 64, experts over the same 64; local batch 4, 4 parts", "given": False,
}  # fmt: skip


def test_a_row_has_its_shape_mesh_and_published_time(ledger):
  row = ledger.read_row(DENSE)
  assert row.experiment.mesh.shape == {"replica": 2, "data": 64, "expert": 1, "context": 1, "model": 4}
  assert row.experiment.model.remat == "layer_inputs" and row.missing == ()
  flops = 6 * 7.5e9 * 1024 * 2048
  assert row.published_s == pytest.approx(flops / 256 / 1e14, rel=0.2)


def test_a_sparse_row_is_dropless_and_says_what_it_is_planned_without(ledger):
  row = ledger.read_row(SPARSE)
  moe = row.experiment.model.moe
  assert (moe.num_experts, moe.experts_per_token, moe.dispatch.kind) == (128, 8, "grouped")
  assert row.experiment.mesh.expert == 64 and row.experiment.training.gradient_accumulation == 4
  assert row.published_s is None
  assert row.missing == ("context parallelism", "the sliding window, whose length is not stated")


def test_a_row_has_as_many_matrices_as_its_name_says_and_its_dense_layers_first(ledger):
  shape = DENSE["shape"] | {"layers": 48, "d_model": 6144, "heads": 24, "kv_heads": 24, "head_dim": 256, "d_ff": 24576,
                            "vocab": 32000}  # fmt: skip
  row = DENSE | {"shape": shape, "model": "MaxText 22B", "chip": "v4", "topology": "4x4x4", "slices": 1,
                 "sharding": "fsdp 64", "global_batch": 832}  # fmt: skip
  assert parameter_counts(ledger.read_row(row).experiment.model).total == pytest.approx(22e9, rel=0.01)
  assert parameter_counts(ledger.read_row(row | {"model": "a"}).experiment.model).total > 29e9
  moe = ledger.read_row(SPARSE | {"shape": SPARSE["shape"] | {"dense_layers_first": 3}}).experiment.model.moe
  assert moe.leading_dense == 3


def test_a_row_that_cannot_be_expressed_names_the_feature(ledger):
  with pytest.raises(ledger.InexpressibleError, match="a stated shape"):
    ledger.read_row({key: value for key, value in DENSE.items() if key != "shape"})


def test_a_row_without_a_shape_has_that_of_the_row_before(ledger):
  base = SPARSE | {"chip": "gb200", "topology": "gpu:gb200:64", "slices": 1, "sharding": "expert 64",
                   "needs": ["sliding window", "gb200"], "note": "capacity 1.0"}  # fmt: skip
  other = {key: value for key, value in base.items() if key != "shape"} | {"sharding": "fsdp 64", "note": "as above"}
  by_experts, by_width = (ledger.read_row(ledger.whole_row(row, [base, other])) for row in (base, other))
  assert by_width.experiment.model == by_experts.experiment.model
  assert by_experts.experiment.model.moe.dispatch == GroupedDispatch(receive_factor=1.0)
  assert [(row.experiment.mesh.data, row.experiment.mesh.expert) for row in (by_experts, by_width)] == [
    (1, 64),
    (64, 1),
  ]
  assert "the sliding window, whose length is not stated" in by_width.missing and "gb200" not in by_width.missing


@pytest.mark.parametrize(
  ("words", "layers", "windows"),
  [
    ("5 local layers (window 1024) to 1 global", 48, (1024, 1024, 1024, 1024, 1024, None)),
    ("sinks; window of 128 in every second layer", 36, (128, None)),
    ("window 2048, every fourth layer full", 8, (2048, 2048, 2048, None)),
    ("window 2048, every fourth layer full", 5, (2048, 2048, 2048, None, 2048)),
  ],
)
def test_a_row_has_the_attention_that_it_describes(ledger, words, layers, windows):
  model = ledger.read_row(DENSE | {"shape": DENSE["shape"] | {"attention": words, "layers": layers}}).experiment.model
  assert tuple(layer.window for layer in model.attention) == windows
  assert {layer.sinks for layer in model.attention} == {"sinks" in words}


def test_a_row_with_latent_attention_has_its_ranks(ledger):
  mla = {"q_rank": 1536, "kv_rank": 512, "nope": 128, "rope": 64, "v": 128}
  shape = {key: value for key, value in DENSE["shape"].items() if key not in ("head_dim", "kv_heads")} | {"mla": mla}
  (layer,) = ledger.read_row(DENSE | {"shape": shape, "needs": ["MLA"]}).experiment.model.attention
  assert (layer.kind, layer.kv_rank, layer.q_rank, layer.rotary_dim, layer.values(None)) == (
    "latent",
    512,
    1536,
    64,
    128,
  )


def test_microbatches_are_as_many_as_a_device_needs_for_its_share_of_the_batch(ledger):
  for words, parts in (("fsdp 64; micro batch 4", 4), ("fsdp 32 x tensor 2; local batch 8", 4), ("fsdp 64", 1)):
    assert ledger.read_row(SPARSE | {"sharding": words, "global_batch": 1024}).experiment.training \
      .gradient_accumulation == parts, words  # fmt: skip


def test_remat_as_on_another_number_of_chips_is_that_of_its_row(ledger):
  base = DENSE | {"model": "m", "chips": 64, "remat": "layer input, attention context, q, k, v kept on the device"}
  other = base | {"id": "c", "chips": 256, "remat": "as on 64"}
  model = ledger.read_row(ledger.whole_row(other, [base, other])).experiment.model
  assert set(model.saved_values) == {"layer_inputs", "context", "queries", "keys_values"}
  assert not model.offload_activations


@pytest.mark.parametrize(
  ("words", "remat", "saved", "offloaded"),
  [
    ("full, layer input moved to the host", "layer_inputs", (), ("layer_inputs",)),
    (
      "layer input, q, k, v and attention output moved to the host",
      "selected",
      ("queries", "keys_values", "attention_out"),
      ("queries", "keys_values", "attention_out", "layer_inputs"),
    ),
    (
      "layer input and second feed-forward product moved to the host, k, v kept; first moment bf16",
      "selected",
      ("keys_values",),
      ("layer_inputs",),
    ),
    ("all products and attention context kept but those of the feed-forward; fused attention", "attention", (), ()),
  ],
)
def test_values_that_a_row_saves_and_offloads(ledger, words, remat, saved, offloaded):
  model = ledger.read_row(DENSE | {"remat": words}).experiment.model
  assert (model.remat, model.save_activations, model.offload_activations) == (remat, saved, offloaded)


def test_eight_bits_take_no_less_time_on_a_chip_that_lacks_them(ledger):
  plain, low = (ledger.by_formula(ledger.read_row(DENSE | {"needs": of})) for of in ([], ["fp8"]))  # v5e has int8 alone
  assert low["predicted_s"] == plain["predicted_s"] and low["missing"] == ["fp8"]


def test_a_row_in_8_bits_is_predicted_faster_than_in_bfloat16(ledger):
  plain, low = (ledger.by_formula(ledger.read_row(DENSE | {"needs": of})) for of in ([], ["int8"]))
  assert low["predicted_s"] < plain["predicted_s"] and low["missing"] == []
  sparse = ledger.read_row(SPARSE | {"needs": ["fp8"]})
  assert sparse.missing == () and sparse.experiment.model.precision.experts == "fp8"
  model = dataclasses.replace(sparse.experiment.model, precision=Precision())
  plain = dataclasses.replace(sparse.experiment, model=model)
  low_s, plain_s = (estimate(one, sparse.topology).step_time_s for one in (sparse.experiment, plain))
  assert 0.8 * plain_s < low_s < plain_s


def test_a_row_on_a_gpu_has_the_attention_of_its_framework_and_a_row_on_a_tpu_that_of_moejax(ledger):
  dense = DENSE | {"sharding": "fsdp 64", "slices": 1}
  gpu, tpu = (dense | {"chip": chip, "topology": name} for chip, name in (("h100", "gpu:h100:64"), ("v5p", "4x4x4")))
  for row, is_faster in ((ledger.read_row(gpu), True), (ledger.read_row(tpu), False)):
    own_s, found_s = estimate(row.experiment, row.topology).step_time_s, ledger.by_formula(row)["predicted_s"]
    assert found_s < 0.99 * own_s if is_faster else found_s == pytest.approx(own_s, abs=1e-4)


def test_a_row_on_a_gpu_is_compiled_with_the_attention_that_its_run_had(ledger, capsys):
  gpu = DENSE | {"sharding": "fsdp 64", "slices": 1, "chip": "h100", "topology": "gpu:h100:64"}
  found = [
    ledger.read_row(gpu | {"framework": framework, "sequence": length}).plain_attention
    for framework, length in (("MaxText", 2048), ("axlearn", 4096), ("axlearn", 2048))
  ]
  assert found == [False, False, True]
  # Where devices share sequences, moejax has no fused kernel on GPU, so that nothing is compiled.
  of_parts = gpu | {"id": "none", "sharding": "fsdp 32 x context 2", "needs": ["context parallelism"]}
  ledger.compile_rows([ledger.read_row(of_parts)])
  assert "none: its program has plain attention" in capsys.readouterr().err and "none" not in ledger.read()


def test_a_row_with_context_parallelism_has_that_axis(ledger):
  found = ledger.read_row(DENSE | {"sharding": "fsdp 32 x context 2", "needs": ["context parallelism"]})
  assert (found.experiment.mesh.context, found.experiment.mesh.data, found.missing) == (2, 128, ())


def test_a_row_in_8_bits_has_the_shape_of_its_bfloat16_row(ledger):
  base = DENSE | {"id": "v5e-llama70b-256", "given": True}
  same = "as its bf16 row"
  low = {
    "id": "v5e-llama70b-int8", "model": "llama70b", "chip": "v5e", "topology": same, "chips": same, "sequence": 0,
    "sharding": same, "precision": "int8", "needs": ["int8"], "note": "", "given": False, "source": "",
  }  # fmt: skip
  found = ledger.read_row(ledger.whole_row(low, [DENSE, base, low]))
  assert found.id == low["id"] and found.experiment.model == ledger.read_row(base).experiment.model
  assert found.precision == "int8" and found.missing == () and found.published_s is None


def test_a_row_with_more_shards_than_its_width_has_is_planned_with_replicas(ledger):
  found = ledger.read_row(DENSE | {"shape": DENSE["shape"] | {"d_model": 32 * 96}, "sharding": "fsdp 256"})
  assert (
    found.experiment.mesh.shape == {"replica": 2, "data": 256, "expert": 1, "context": 1, "model": 1}
    and not found.missing
  )
  found = ledger.read_row(DENSE | {"shape": DENSE["shape"] | {"d_model": 32 * 97}, "sharding": "fsdp 256"})
  assert (
    found.experiment.mesh.shape == {"replica": 16, "data": 32, "expert": 1, "context": 1, "model": 1} and found.missing
  )


def test_the_formula_is_fitted_to_all_rows_but_the_one_that_it_predicts(ledger):
  """A row with another time changes the predictions of the others, and not its own."""
  rows = [ledger.read_row(DENSE | {"id": str(n), "published_teraflops": 90 + 10 * n}) for n in range(2)]
  of_chip, _, before = ledger.fit(rows + [_on_gpu(ledger)])
  slow = dataclasses.replace(rows[0], published_s=2 * rows[0].published_s)
  slower, _, after = ledger.fit([slow, *rows[1:], _on_gpu(ledger)])
  assert after["0"] == before["0"] and after["1"] > 1.2 * before["1"] and slower["v5e"] < of_chip["v5e"]


def test_a_row_that_does_not_calibrate_is_predicted_with_what_is_fitted_to_the_others(ledger):
  rows = [
    ledger.read_row(DENSE),
    ledger.read_row(DENSE | {"id": "d", "framework": "axlearn", "published_teraflops": 9}),
  ]
  of_chip, _, left_out = ledger.fit([*rows, _on_gpu(ledger)])
  assert of_chip["v5e"] == ledger.fit([rows[0], _on_gpu(ledger)])[0]["v5e"]
  assert left_out["d"] < 0.5 * rows[1].published_s


def test_a_line_from_a_program_follows_the_efficiency_of_its_chip(ledger, monkeypatch):
  line = {"id": "a", "chip": "v5e", "model": "dense", "exposed_s": 1.0, "uncalibrated_s": 3.0, "microbatches": 1}
  line |= {"fits": True}
  monkeypatch.setitem(ledger.CHIPS, "v5e", dataclasses.replace(ledger.CHIPS["v5e"], efficiency=0.5))
  formula = {"predicted_s": 7.0, "model": "dense", "microbatches": 1, "source": "formula"}
  assert ledger.preferred(formula, line)["predicted_s"] == 5.0
  # Of a program in more microbatches than the run had, only that of sparse layers is closer than the formula, if it
  # fits.
  more = line | {"microbatches": 2}
  assert ledger.preferred(formula, more)["predicted_s"] == ledger.preferred(formula, {})["predicted_s"] == 7.0
  assert ledger.preferred(formula | {"model": "moe"}, more | {"model": "moe"})["predicted_s"] == 5.0
  assert ledger.preferred(formula | {"model": "moe"}, more | {"model": "moe", "fits": False})["predicted_s"] == 7.0
  for before in (line, more):
    found = ledger.preferred(formula, before)
    assert (found["formula_s"], found["program_s"]) == (7.0, 5.0)


def _on_gpu(ledger: Any) -> Any:
  return ledger.read_row(SPARSE | {"id": "g", "shape": DENSE["shape"], "sharding": "fsdp 64", "given": True})


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
