"""A synthetic comparison directory of realistic size: two pairs of two MoE candidates, four layers, 8 to 16 experts."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from moejax.comparison import report

TOKENS_PER_STEP = 2048


def member(name, pair, *, experts=0, matched=True, step_time_s, total, active, bits, accuracy, dense_step_time_s):
  budget_s = 1200 * dense_step_time_s
  steps = round(budget_s / step_time_s)
  return {
    "name": name, "kind": "moe" if experts else "dense", "pair": pair, "matched": matched,
    "parameters_total": total, "parameters_active": active, "parameters_embedding": 33_152,
    "model_flops_per_token": 6 * active, "tokens_per_step": TOKENS_PER_STEP, "step_time_s": step_time_s,
    "step_time_interval_s": [0.99 * step_time_s, 1.01 * step_time_s], "step_time_spread": 0.0132,
    "tokens_per_s": TOKENS_PER_STEP / step_time_s, "mfu": None,
    "dropped_fraction": 0.031 if experts else None, "load_max_over_mean": 2.4 if experts else None,
    "dropped_fraction_trained": 0.012 if experts else None,
    "load_max_over_mean_trained": 1.3 if experts else None, "budget_s": budget_s,
    "steps": steps, "tokens": steps * TOKENS_PER_STEP, "bits_per_byte": bits, "bits_per_byte_stderr": 0.0121,
    "accuracy": accuracy, "accuracy_stderr": 0.0023, "seed": 0,
    "runs": [name], "bits_per_byte_by_run": [bits],
    "train_time_s": 1.04 * budget_s,
    "compile_time_s": 3.21, "num_layers": 4, "d_model": 128, "num_experts": experts,
    "experts_per_token": 2 if experts else 0, "capacity_factor": 1.25 if experts else None,
    "feed_forward": "mlp", "optimizer": "AdamW",
    "learning_rate": 3e-3,
    "learning_rate_trials": [
      {"learning_rate": rate, "loss": loss, "steps": 120, "train_time_s": 0.1 * budget_s}
      for rate, loss in ((1.5e-3, 2.5), (3e-3, 2.4), (6e-3, None))
    ],
    "sparse_every": 2 if experts else None, "depths": "all", "depths_share": None,
    "start": None, "parent": None, "parent_counts": None,
    "parent_time_s": None, "parent_tokens": None, "parent_flops": None,
  }  # fmt: skip


def against(moe, ratio, bits_difference, accuracy_difference):
  within = abs(ratio - 1) <= 0.05
  factors = {"time": 1.41, "tokens": 1.62, "flops": 1.33}
  return {
    "moe": moe, "step_time_ratio": ratio, "step_time_ratio_interval": [ratio - 0.01, ratio + 0.01],
    "within_tolerance": within, "whole_run_ratio": 1.0112,
    "equal_time": "established" if within else "violated",
    "outcome": "candidate better" if within else "not established",
    "notes": [] if within else [f"the step time of {moe} is not equal"],
    "bits_per_byte_difference": bits_difference, "bits_per_byte_difference_stderr": 0.0041,
    "bits_per_byte_difference_interval": [bits_difference - 0.0092, bits_difference + 0.0092],
    "bits_per_byte_detectable": 0.0126,
    "accuracy_difference": accuracy_difference, "accuracy_difference_stderr": 0.0011,
    "accuracy_difference_interval": [accuracy_difference - 0.0025, accuracy_difference + 0.0025],
    "parameters_active_ratio": 1.08, "start": None,
    "shorter_budgets": [
      {
        "budget": 0.5, "budget_s": 9.1, "bits_per_byte": 2.5, "bits_per_byte_dense": 2.6,
        "bits_per_byte_difference": -0.1, "bits_per_byte_difference_interval": [-0.2, 0.0], "whole_run_ratio": 1.01,
        "outcome": "no difference found",
      }
    ],
    "bases": [
      {
        "equal": name, "at": 17.5, "bits_per_byte_difference": bits_difference,
        "bits_per_byte_difference_interval": [bits_difference - 0.01, bits_difference + 0.01],
        "outcome": "candidate better", "factor": factor, "factor_interval": [factor - 0.2, factor + 0.2],
        "note": None,
      }
      for name, factor in factors.items()
    ],
  }  # fmt: skip


def pair(dense, moe, ratio, bits_difference, accuracy_difference, other, other_ratio):
  nearest = against(moe, ratio, bits_difference, accuracy_difference)
  return nearest | {
    "dense": dense, "best": moe, "verdict": f"{moe} is as fast as {dense} and predicts held-out text better.",
    "candidates": [nearest, against(other, other_ratio, bits_difference / 2, accuracy_difference / 2)],
    "documents": 18, "documents_effective": 8.5,
  }  # fmt: skip


COMPARISON = {
  "suite": "quickstart", "tolerance": 0.05, "complete": True,
  "members": [
    member("dense_small", "dense_small", step_time_s=0.0152, total=214_016, active=214_016, bits=2.3112,
           accuracy=0.5312, dense_step_time_s=0.0152),
    member("moe_small_8e", "dense_small", experts=8, step_time_s=0.01551, total=622_144, active=231_680, bits=2.2409,
           accuracy=0.5441, dense_step_time_s=0.0152),
    member("moe_small_16e", "dense_small", experts=16, matched=False, step_time_s=0.0184, total=1_032_448,
           active=233_216, bits=2.2571, accuracy=0.5404, dense_step_time_s=0.0152),
    member("dense_large", "dense_large", step_time_s=0.0551, total=853_760, active=853_760, bits=2.1512,
           accuracy=0.5613, dense_step_time_s=0.0551),
    member("moe_large_8e", "dense_large", experts=8, matched=False, step_time_s=0.0493, total=2_487_040,
           active=912_128, bits=2.1377, accuracy=0.5649, dense_step_time_s=0.0551),
    member("moe_large_16e", "dense_large", experts=16, step_time_s=0.0569, total=4_126_976, active=915_200, bits=2.1094,
           accuracy=0.5708, dense_step_time_s=0.0551),
  ],
  "pairs": [
    pair("dense_small", "moe_small_8e", 1.0204, -0.0703, 0.0129, "moe_small_16e", 1.2105),
    pair("dense_large", "moe_large_16e", 1.0327, -0.0418, 0.0095, "moe_large_8e", 0.8947),
  ],
  "baselines": {"unigram_bits_per_byte": 4.6172, "bigram_bits_per_byte": 3.5213, "unigram_accuracy": 0.1534,
                "bigram_accuracy": 0.2918},
  "learning_rates": "The learning rate of each member was chosen from 0.5, 1 and 2 times that of the suite.",
  "bits_per_byte_seed_stddev": 0.003, "seed_degrees_of_freedom": 6,
  "finding": "At equal step time the MoE predicts held-out text better in 2 of 2 pairs.",
  "provenance": {
    "created_utc": "2026-01-15T12:00:00Z", "command": "moejax compare quickstart", "git_revision": "0123abc",
    "platform": "cpu", "device_kind": "cpu", "device_count": 1, "python": "3.11.9",
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "corpus": {"train": ["python-standard-library"], "documents": 612, "bytes": 11_204_331},
  },
}  # fmt: skip


def metrics(of: dict, points: int = 240) -> list[dict]:
  """Training metrics of a member: a falling noisy loss; routers that even out but for one favorite expert."""
  random = np.random.default_rng(len(of["name"]) + of["num_experts"])
  steps = np.unique(np.linspace(5, of["steps"], points).astype(int))
  final = (of["bits_per_byte"] or 2.2) * 0.69
  rows = []
  for step in steps:
    done = step / of["steps"]
    loss = final + (5.5 - final) * np.exp(-9 * done**0.45) + 0.035 * random.normal()
    row = {
      "step": int(step), "loss": float(loss), "tokens_per_s": of["tokens_per_s"], "step_time_s": of["step_time_s"],
      "learning_rate": 3e-3 * (1 - done), "grad_norm": 0.6, "loss/z": 1.2, "param_norm": 40 + 3 * done,
    }  # fmt: skip
    if of["num_experts"]:
      uneven = np.exp(1.3 * np.exp(-4 * done) * np.sin(np.arange(of["num_experts"]) * 2.4))
      load = [layer / layer.sum() for layer in uneven * random.lognormal(0, 0.08, (2, of["num_experts"]))]
      row["router/load"] = [layer.tolist() for layer in load]
      for layer, shares in zip((2, 4), load, strict=True):
        row[f"router/load_max_over_mean/layer_{layer:02}"] = float(shares.max() * of["num_experts"])
        row[f"router/dropped_fraction/layer_{layer:02}"] = 0.15 * float(np.exp(-5 * done)) + 0.0123
        row[f"router/entropy/layer_{layer:02}"] = float(-(shares * np.log(shares)).sum())
      row |= {"loss/load_balance": 1.0 + 0.3 * float(np.exp(-5 * done)), "loss/router_z": 4.0 + done}
    rows.append(row)
  return rows


def write(directory: Path, comparison: dict, untrained: tuple[str, ...] = ()) -> Path:
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "comparison.json").write_text(json.dumps(comparison))
  for of in comparison["members"]:
    if of["name"] not in untrained:
      run = directory / "runs" / of["name"]
      run.mkdir(parents=True)
      lines = [json.dumps(row) for row in metrics(of)]
      # The process was killed while it wrote.
      (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1][:70]]))
  return directory


@pytest.fixture
def comparison() -> dict:
  return copy.deepcopy(COMPARISON)


@pytest.fixture
def metrics_of():
  """The function that makes a member's metrics."""
  return metrics


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
  """A comparison directory with its report, whose page lacks the library; tests only read it."""
  directory = write(tmp_path_factory.mktemp("comparison") / "quickstart", COMPARISON)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, "library", lambda: "")
    report.write_report(directory)
  return directory


@pytest.fixture
def without_library(monkeypatch):
  """Pages lack the library that draws their figures, which takes seconds to make. The tests in a browser have it."""
  monkeypatch.setattr(report, "library", lambda: "")


@pytest.fixture
def write_comparison(tmp_path):
  """Writes a comparison and its runs into a fresh directory."""

  def write_in(comparison: dict, untrained: tuple[str, ...] = ()) -> Path:
    return write(tmp_path / "comparison", comparison, untrained)

  return write_in
