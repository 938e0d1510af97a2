"""What is told of routers that go wrong, when, and how often."""

import dataclasses
import math

from training_fixtures import tiny

from moejax.config import ThresholdDepths
from moejax.training.health import COLLAPSED, DEAD_STEPS, Health

MODEL = tiny(True).model
BALANCED = [1 / 8] * 8
ONE_DEAD = [1 / 7] * 3 + [0.0] + [1 / 7] * 4


def record(step, load=None, entropy=1.5):
  return {"step": step, "router/load": [load or BALANCED], "router/entropy/layer_01": entropy}


def test_an_expert_without_tokens_is_told_once_with_layer_and_number_after_the_stated_steps():
  health = Health(MODEL, frozenset(), 0)
  assert health.warnings(record(10)) == []
  assert health.warnings(record(9 + DEAD_STEPS, ONE_DEAD)) == []
  (told,) = health.warnings(record(10 + DEAD_STEPS, ONE_DEAD))
  assert told.startswith("layer_01: expert 3 of 8 received no token") and "training.losses.load_balance" in told
  assert health.warnings(record(20 + DEAD_STEPS, ONE_DEAD)) == []


def test_an_expert_that_came_back_and_died_again_is_told_again():
  health = Health(MODEL, frozenset(), 0)
  assert len(health.warnings(record(DEAD_STEPS, ONE_DEAD))) == 1
  assert health.warnings(record(DEAD_STEPS + 10)) == []
  assert len(health.warnings(record(2 * DEAD_STEPS + 10, ONE_DEAD))) == 1


def test_steps_before_a_resume_do_not_count():
  health = Health(MODEL, frozenset(), 5000)
  assert health.warnings(record(5010, ONE_DEAD)) == []
  assert len(health.warnings(record(5000 + DEAD_STEPS, ONE_DEAD))) == 1


def test_a_router_that_no_longer_weighs_is_told_unless_it_is_trained_to():
  low = 0.5 * COLLAPSED * math.log(8)
  (told,) = Health(MODEL, frozenset(), 0).warnings(record(10, entropy=low))
  assert told.startswith("layer_01: router/entropy is ")
  assert Health(MODEL, frozenset({"mutual_information"}), 0).warnings(record(10, entropy=low)) == []


def test_routers_over_heads_are_watched_in_every_layer():
  model = dataclasses.replace(MODEL, num_kv_heads=2, attention_experts=4)
  seen = record(10) | {"router/attention_entropy/layer_00": 1e-4, "router/attention_entropy/layer_01": 1.0}
  (told,) = Health(model, frozenset(), 0).warnings(seen)
  assert told.startswith("layer_00: router/attention_entropy is 0.0001 of at most 1.39 nats")


def test_a_model_without_routers_has_no_trouble_with_them():
  assert Health(tiny(False).model, frozenset(), 0).warnings({"step": 500, "loss": 1.0}) == []


def test_a_depth_of_multi_token_prediction_without_targets_is_named_once():
  model = dataclasses.replace(MODEL, multi_token_depth=2)
  health = Health(model, frozenset(), 0)
  record = {"step": 10, "multi_token/targets/depth_1": 5.0, "multi_token/targets/depth_2": 0.0}
  (warning,) = health.warnings(record)
  assert (
    "no document has a token 3 positions after another one" in warning and "loss/multi_token/depth_2 is 0" in warning
  )
  assert not health.warnings(record | {"step": 20})
  assert not Health(model, frozenset(), 0).warnings(record | {"multi_token/targets/depth_2": 1.0})


def test_a_routed_layer_that_tokens_skip_is_named():
  model = dataclasses.replace(tiny(False).model, depths=ThresholdDepths(share=0.5))
  (told,) = Health(model, frozenset(), 0).warnings({"step": 3, "router/depth_share/layer_01": 0.02})
  assert told.startswith("layer_01: 2.00% of the tokens go through it (step 3)")
  assert not Health(model, frozenset(), 0).warnings({"step": 3, "router/depth_share/layer_01": 0.03})
