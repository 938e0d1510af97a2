"""A tiny random model of each family: transformers and moejax compute the same, in both directions, and it trains."""
# ruff: noqa: E402  # what is not installed is skipped before it is imported

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
from family_models import CONFIGS

import moejax
from moejax.inference.generate import Generator
from moejax.inference.load import load_run
from moejax.interop.families import FAMILIES
from moejax.interop.safetensors import open_folder

pytestmark = pytest.mark.nightly  # PyTorch alone is a large download

TOKENS_BT = np.random.default_rng(0).integers(0, 256, (4, 8)).astype(np.int32)
EIGHT = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2}


@pytest.fixture(
  scope="module",
  params=[name for name, config in CONFIGS.items() if config["model_type"] in transformers.CONFIG_MAPPING],
)
def models(request, tmp_path_factory):
  """transformers' model, its folder, and the run that was imported from it to eight devices."""
  tmp = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
  kind = CONFIGS[request.param]["model_type"]
  fields = {name: value for name, value in CONFIGS[request.param].items() if name != "model_type"}
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields)).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.copy_(0.3 * torch.randn_like(weight) + (weight.ndim == 1))
  model.save_pretrained(tmp / "theirs")
  sparse = bool(FAMILIES[kind].moe)
  text = tmp / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"Document {i} counts to {i + 1}."}) + "\n" for i in range(400)))
  moejax.import_model(
    tmp / "theirs", tmp / "run", load_balance=0.01 if sparse else None,
    fields={**EIGHT, "data.train": (str(text),), "training.batch_size": 4, "training.steps": 20,
            "optimizer.learning_rate": 3e-3, "evaluation.batch_size": 4},
  )  # fmt: skip
  return model, tmp


def logits_of(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS_BT.astype(np.int64))).logits.numpy()


def test_an_imported_model_has_the_logits_of_transformers(models):
  model, tmp = models
  loaded = load_run(tmp / "run")
  assert loaded.step == 0 and loaded.model.partitioner.mesh.size == 8

  @jax.jit
  def forward(parameters):
    transformer = loaded.model.module(parameters)
    positions_BT = jax.numpy.broadcast_to(jax.numpy.arange(8), TOKENS_BT.shape)
    x_BTD, _ = transformer(TOKENS_BT, np.ones_like(TOKENS_BT), positions_BT)
    return transformer.logits(x_BTD.reshape(-1, x_BTD.shape[-1]))

  expected = logits_of(model)
  got = np.asarray(forward(loaded.parameters)).reshape(expected.shape)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(expected).max() > 1


def test_greedy_continuations_are_equal_token_for_token(models):
  model, tmp = models
  loaded, prompts = load_run(tmp / "run"), [TOKENS_BT[0].tolist(), TOKENS_BT[1, :3].tolist()]
  generator = Generator(loaded.model, 4, 264)
  ours = dict(generator.generate(loaded.parameters, prompts, [lambda ids: False] * 2, max_new=8))
  model.generation_config.eos_token_id = None
  for i, prompt in enumerate(prompts):
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert theirs[0, len(prompt) :].tolist() == ours[i]


def test_an_export_has_the_same_bits_and_transformers_reads_it(models):
  model, tmp = models
  config = moejax.export_model(tmp / "run", tmp / "back")
  assert config == json.loads((tmp / "back" / "config.json").read_text())
  theirs, ours = open_folder(tmp / "theirs"), open_folder(tmp / "back")
  assert set(theirs.places) == set(ours.places)
  for name in ours.places:
    np.testing.assert_array_equal(theirs.read(name), ours.read(name))
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp / "back").eval()
  np.testing.assert_array_equal(logits_of(back), logits_of(model))


def test_an_imported_model_is_trained_further_from_its_weights(models):
  _, tmp = models
  before = load_run(tmp / "run")
  trained = moejax.train(moejax.find(tmp / "run" / "experiment.json"), tmp / "run")
  assert trained.steps == 20
  records = [json.loads(line) for line in (tmp / "run" / "metrics.jsonl").read_text().splitlines()]
  losses = [record["loss"] for record in records if "loss" in record]
  assert losses[-1] < losses[0] - 0.5
  after = load_run(tmp / "run")
  assert after.step == 20
  moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), before.parameters, after.parameters)
  assert 0 < max(jax.tree.leaves(moved)) < 0.1  # from where the import left them
