"""What an import asks for and refuses before it writes anything, and what an export refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_models import CONFIGS, draw, on

import moejax
from moejax.config import Mesh
from moejax.errors import UserError
from moejax.interop.configs import model_of
from moejax.interop.families import FAMILIES
from moejax.interop.safetensors import open_folder, write_folder
from moejax.interop.weights import arrays_of, layout


def folder_of(name, folder):
  """A model's folder with random weights, and a tokenizer's file that is only copied."""
  folder.mkdir()
  model = model_of(CONFIGS[name])
  parameters = draw(on(Mesh(data=1), model))
  found = list(arrays_of(layout(model, parameters, FAMILIES[name]), parameters))
  write_folder(folder, [(n, a.shape) for n, a in found], (a for _, a in found), "F32")
  (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
  return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
  return folder_of("mixtral", tmp_path_factory.mktemp("mixtral") / "hf")


@pytest.mark.slow
def test_a_run_that_was_imported_is_exported_bit_for_bit_with_its_tokenizer(sparse, tmp_path):
  (sparse / "merges.txt").write_text("a b")
  (tmp_path / "run" / "tokenizer").mkdir(parents=True)
  (tmp_path / "run" / "tokenizer" / "vocab.json").write_text("{}")  # of an import that failed
  experiment = moejax.import_model(sparse, tmp_path / "run", load_balance=0.02, fields={"mesh.expert": 4})
  assert experiment.training.losses.load_balance == 0.02 and experiment.name == "run"
  assert moejax.find(tmp_path / "run" / "experiment.json").model == experiment.model
  config = moejax.export_model(tmp_path / "run", tmp_path / "back")
  assert config["architectures"] == ["MixtralForCausalLM"] and config["max_position_embeddings"] == 32
  assert (tmp_path / "back" / "merges.txt").read_text() == "a b" and not (tmp_path / "back" / "vocab.json").exists()
  theirs, ours = open_folder(sparse), open_folder(tmp_path / "back")
  assert theirs.places.keys() == ours.places.keys()
  for name in ours.places:
    np.testing.assert_array_equal(theirs.read(name), ours.read(name))
  for name in ("model.safetensors", "config.json", "merges.txt"):
    with pytest.raises(UserError, match=f"contains {name}; choose another folder"):
      moejax.export_model(tmp_path / "run", tmp_path / "back")
    (tmp_path / "back" / name).unlink()
  with pytest.raises(UserError, match="holds a run; choose another directory"):
    moejax.import_model(sparse, tmp_path / "run", load_balance=0.02)
  with pytest.raises(UserError, match="holds a model in Hugging Face format; choose another directory for the run"):
    moejax.import_model(sparse, sparse, load_balance=0.02)
  with pytest.raises(UserError, match=r"contains experiment\.json; choose another folder"):
    moejax.export_model(tmp_path / "run", tmp_path / "run")
  with pytest.raises(UserError, match="dtype='int8' is not one of float32"):
    moejax.export_model(tmp_path / "run", tmp_path / "other", dtype="int8")


@pytest.mark.slow
def test_the_text_model_of_a_model_with_images_is_imported_alone(tmp_path):
  text = folder_of("llama4_text", tmp_path / "text")
  tensors = [(name, open_folder(text).read(name)) for name in open_folder(text).places]
  whole = tmp_path / "whole"
  whole.mkdir()
  named = [(f"language_model.{name}", array) for name, array in tensors] + [("vision_model.w", np.ones((2, 3)))]
  write_folder(whole, [(name, array.shape) for name, array in named], (array for _, array in named), "F32")
  config = {"model_type": "llama4", "vision_config": {"hidden_size": 3}, "text_config": CONFIGS["llama4_text"]}
  (whole / "config.json").write_text(json.dumps(config))
  experiment = moejax.import_model(whole, tmp_path / "run", load_balance=0.0)
  assert experiment.model == model_of(CONFIGS["llama4_text"])
  moejax.export_model(tmp_path / "run", tmp_path / "back")
  back = open_folder(tmp_path / "back")
  assert [*back.places] == [name for name, _ in tensors]
  for name, array in tensors:
    np.testing.assert_array_equal(back.read(name), array)


def test_a_model_with_images_is_refused_for_what_its_text_model_is_refused_for(tmp_path):
  for config, message in (
    ({"text_config": CONFIGS["llama4_text"], "quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    ({"text_config": 3}, "has no object text_config"),
    ({}, "has no object text_config"),
  ):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", **config}))
    with pytest.raises(UserError, match=message):
      moejax.import_model(tmp_path, tmp_path / "run", load_balance=0.0)


def test_what_only_training_needs_is_asked_for(sparse, tmp_path):
  (sparse / "config.json").write_text(json.dumps(CONFIGS["mixtral"] | {"router_aux_loss_coef": 0.02}))
  with pytest.raises(UserError, match=r"set load_balance=X, .* \(config\.json has router_aux_loss_coef=0\.02\)"):
    moejax.import_model(sparse, tmp_path / "run")
  dense = tmp_path / "dense"
  dense.mkdir()
  (dense / "config.json").write_text(json.dumps(CONFIGS["llama"]))
  with pytest.raises(UserError, match="load_balance=0 has no effect"):
    moejax.import_model(dense, tmp_path / "run", load_balance=0.0)
  with pytest.raises(UserError, match=r"dense has no \.safetensors file"):
    moejax.import_model(dense, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model.moe.experts_per_token": 3}, r"model\.moe\.experts_per_token=3 differs from config\.json.* has 2"),
    ({"model.rope_theta": 5.0}, r"model\.rope_theta=5\.0 differs from config"),
    ({"data.tokenizer": "none.json"}, "cannot be read"),
    ({"mesh.data": 3}, "mesh"),
  ],
  ids=str,
)
def test_a_field_that_config_json_decides_cannot_be_changed(sparse, tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    moejax.import_model(sparse, tmp_path / "run", load_balance=0.0, fields=fields)


def test_a_sequence_length_of_0_is_not_that_of_the_model(sparse, tmp_path):
  with pytest.raises(UserError, match=r"data\.sequence_length=0 must be above 0"):
    moejax.import_model(sparse, tmp_path / "run", load_balance=0.0, sequence_length=0)


def test_how_a_model_is_computed_may_be_changed(sparse, tmp_path):
  fields = {"model.layers": "unrolled", "model.moe.dispatch": "einsum", "model.remat": "dots"}
  experiment = moejax.import_model(sparse, tmp_path / "run", load_balance=0.0, sequence_length=16, fields=fields)
  assert experiment.model.layers == "unrolled" and experiment.data.sequence_length == 16
