"""Published claims are restated at equal step time, and mistakes in their files are one line."""

import json
import pathlib

import pytest

from moejax import cli
from moejax.decision.published_claim import check_claim
from moejax.errors import UserError
from moejax.planning.topology import parse_topology

CLAIMS = pathlib.Path(__file__).parents[2] / "docs" / "claims"


def test_marins_claim_of_4_times_less_compute_is_about_1_and_a_half_times_less_time():
  checked = check_claim(CLAIMS / "marin.json", None)
  assert [meeting.moe for meeting in checked.meetings] == ["moe d512", "moe d768"]
  for meeting in checked.meetings:
    assert 4.0 < meeting.flops_ratio < 4.5 and 1.44 < meeting.time_ratio < 1.61
  assert checked.published_gap == pytest.approx(0.343) and 0 < checked.gap[1] < checked.published_gap


def test_olmoe_becomes_better_than_the_dense_model_when_marin_measured_it():
  """github.com/marin-community/marin/issues/1183: after about 20 hours on a v5e-128."""
  checked = check_claim(CLAIMS / "olmoe.json", parse_topology("v5e:8x16"))
  assert checked.break_even.after and 20 / 2.5 < checked.break_even.after / 3600 < 20 * 2.5
  dense, sparse = checked.dense[0].timed, checked.sparse[0].timed
  assert dense.shape.active == pytest.approx(1.2e9, rel=0.1) and sparse.shape.total == pytest.approx(6.9e9, rel=0.02)
  assert sparse.shape.expansion == pytest.approx(8) and sparse.seconds_per_token > 1.5 * dense.seconds_per_token


def test_a_claim_at_equal_tokens_turns_at_equal_time_if_the_moe_is_faster():
  checked = check_claim(CLAIMS / "ds_moe.json", parse_topology("gpu:h100:32"))
  assert checked.published_gap and checked.published_gap < 0 < checked.gap[1]
  assert checked.sparse[0].seconds < 0.7 * checked.dense[0].seconds
  # With more time, the dense model, which has more active parameters, becomes better.
  assert checked.break_even.after is None and checked.break_even.until > checked.dense[0].seconds
  assert "until" in checked.sentences[-1]


def test_the_published_gap_is_kept_exactly_where_both_took_the_same_time(tmp_path):
  run = {"active_parameters": 1e9, "total_parameters": 1e9, "tokens": 2e10, "seconds": 1000}
  moe = run | {"total_parameters": 5e9, "expansion": 8, "loss": 2.4}
  path = tmp_path / "claim.json"
  path.write_text(json.dumps({"claim": "c", "source": "s", "dense": run | {"loss": 2.5}, "moe": moe}))
  checked = check_claim(path, None)
  assert checked.gap[1] == pytest.approx(0.1, abs=0.01) and checked.published_gap == pytest.approx(0.1)


RUN = {"active_parameters": 1e9, "total_parameters": 1e9, "tokens": 2e10, "seconds": 1000}
MOE = RUN | {"total_parameters": 5e9, "expansion": 8}
GOOD = {"claim": "c", "source": "s", "dense": RUN, "moe": MOE}


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ([], "does not contain an object"),
    ({"claim": "c"}, "key 'dense' is missing or unknown"),
    (GOOD | {"more": 1}, "key 'more' is missing or unknown"),
    (GOOD | {"claim": 3}, "claim=3 is not text"),
    (GOOD | {"dense": []}, "dense is not an object or a list"),
    (GOOD | {"dense": RUN | {"token": 1}}, "unknown key 'token'"),
    (GOOD | {"dense": RUN | {"tokens": -1}}, "tokens=-1 must lie between 1 and"),
    (GOOD | {"dense": RUN | {"tokens": 1e300}}, "tokens=1e.300 must lie between"),
    (GOOD | {"dense": RUN | {"mfu": 40}}, "mfu=40 must lie between 1e-06 and 1, a fraction of the peak"),
    (GOOD | {"moe": MOE | {"active_parameters": 6e9}}, "active_parameters=6000000000.0 is more than total_parameters"),
    (GOOD | {"dense": {"tokens": 1e9}}, "has no 'active_parameters'"),
    (GOOD | {"dense": {k: v for k, v in RUN.items() if k != "seconds"}}, "has neither 'seconds' nor 'mfu'"),
    (GOOD | {"dense": {"experiment": "dense_6b", "tokens": 1e9}}, "did you mean dense_6b4"),
    (GOOD | {"dense": {"experiment": "dense_6b4", "fields": {"model.layer": 1}, "tokens": 1e9}}, "no field 'layer'"),
    (GOOD | {"moe": RUN}, "above 1 for MoE runs"),
    (GOOD | {"dense": MOE, "moe": RUN}, "must be 1 for dense runs"),
    (GOOD | {"moe": {key: value for key, value in MOE.items() if key != "expansion"}}, "give the expansion of an MoE"),
    (GOOD | {"dense": RUN | {"tokens": 20}}, "tokens=20 is 2e-08 per active parameter"),
    (GOOD | {"dense": RUN | {"loss": 55.0}}, "loss=55.0 must lie between"),
    (GOOD | {"dense": RUN | {"mfu": 0.4, "peak_flops": 1e15}}, "has both 'seconds' and 'mfu'"),
    (GOOD | {"dense": RUN | {"peak_flops": 1e15}}, "are 120 times peak_flops"),
    (GOOD | {"dense": RUN | {"experiment": "dense_6b4"}}, "both an experiment and active_parameters"),
    (GOOD | {"dense": RUN | {"fields": {"a": 1}}}, "has fields, but no experiment"),
    (GOOD | {"dense": RUN | {"name": {"a": 1}}}, "name=.* is not text"),
  ],
)
def test_mistakes_in_a_claim_are_one_line(content, said, tmp_path):
  path = tmp_path / "claim.json"
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=said) as error:
    check_claim(path, None)
  assert "claim.json" in str(error.value)


def test_dense_models_meet_an_moe_where_the_best_of_them_first_have_its_loss(tmp_path):
  """The second dense run is longer than the first and worse, so that it is not on the curve."""
  dense = [
    RUN | {"name": name, "seconds": seconds, "tokens": seconds * 2e7, "loss": loss}
    for name, seconds, loss in (("a", 10, 3.0), ("b", 100, 3.2), ("c", 1000, 2.8))
  ]
  path = tmp_path / "claim.json"

  def meeting(loss: float):
    moe = MOE | {"seconds": 50, "tokens": 1e9, "loss": loss}
    for order in (dense, dense[::-1]):
      path.write_text(json.dumps(GOOD | {"dense": order, "moe": moe}))
      yield from check_claim(path, None).meetings

  for loss, seconds in ((2.9, 100), (3.0, 10), (2.8, 1000)):
    assert [each.time_ratio for each in meeting(loss)] == [pytest.approx(seconds / 50)] * 2
  assert list(meeting(3.1)) == []  # the shortest run is better


def test_the_break_even_of_a_claim_agrees_with_its_probability(tmp_path):
  path = tmp_path / "claim.json"
  for loss in (2.2, 2.45, 2.55, 2.9):
    path.write_text(json.dumps(GOOD | {"dense": RUN | {"loss": 2.5}, "moe": MOE | {"loss": loss}}))
    checked = check_claim(path, None)
    better = checked.break_even.after is not None and checked.break_even.after <= checked.dense[-1].seconds
    assert better == (checked.probability > 0.5) == (loss < 2.5)


def test_a_topology_needs_experiments(tmp_path):
  path = tmp_path / "claim.json"
  path.write_text(json.dumps(GOOD))
  with pytest.raises(UserError, match="has no experiment, so that its step time on v5p:4x8x8 is not known"):
    check_claim(path, parse_topology("v5p:4x8x8"))


def test_the_command_prints_the_restatement_and_writes_it(tmp_path, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(["check-claim", str(CLAIMS / "marin.json"), "--json", f"{tmp_path}/claim.json"])
  assert stopped.value.code == 0
  stored, out = json.loads((tmp_path / "claim.json").read_text()), capsys.readouterr().out
  assert all(sentence in out for sentence in stored["sentences"]) and len(stored["runs"]) == 8
