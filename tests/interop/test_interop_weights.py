"""Every parameter of ours is written as its tensors and comes back bit for bit, on any mesh; nothing is left over."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_models import CONFIGS, EIGHT, draw, on

from moejax.config import Mesh
from moejax.errors import UserError
from moejax.interop.configs import model_of, multi_token_modules
from moejax.interop.families import FAMILIES, OF_MODEL
from moejax.interop.safetensors import open_folder, write_folder
from moejax.interop.weights import arrays_of, layout, read_parameters


def write(folder, model, parameters, family, dtype="F32", drop=(), add=()):
  """The model's files, without some tensors and with others."""
  folder.mkdir()
  found = list(arrays_of(layout(model, parameters, family), parameters))
  found = [(name, array) for name, array in found if name not in drop] + list(add)
  write_folder(folder, [(n, a.shape) for n, a in found], (a for _, a in found), dtype, bytes_per_file=5000)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.slow) for name in CONFIGS]
)
@pytest.mark.parametrize("layers", ["scanned", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_parameters_that_are_written_are_read_as_they_were_on_another_mesh(name, layers, tmp_path):
  family = FAMILIES[CONFIGS[name]["model_type"]]
  model = dataclasses.replace(model_of(CONFIGS[name]), layers=layers)
  parameters = draw(on(Mesh(data=1), model))
  write(tmp_path / "hf", model, parameters, family)
  files, target = open_folder(tmp_path / "hf"), on(EIGHT, model)
  assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
  read = read_parameters(files, target, family)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), jax.device_get(parameters))
  assert jax.tree.map(lambda leaf: leaf.sharding, read) == target.shardings
  # Their matrices have the outputs first.
  if not family.latent:
    assert files.shape("model.layers.3.self_attn.k_proj.weight") == (2 * model.head_dim, 16)
    assert files.shape("model.layers.0.self_attn.o_proj.weight") == (16, 4 * model.head_dim)


def test_every_parameter_of_a_table_is_one_that_some_model_has():
  used = set()
  for config in CONFIGS.values():
    for path in layout(model_of(config), on(Mesh(data=1), model_of(config)).parameters, FAMILIES[config["model_type"]]):
      used.add(".".join(map(str, path[{"layers": 3, "leading": 2}.get(path[0], 0) :])))
  assert used == {ours for family in FAMILIES.values() for ours in family.tensors} | OF_MODEL.keys()


def test_bfloat16_is_read_and_written_without_another_rounding(tmp_path):
  family, model = FAMILIES["qwen3"], model_of(CONFIGS["qwen3"])
  target = on(Mesh(data=1), model)
  write(tmp_path / "first", model, draw(target), family, "BF16")
  read = read_parameters(open_folder(tmp_path / "first"), target, family)
  write(tmp_path / "second", model, read, family, "BF16")
  first, second = (open_folder(tmp_path / name) for name in ("first", "second"))
  assert first.places.keys() == second.places.keys()
  for name in first.places:
    np.testing.assert_array_equal(first.read(name).view(np.uint16), second.read(name).view(np.uint16))


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
  ("drop", "add", "message"),
  [
    ([EXPERT], [], f"the files lack {EXPERT}"),
    ([], [("model.layers.1.mlp.experts.4.up_proj.weight", np.ones((8, 16)))], "have model.layers.1.mlp.experts.4.up_"),
    ([], [("model.layers.0.mlp.gate.weight", np.ones((4, 16)))], "have model.layers.0.mlp.gate.weight, which"),
    ([EXPERT], [(EXPERT, np.ones((16, 8)))], rf"{EXPERT} has the shape \(16, 8\), but the model needs \(8, 16\)"),
    ([], [("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(3))], None),
  ],
  ids=["an expert too few", "an expert too many", "a router too many", "another shape", "not a weight"],
)
def test_every_tensor_is_used_once_or_the_import_ends_with_its_name(drop, add, message, tmp_path):
  family, model = FAMILIES["qwen3_moe"], model_of(CONFIGS["qwen3_moe"])
  target = on(Mesh(data=1), model)
  write(tmp_path / "hf", model, draw(target), family, drop=drop, add=add)
  if message is None:
    read_parameters(open_folder(tmp_path / "hf"), target, family)
  else:
    with pytest.raises(UserError, match=message):
      read_parameters(open_folder(tmp_path / "hf"), target, family)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_projection_beside_a_tied_embedding_must_be_equal_to_it(same, tmp_path):
  family, model = FAMILIES["qwen3"], model_of(CONFIGS["qwen3"])
  target = on(Mesh(data=1), model)
  parameters = draw(target)
  embedding = np.asarray(parameters["embedding_VD"]) + (not same)
  write(tmp_path / "hf", model, parameters, family, add=[(OUTPUT, embedding)])
  if same:
    read_parameters(open_folder(tmp_path / "hf"), target, family)
  else:
    with pytest.raises(UserError, match=f"the files have {OUTPUT}, which the model of config.json does not use"):
      read_parameters(open_folder(tmp_path / "hf"), target, family)


def test_modules_for_multi_token_prediction_are_left_out_by_name(tmp_path):
  family, config = FAMILIES["deepseek_v3"], CONFIGS["deepseek_v3"] | {"num_nextn_predict_layers": 2}
  model, after = model_of(config), config["num_hidden_layers"]
  target = on(Mesh(data=1), model)
  parameters = draw(target)
  added = [
    (f"model.layers.{after + i}.{name}.weight", np.ones((4, 8))) for i in (0, 1) for name in ("eh_proj", "enorm")
  ]
  write(tmp_path / "hf", model, parameters, family, add=added)
  files = open_folder(tmp_path / "hf")
  with pytest.raises(UserError, match=rf"have model\.layers\.{after}\.eh_proj\.weight, .*does not use"):
    read_parameters(files, target, family)
  read = read_parameters(files, target, family, multi_token_modules(config))
  jax.tree.map(np.testing.assert_array_equal, read, parameters)
  assert multi_token_modules(config | {"num_nextn_predict_layers": None}) == ()


def test_a_parameter_without_a_tensor_is_named():
  model = model_of(CONFIGS["qwen3"])
  with pytest.raises(UserError, match=r"mixtral has no tensor for the parameter .*feed_forward\.w_gate_DF"):
    layout(model, on(Mesh(data=1), model).parameters, FAMILIES["mixtral"])
