"""Writes docs/results/ds_moe.json and its figures: DS-MoE against dense and sparse models of its size.

`python docs/ds_moe.py WORKDIR` trains the experiments of experiments/ds_moe_mini.py with several seeds on Python's
standard library, or on the text of `--train` and `--validation`, and evaluates the DS-MoE models with fewer experts. It
resumes. Several processes may share WORKDIR. `--figures` draws the figures again from the JSON file.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import Any

import moejax
from moejax.comparison.palette import LIGHT
from moejax.comparison.plots.drawing import draw
from moejax.comparison.plots.figure import HEIGHT, WIDTH, Spec, axis
from moejax.comparison.plots.sparsity import sparsity_plots
from moejax.comparison.sparsity_run import run_sparsity
from moejax.config.experiment import Experiment
from moejax.config.parameters import parameter_counts
from moejax.errors import UserError
from moejax.evaluation.sparsity import Sweep
from moejax.files import write_json, write_whole

RESULTS = pathlib.Path(__file__).parent / "results"
WITH, WITHOUT = "ds_mini_moe", "ds_mini_moe_no_mi"
NAMES = ("ds_mini_dense", WITH, WITHOUT, "ds_mini_smoe")
MODES = ("threshold:0.24", "threshold:0.48", "threshold:1", "threshold:1.5", "top_k:8", "top_k:6", "top_k:4", "top_k:2")
SWEEP_TOKENS = 20_000
"""Held-out tokens on which the modes are compared, all on the same."""
BETWEEN = (0.30, 0.40)
"""Fractions of active parameters, without embeddings as in the paper, in which the increase is stated."""
LABELS = {
  "ds_mini_dense": "dense",
  WITH: "DS-MoE",
  WITHOUT: "DS-MoE without mutual-information loss",
  "ds_mini_smoe": "sparse MoE, trained sparsely",
}
COLORS = {"ds_mini_dense": "#22262b", WITH: "#1f8fd8", WITHOUT: "#ee7a1c", "ds_mini_smoe": "#00a37a"}


def experiment(name: str, seed: int, text: dict[str, Any]) -> Experiment:
  """One run of the study. The seed is that of the parameters and of the order of the text."""
  found = moejax.find(name)
  assert isinstance(found, Experiment)
  return moejax.replace(found, **{"training.seed": seed, "data.seed": seed, "mesh.data": 1}, **text)


def measured(directory: pathlib.Path, name: str, seed: int, text: dict[str, Any]) -> dict[str, Any]:
  """Trains one run and, for a DS-MoE, scores the modes. Returns its line of the results."""
  planned = experiment(name, seed, text)
  run = directory / f"{name}-{seed}"
  trained = moejax.train(planned, run)
  counts = parameter_counts(planned.model)
  line = {
    "name": name,
    "seed": seed,
    "perplexity": 2.0**trained.bits_per_byte,
    "bits_per_byte": trained.bits_per_byte,
    "train_time_s": trained.summary["train_time_s"],
    "parameters": dataclasses.asdict(counts),
  }
  if planned.model.moe and planned.model.moe.router.kind == "dense":
    path = run / "sparsity.json"
    if not path.exists():
      swept = moejax.replace(planned, **{"evaluation.max_tokens": SWEEP_TOKENS})
      run_sparsity(run, swept, Sweep.of(swept.model, MODES, max_increase=0.03))
    line["sparsity"] = json.loads(path.read_text())
    for row in line["sparsity"]["modes"]:
      row["active_fraction_non_embedding"] = (row["parameters_active"] - counts.embedding) / counts.non_embedding
  return line


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
  """Mean and range over seeds of each model, and of each mode of a DS-MoE."""
  found: dict[str, Any] = {}
  for name in NAMES:
    of_seeds = [line for line in lines if line["name"] == name]
    if not of_seeds:
      continue
    found[name] = {"seeds": len(of_seeds), "perplexity": _spread([line["perplexity"] for line in of_seeds])}
    if "sparsity" in of_seeds[0]:
      found[name]["modes"] = {
        rows[0]["mode"]: {
          key: _spread([row[key] for row in rows])
          for key in ("active_fraction_non_embedding", "active_fraction", "perplexity_increase")
        }
        for rows in zip(*(line["sparsity"]["modes"] for line in of_seeds), strict=True)
      }
  return found


def _spread(values: list[float]) -> dict[str, float]:
  stdev = statistics.stdev(values) if len(values) > 1 else 0.0
  return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "stdev": stdev}


def figure(found: dict[str, Any]) -> Spec:
  """Perplexity against active parameters: mean over seeds, and the range over seeds of the models as trained."""
  points, ranges = [], []
  for name, model in found["summary"].items():
    base = model["perplexity"]
    counts = next(line["parameters"] for line in found["runs"] if line["name"] == name)
    as_trained = (counts["active"] - counts["embedding"]) / (counts["total"] - counts["embedding"])
    modes = {mode: values for mode, values in model.get("modes", {}).items() if mode.startswith("threshold:")}
    shown = [(as_trained, 0.0)] + [
      (values["active_fraction_non_embedding"]["mean"], values["perplexity_increase"]["mean"])
      for values in modes.values()
    ]
    points += [
      {"model": LABELS[name], "active": 100 * active, "perplexity": base["mean"] * (1 + increase)}
      for active, increase in shown
    ]
    ranges.append({"model": LABELS[name], "active": 100 * as_trained, "low": base["low"], "high": base["high"]})
  color = {
    "field": "model", "type": "nominal", "legend": {"title": None, "columns": 2, "labelLimit": 320},
    "scale": {"domain": [LABELS[name] for name in found["summary"]],
              "range": [COLORS[name] for name in found["summary"]]},
  }  # fmt: skip
  x = axis("active", "active parameters without embeddings (%)", padding=20)
  y = axis("perplexity", "perplexity per byte", padding=20)
  return {
    "width": WIDTH, "height": HEIGHT, "data": {"values": points}, "encoding": {"x": x, "y": y, "color": color},
    "layer": [
      {"mark": {"type": "line", "point": {"size": 50, "filled": True}, "strokeWidth": 1.6}},
      {"data": {"values": ranges}, "mark": {"type": "rule", "strokeWidth": 3},
       "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}}},
    ],
  }  # fmt: skip


def make_figures(found: dict[str, Any]) -> None:
  """Writes the figures: all models, and the modes and layers of the first DS-MoE."""
  figures = {"ds_moe": (figure(found), "Perplexity against active parameters")}
  first = next(line["sparsity"] for line in found["runs"] if line["name"] == WITH)
  figures |= {f"ds_moe_{plot.name}": (plot.spec, plot.title) for plot in sparsity_plots(first)}
  for name, (spec, title) in figures.items():
    write_whole(RESULTS / f"{name}.png", draw(spec, title, LIGHT)[1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("workdir", nargs="?", type=pathlib.Path)
  parser.add_argument("--train", nargs="+", help="training text, as data.train")
  parser.add_argument("--validation", nargs="+", help="held-out text, as data.validation")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--figures", action="store_true")
  known = parser.parse_args()
  path = RESULTS / "ds_moe.json"
  if known.figures:
    make_figures(json.loads(path.read_text()))
    return
  if known.workdir is None:
    parser.error("give WORKDIR")
  given = {"data.train": known.train, "data.validation": known.validation}
  text = {field: tuple(sources) for field, sources in given.items() if sources}
  lines = []
  for seed in range(known.seeds):
    for name in NAMES:
      try:
        lines.append(measured(known.workdir, name, seed, text))
      except UserError as error:  # such as another process that trains it
        print(f"{name}-{seed}: {error}")
        continue
      print(f"{name}-{seed}: perplexity {lines[-1]['perplexity']:.4f}", flush=True)
  RESULTS.mkdir(exist_ok=True)
  found = {"moejax": moejax.__version__, "runs": lines, "summary": summary(lines)}
  write_json(path, found)
  make_figures(found)


if __name__ == "__main__":
  main()
