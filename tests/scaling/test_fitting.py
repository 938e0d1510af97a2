"""Fits recover known constants from noisy runs, keep what runs do not determine, and predict larger runs."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.scaling.finished_runs import FinishedRun, read_runs
from moejax.scaling.fitting import CHINCHILLA, FORMS, chinchilla_loss, fit
from moejax.scaling.laws import JOINT, joint_loss
from moejax.scaling.shapes import Shape


def runs(law, constants, experts=(1,), noise=0.002, seed=0, largest=3e9) -> list[FinishedRun]:
  """A grid of sizes, tokens and experts, with noise of log loss."""
  generator = np.random.default_rng(seed)
  grid = [
    (active, ratio * active, e) for active in np.geomspace(3e7, largest, 6) for ratio in (5, 20, 80) for e in experts
  ]
  return [
    FinishedRun(
      name=f"{active:.2g}, {tokens:.2g}, {e}",
      shape=Shape(active=active, total=active * (1 + 2 / 3 * (e - 1)), expansion=e),
      tokens=tokens,
      loss=float(law(constants, active, tokens, e) * np.exp(noise * generator.standard_normal())),
    )
    for active, tokens, e in grid
  ]


def test_chinchillas_constants_are_recovered_although_they_are_far_from_the_prior():
  true = {"A": 150.0, "B": 900.0, "E": 1.4, "alpha": 0.29, "beta": 0.31}
  found = fit(FORMS["chinchilla"], runs(chinchilla_loss, true), replicates=30, starts=4)
  assert found.constants["alpha"] == pytest.approx(0.29, abs=0.02)
  assert found.constants["beta"] == pytest.approx(0.31, abs=0.02)
  assert found.constants["E"] == pytest.approx(1.4, abs=0.06)
  assert found.error < 0.01 and found.held_out_error < 0.02
  covered = [low <= true[name] <= high for name in true for low, high in [found.interval(name)]]
  assert sum(covered) >= 3


def test_the_joint_laws_constants_are_recovered_and_predict_a_model_ten_times_as_large():
  true = JOINT | {"alpha": -0.21, "omega": 0.6, "zeta": -0.0275, "c": 1.1}
  found = fit(FORMS["joint"], runs(joint_loss, true, experts=(1, 4, 16)), replicates=10, starts=2)
  for name, tolerance in {"alpha": 0.02, "beta": 0.02, "c": 0.12}.items():
    assert found.constants[name] == pytest.approx(true[name], abs=tolerance), name
  for experts in (1, 16):
    large = Shape(active=3e10, total=3e10, expansion=experts)
    assert found.predict(large, 6e11) == pytest.approx(joint_loss(true, 3e10, 6e11, experts), abs=0.02)
  dense, sparse = (Shape(active=1e9, total=1e9, expansion=e) for e in (1, 16))
  gain = found.predict(dense, 2e10) - found.predict(sparse, 2e10)
  assert gain == pytest.approx(joint_loss(true, 1e9, 2e10, 1) - joint_loss(true, 1e9, 2e10, 16), abs=0.005)


def test_one_outlier_moves_the_fit_little():
  clean = runs(chinchilla_loss, CHINCHILLA)
  broken = [*clean[:-1], FinishedRun(name="diverged", shape=clean[-1].shape, tokens=clean[-1].tokens, loss=6.0)]
  found = fit(FORMS["chinchilla"], broken, replicates=2, starts=2)
  assert found.predict(clean[0].shape, clean[0].tokens) == pytest.approx(clean[0].loss, rel=0.01)
  assert found.constants["E"] == pytest.approx(CHINCHILLA["E"], abs=0.1)


def test_dense_runs_alone_keep_the_published_effect_of_experts_with_its_uncertainty():
  found = fit(FORMS["joint"], runs(joint_loss, JOINT), replicates=20, starts=2)
  gain = [joint_loss(k, 1e9, 2e10, 1) - joint_loss(k, 1e9, 2e10, 16) for k in (JOINT, found.constants)]
  assert gain[1] == pytest.approx(gain[0], abs=0.01)
  replicates = joint_loss(found.replicates, 1e9, 2e10, 1) - joint_loss(found.replicates, 1e9, 2e10, 16)
  both = fit(FORMS["joint"], runs(joint_loss, JOINT, experts=(1, 16)), replicates=20, starts=2)
  known = joint_loss(both.replicates, 1e9, 2e10, 1) - joint_loss(both.replicates, 1e9, 2e10, 16)
  assert np.std(replicates) > 4 * np.std(known)


def test_the_same_seed_gives_the_same_fit_and_too_few_runs_are_refused():
  some = runs(chinchilla_loss, CHINCHILLA)[:6]
  first, second = (fit(FORMS["chinchilla"], some, seed=3, replicates=3, starts=2) for _ in range(2))
  assert first.to_json() == second.to_json()
  assert json.dumps(first.to_json())
  with pytest.raises(UserError, match=r"needs at least 4 runs, but there are 3"):
    fit(FORMS["joint"], some[:3])


def test_a_fit_falls_with_size_and_tokens_for_any_runs_and_is_refused_where_their_losses_rise():
  generator = np.random.default_rng(0)
  for _ in range(3):
    some = [runs(joint_loss, JOINT, experts=(1, 8), noise=0.2)[i] for i in generator.permutation(36)[:6]]
    with contextlib.suppress(UserError):
      found = fit(FORMS["joint"], some, replicates=3, starts=1)
      for expansion in (1, 8, 64, 256):
        for constants in (found.constants, found.replicates):
          losses = [joint_loss(constants, 1e9, tokens, expansion) for tokens in np.geomspace(1e7, 1e14, 8)]
          assert np.all(np.diff(losses, axis=0) < 0)
          losses = [joint_loss(constants, active, 1e11, expansion) for active in np.geomspace(1e6, 1e12, 7)]
          assert np.all(np.diff(losses, axis=0) < 0)
  rising = [dataclasses.replace(run, loss=3 + 0.1 * np.log10(run.tokens)) for run in runs(joint_loss, JOINT)]
  with pytest.raises(UserError, match="losses of these 18 runs do not fall with the number of"):
    fit(FORMS["joint"], rising, replicates=2, starts=2)


def test_runs_are_read_from_a_list_and_mistakes_in_it_are_one_line(tmp_path):
  row = {"active_parameters": 1e9, "total_parameters": 2e9, "tokens": 2e10, "loss": 2.5, "expansion": 8}
  path = tmp_path / "runs.json"
  path.write_text(json.dumps([row, row | {"name": "b", "granularity": 2}]))
  first, second = read_runs([path])
  assert first.name == "run 1" and second.name == "b" and second.shape.granularity == 2 and first.shape.expansion == 8
  for wrong, said in (
    ({"los": 2}, "unknown key 'los'"),
    ({"tokens": "many"}, "tokens='many' is not a number"),
    ({"expansion": 0.5}, "expansion=0.5 must lie between 1 and"),
    ({"active_parameters": 3e9}, "active_parameters=3000000000.0 is more than total_parameters"),
    ({"tokens": 20}, "tokens=20 is 2e-08 per active parameter"),
    ({"active_parameters": 1}, "active_parameters=1 must lie between 1000 and 1e"),
    ({"loss": 54.2}, "loss=54.2 must lie between 0.001 and 20 nats per token"),
    ({"loss": True}, "loss=True is not a number"),
    ({"total_parameters": 1e9}, "all parameters are active, but expansion=8 is above 1"),
    ({"total_parameters": 9e9, "expansion": 1}, "which an expansion of 1 does not explain"),
    ({"embedding_parameters": 1e9}, "embedding_parameters=1000000000.0 must be less than active_parameters"),
    ({"flops_per_token": 6e6}, "flops_per_token=6000000.0 is 0.006 per active parameter"),
    ({"name": ["a"]}, "name=.'a'. is not text"),
  ):
    path.write_text(json.dumps([row | wrong]))
    with pytest.raises(UserError, match=f"runs.json, run 1.*{said}"):
      read_runs([path])
  path.write_text(json.dumps([row, row | {"name": "again"}]))
  with pytest.raises(UserError, match="run 1 and again are the same run; give each run once"):
    read_runs([path])
  path.write_text("[]")
  with pytest.raises(UserError, match="does not contain a list"):
    read_runs([path])
  with pytest.raises(UserError, match="has no finished run"):
    read_runs([tmp_path])
