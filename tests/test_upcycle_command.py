"""`moejax upcycle` with distillation, from a dense run to text of the sparse one."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "training"))
from training_fixtures import spec_of, tiny

import moejax
from moejax import cli
from moejax.config import Data, Mesh
from moejax.training.checkpoint import Checkpointer
from moejax.training.run_directory import claim


@pytest.mark.slow
def test_a_distilled_run_generates_text_and_trains_further_and_its_parent_is_unchanged(tmp_path, capsys):
  text = tmp_path / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"Document {i} counts to {i + 1}."}) + "\n" for i in range(200)))
  data = Data(sequence_length=32, train=(str(text),), validation_fraction=0.2)
  dense = tiny(False, mesh=Mesh(data=1), data=data)
  parent, child = tmp_path / "dense", tmp_path / "sparse"
  claim(parent, dense, 6)
  checkpointer = Checkpointer(parent / "checkpoints", dense.training.checkpoints)
  checkpointer.save(spec_of(dense).init_state(5), 3, {"data": {}, "train_time_s": 1.0})
  checkpointer.close()
  before = moejax.generate(parent, ["Document "], max_tokens=4)
  options = "--experts 1 --granularity 4 --active 2 --distill-tokens 512 --load-balance 0.01 --training.steps 2"
  with pytest.raises(SystemExit) as stop:
    cli.main(["upcycle", str(parent), str(child), *options.split()])
  assert stop.value.code == 0, capsys.readouterr().err
  assert len(moejax.generate(child, ["Document "], max_tokens=4)) == 1
  experiment = moejax.find(child / "experiment.json")
  assert (experiment.model.moe.num_experts, experiment.model.moe.experts_per_token) == (4, 2)
  trained = moejax.train(experiment, child)
  assert trained.steps == 2 and math.isfinite(trained.bits_per_byte)
  assert moejax.generate(parent, ["Document "], max_tokens=4) == before
