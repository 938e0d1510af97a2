"""Finished runs raise the weights of the laws that predict them, and fits are plotted, stored and read again."""

import dataclasses
import json

import numpy as np
import pytest

from moejax.decision.figures import drawn, fit_figure
from moejax.decision.fit_page import fit_page
from moejax.scaling.ensemble import _log_likelihood, _normalized, fit_ensemble, published_weights
from moejax.scaling.finished_runs import FinishedRun, read_runs
from moejax.scaling.laws import LAWS
from moejax.scaling.shapes import Shape


def runs_of(name: str, offset: float) -> list[FinishedRun]:
  """Runs that follow a law, on a text with other losses."""
  generator, law = np.random.default_rng(0), LAWS[name]
  shapes = [
    Shape(active=active, total=active * (1 + 2 / 3 * (e - 1)), expansion=e)
    for active in (2e8, 4e8, 8e8, 1.6e9)
    for e in (1, 32)
  ]
  return [
    FinishedRun(
      name=f"{shape.active:.2g} {shape.expansion}",
      shape=shape,
      tokens=20 * shape.active,
      loss=float(law.loss(shape, np.array([20 * shape.active]))[0]) + offset + 0.003 * generator.standard_normal(),
    )
    for shape in shapes
  ]


@pytest.fixture(scope="module")
def fitted():
  return fit_ensemble(runs_of("joint", 0.0), replicates=10)


def test_published_weights_add_up_to_1_and_follow_the_warnings():
  weights = published_weights()
  assert sum(weights.values()) == pytest.approx(1) and weights.keys() == LAWS.keys()
  assert weights["sparsity"] == weights["joint"] / 2


def test_the_law_of_the_runs_gains_weight_and_those_that_miss_them_lose_it(fitted):
  before, after = published_weights(), fitted.weights
  assert sum(after.values()) == pytest.approx(1)
  assert after["joint"] / after["sparsity"] > 10 * before["joint"] / before["sparsity"]
  assert after["your runs (joint)"] > 0.2


def test_no_law_loses_all_its_weight():
  """Otherwise, a pair for which only such laws are defined would have no probability."""
  assert all(weight > 0 for weight in _normalized({"good": 0.0, "bad": -1e6}).values())


def test_an_offset_of_the_text_does_not_change_the_weights_of_published_laws(fitted):
  for law in LAWS.values():
    here, there = (_log_likelihood(law, runs_of("joint", offset)) for offset in (0.0, 0.7))
    assert here == pytest.approx(there)


def test_a_fit_is_shown_plotted_stored_and_read_again(fitted, tmp_path, capsys):
  from rich.console import Console

  Console(width=200).print(fit_page(fitted))
  shown = capsys.readouterr().out
  assert "alpha" in shown and "your runs (joint)" in shown and "predicted from the others" in shown
  figure = fit_figure(fitted.fits[0])
  assert drawn(figure, "png")[:4] == b"\x89PNG" and b"<svg" in drawn(figure, "svg")
  path = tmp_path / "fit.json"
  path.write_text(json.dumps(fitted.to_json()))
  again = read_runs([path])
  expected = [dataclasses.replace(run, shape=dataclasses.replace(run.shape, flops_per_token=run.shape.training_flops))
              for run in fitted.fits[0].runs]  # fmt: skip
  assert list(again) == expected and "weight of joint" in fitted._repr_html_()
