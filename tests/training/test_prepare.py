"""What is checked before anything is compiled."""

import dataclasses

import pytest

from moejax.config import Mesh
from moejax.data.tokenizers import ByteTokenizer
from moejax.errors import UserError
from moejax.training.prepare import on_devices


@pytest.mark.parametrize(("mesh", "padded"), [(Mesh(), 384), (Mesh(data=2, model=4), 512)])
def test_a_vocabulary_smaller_than_the_tokenizers_names_one_that_fits_and_divides(tiny_dense, mesh, padded):
  small = dataclasses.replace(tiny_dense, model=dataclasses.replace(tiny_dense.model, vocab_size=256, num_kv_heads=4))
  with pytest.raises(UserError) as caught:
    on_devices([dataclasses.replace(small, mesh=mesh)], ByteTokenizer())
  assert str(caught.value) == (
    "model.vocab_size=256 is less than the 259 tokens of data.tokenizer='bytes'; use at least 259, "
    f"preferably {padded}, a multiple of 128 that is divisible by the mesh"
  )
  just = dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=259))
  assert on_devices([just], ByteTokenizer())
  enough = dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=padded))
  (placed,) = on_devices([dataclasses.replace(enough, mesh=mesh)], ByteTokenizer())
  assert placed.experiment.model.vocab_size == padded


def test_experiments_of_one_shape_and_the_same_rules_share_their_mesh_however_it_is_written(tiny_dense, tiny_moe):
  rules = (*tiny_dense.rules, ("embed", ()))
  experiments = [
    dataclasses.replace(experiment, mesh=mesh, rules=of)
    for experiment, mesh, of in (
      (tiny_dense, Mesh(), tiny_dense.rules),
      (tiny_moe, Mesh(data=8), tiny_dense.rules),
      (tiny_dense, Mesh(), rules),
      (tiny_dense, Mesh(data=2), tiny_dense.rules),
    )
  ]
  placed = on_devices(experiments, ByteTokenizer())
  assert placed[0].partitioner is placed[1].partitioner
  assert [each.experiment.mesh.data for each in placed] == [8, 8, 8, 2]
  assert len({id(each.partitioner) for each in placed}) == 3
