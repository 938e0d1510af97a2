"""A model that is imported, trained by an adapter, and exported: merged weights in the format that it came in."""

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
from moejax.interop.weights import arrays_of, layout

RANK, DENSITY = 2, 0.1


def is_low_rank(change):
  return np.linalg.matrix_rank(change, tol=1e-5) <= RANK


def is_sparse(change):
  return np.count_nonzero(np.abs(change) > 1e-6) <= round(DENSITY * change.size)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("optimizer", "is_narrow"),
  [
    (LoRA(learning_rate=1e-2, rank=RANK), is_low_rank),
    (SpIEL(learning_rate=1e-2, density=DENSITY, interval=2, accumulated=1), is_sparse),
  ],
  ids=["LoRA", "SpIEL"],
)
def test_an_exported_run_has_the_merged_weights_also_after_a_resume(optimizer, is_narrow, tmp_path):
  folder, run = tmp_path / "hf", tmp_path / "run"
  folder.mkdir()
  model = model_of(CONFIGS["mixtral"])
  parameters = draw(on(Mesh(data=1), model))
  found = list(arrays_of(layout(model, parameters, FAMILIES["mixtral"]), parameters))
  write_folder(folder, [(n, a.shape) for n, a in found], (a for _, a in found), "F32")
  (folder / "config.json").write_text(json.dumps(CONFIGS["mixtral"]))
  (tmp_path / "held.txt").write_text("Another text. " * 50)
  (tmp_path / "text.txt").write_text("One text and another one. " * 500)
  fields = {
    "optimizer": optimizer, "data.train": (str(tmp_path / "text.txt"),), "data.tokenizer": "bytes", "mesh.data": 1,
    "data.validation": (str(tmp_path / "held.txt"),), "training.batch_size": 8, "training.steps": 4,
    "training.checkpoints.every": 2,
  }  # fmt: skip
  experiment = moejax.import_model(folder, run, load_balance=0.01, fields=fields)
  for name in ("whole", "resumed"):
    assert moejax.train(experiment, run).steps == 4
    moejax.export_model(run, tmp_path / name)
    shutil.rmtree(run / "checkpoints" / "4")
  before, whole, resumed = (open_folder(tmp_path / name) for name in ("hf", "whole", "resumed"))
  assert before.places.keys() == whole.places.keys()
  for name in before.places:
    change = whole.read(name) - before.read(name)
    np.testing.assert_array_equal(whole.read(name), resumed.read(name), err_msg=name)
    if re.search(r"(_proj|\.w[123])\.weight$", name):
      assert np.any(change) and is_narrow(change), name
    else:  # embeddings, norms and routers
      np.testing.assert_array_equal(change, 0, err_msg=name)
