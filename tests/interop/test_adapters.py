"""A model that is imported, trained by an adapter, and exported: merged weights in the format that it came in."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_models import CONFIGS, draw, on

import moejax
from moejax.config import LoRA, Mesh, SpIEL
from moejax.interop.configs import model_of
from moejax.interop.families import FAMILIES
from moejax.interop.safetensors import open_folder, write_folder
from moejax.interop.upcycle import Upcycling, upcycle, upcycled_experiment
from moejax.interop.weights import arrays_of, layout
from moejax.training.run_directory import read_experiment

RANK, DENSITY = 2, 0.1


def is_low_rank(change):
  return np.linalg.matrix_rank(change, tol=1e-5) <= RANK


def is_sparse(change):
  return np.count_nonzero(np.abs(change) > 1e-6) <= round(DENSITY * change.size)


def imported(family, directory, fields):
  """A run with random weights of a family, and its experiment."""
  folder, model = directory / "hf", model_of(CONFIGS[family])
  folder.mkdir()
  parameters = draw(on(Mesh(data=1), model))
  found = list(arrays_of(layout(model, parameters, FAMILIES[family]), parameters))
  write_folder(folder, [(n, a.shape) for n, a in found], (a for _, a in found), "F32")
  (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
  load_balance = 0.01 if model.moe else None
  return directory / "run", moejax.import_model(folder, directory / "run", load_balance=load_balance, fields=fields)


def upcycled(dense, optimizer, directory):
  """A run with four copies of each feed-forward layer of a dense run, and its experiment."""
  how = Upcycling(experts=4)
  experiment = upcycled_experiment(read_experiment(dense), directory, how, 0.01)
  experiment = dataclasses.replace(experiment, optimizer=optimizer, mesh=Mesh(data=1))
  upcycle(dense, directory, experiment, how)
  return directory, experiment


@pytest.mark.slow
@pytest.mark.parametrize(
  ("optimizer", "is_narrow"),
  [
    (LoRA(learning_rate=1e-2, rank=RANK), is_low_rank),
    (LoRA(learning_rate=1e-2, rank=RANK, routers=True), is_low_rank),
    (SpIEL(learning_rate=1e-2, density=DENSITY, interval=2, accumulated=1), is_sparse),
  ],
  ids=["LoRA", "mixture of LoRA experts", "SpIEL"],
)
def test_an_exported_run_has_the_merged_weights_also_after_a_resume(optimizer, is_narrow, tmp_path):
  (tmp_path / "held.txt").write_text("Another text. " * 50)
  (tmp_path / "text.txt").write_text("One text and another one. " * 500)
  fields = {
    "data.train": (str(tmp_path / "text.txt"),), "data.validation": (str(tmp_path / "held.txt"),), "mesh.data": 1,
    "data.tokenizer": "bytes", "training.batch_size": 8, "training.steps": 4, "training.checkpoints.every": 2,
  }  # fmt: skip
  has_routers = isinstance(optimizer, LoRA) and optimizer.routers
  if has_routers:
    dense, _ = imported("llama", tmp_path, fields)
    run, experiment = upcycled(dense, optimizer, tmp_path / "sparse")
  else:
    run, experiment = imported("mixtral", tmp_path, fields | {"optimizer": optimizer})
  moejax.export_model(run, tmp_path / "before")
  for name in ("whole", "resumed"):
    assert moejax.train(experiment, run).steps == 4
    assert moejax.export_model(run, tmp_path / name)["architectures"] == ["MixtralForCausalLM"]
    shutil.rmtree(run / "checkpoints" / "4")
  before, whole, resumed = (open_folder(tmp_path / name) for name in ("before", "whole", "resumed"))
  for name in before.places:
    change = whole.read(name) - before.read(name)
    np.testing.assert_array_equal(whole.read(name), resumed.read(name), err_msg=name)
    if re.search(r"(_proj|\.w[123])\.weight$", name):
      assert np.any(change) and is_narrow(change), name
    else:  # embeddings, norms and routers
      assert np.any(change) == (has_routers and name.endswith("gate.weight")), name
