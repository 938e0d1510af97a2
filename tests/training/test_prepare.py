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
    f"best {padded}: a multiple of 128 that the mesh divides"
  )
  enough = dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=padded))
  (placed,) = on_devices([dataclasses.replace(enough, mesh=mesh)], ByteTokenizer())
  assert placed.experiment.model.vocab_size == padded
