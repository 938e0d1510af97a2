"""comparison.json and metrics.jsonl: what is read, passed over, and refused."""

import json
import math

import pytest

from moejax.comparison.curves import read_metrics
from moejax.comparison.record import equal_names, from_json, missing, pair_members, read_comparison


def test_a_missing_comparison_names_the_path_and_the_remedy(tmp_path):
  with pytest.raises(
    ValueError, match=r"comparison\.json does not exist; give a directory written by `moejax compare`"
  ):
    read_comparison(tmp_path)


def test_what_is_not_json_is_refused(tmp_path):
  (tmp_path / "comparison.json").write_text('{"suite": "quick')
  with pytest.raises(ValueError, match=r"comparison.json is not JSON .*; run `moejax compare` again"):
    read_comparison(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.pop("suite"), "lacks suite"),
    (lambda c: c["members"][2].pop("kind"), r"members\[2\] lacks kind"),
    (lambda c: c["pairs"][1].pop("moe"), r"pairs\[1\] lacks moe"),
    (lambda c: c.update(members={}), "members is not a list"),
    (lambda c: c["members"].append("x"), r"members\[6\] is str, not an object"),
    (lambda c: c["members"][0].update(kind="sparse"), "kind='sparse' is not one of dense, moe"),
    (lambda c: c["members"][0].update(name=3), "name=3 is not text"),
    (lambda c: c["members"][0].update(accuracy="high"), "accuracy='high' is not a number"),
    (lambda c: c["pairs"][0].update(moe="moe_huge"), "a pair names 'moe_huge', but the members are dense_small,"),
    (lambda c: c.update(provenance="here"), "provenance is str, not an object"),
  ],
)
def test_an_unusable_comparison_is_refused_in_one_line(comparison, change, message):
  change(comparison)
  with pytest.raises(ValueError, match=message) as error:
    from_json(comparison)
  assert "\n" not in str(error.value)


def test_optional_keys_become_none():
  least = {"suite": "s", "members": [{"name": "d", "kind": "dense", "pair": "d"}], "pairs": []}
  full = from_json(least)
  assert full.members[0].bits_per_byte is None and full.members[0].matched is True
  assert full.baselines.unigram_accuracy is None
  assert (full.complete, full.finding, full.tolerance) == (False, None, 0.05)


def test_what_is_read_is_written_again_as_it_was_with_keys_of_other_versions_too(comparison):
  of_task = {"tasks/arc_easy/acc": 0.25, "tasks/arc_easy/acc_stderr": None}
  for member in comparison["members"]:
    member |= of_task | {"dispatch": None, "router": None, "color": [1, "b"]}
  comparison["pairs"][0]["whole_run_ratio"] = 1.5
  comparison["baselines"] |= {f"{name}_stderr": 0.01 for name in comparison["baselines"]} | {"trigram_accuracy": 0.5}
  comparison |= {"format": 2}
  assert from_json(comparison).to_json() == comparison
  assert from_json(comparison).members[0].tasks == of_task


def test_metrics_pass_over_broken_lines_and_take_the_later_of_one_step(tmp_path):
  lines = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"loss": 1.0}, [1], {"step": 10, "loss": 2.5}]
  path = tmp_path / "metrics.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "lo')
  assert read_metrics(path) == [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0}]
  assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_step_with_a_line_of_training_and_one_of_its_evaluation_is_one_record(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 10, "loss": 2.5}\n{"step": 10, "held_out/bits_per_byte": 1.5}\n')
  assert read_metrics(path) == [{"step": 10, "loss": 2.5, "held_out/bits_per_byte": 1.5}]


def test_missing_names_what_there_is_not(comparison):
  comparison["members"][4]["bits_per_byte"] = None
  comparison["members"][5]["step_time_s"] = None
  comparison["pairs"][1]["bits_per_byte_difference"] = None
  comparison["baselines"] = {}
  metrics = {member["name"]: [{"step": 1}] for member in comparison["members"][1:]}
  assert missing(from_json(comparison), metrics) == [
    "step time of moe_large_16e",
    "training result of moe_large_8e",
    "metrics of dense_small",
    "difference within the pair of dense_large",
    "baseline unigram_bits_per_byte, bigram_bits_per_byte, unigram_accuracy, bigram_accuracy",
  ]


def test_a_pair_lists_dense_then_match_then_others(comparison):
  names = [member.name for member in pair_members(from_json(comparison), "dense_large")]
  assert names == ["dense_large", "moe_large_16e", "moe_large_8e"]


def test_only_candidates_with_established_equal_time_are_equal(comparison):
  comparison["pairs"][1]["candidates"][0]["equal_time"] = "not established"
  assert equal_names(from_json(comparison)) == {"moe_small_8e"}


def test_not_finite_numbers_are_kept_for_the_reader(comparison):
  comparison["members"][0]["bits_per_byte"] = math.nan
  assert math.isnan(from_json(json.loads(json.dumps(comparison))).members[0].bits_per_byte)
