"""What does not fit the devices' memory is refused before it runs, with the number that is too large."""

import dataclasses
import resource
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from training_fixtures import prepared_on

from moejax.data.tokenizers import ByteTokenizer
from moejax.errors import UserError
from moejax.evaluation.held_out import compile_scorer
from moejax.partitioning import make_partitioner
from moejax.training import memory, prepare
from moejax.training.memory import Memory, argument_bytes, check_together, free_bytes, program_memory
from moejax.training.state import make_train_spec

NO_TEXT: Any = types.SimpleNamespace(folder=None, tokenizer=ByteTokenizer())
"""A corpus that is not read."""


@pytest.fixture
def free(monkeypatch):
  """Sets the memory that the host has free."""
  return lambda size: monkeypatch.setattr(memory, "available_host_bytes", lambda: size)


def test_a_program_needs_its_arguments_and_beside_them_its_temporaries_but_not_what_it_gives_back():
  x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  added = program_memory(jax.jit(lambda x: x + 1.0).lower(x).compile())
  donated = program_memory(jax.jit(lambda x: x + 1.0, donate_argnums=0).lower(x).compile())
  assert added.arguments == donated.arguments == 4 * 2**20
  assert 4 * 2**20 <= added.more < 5 * 2**20 and donated.more < 2**20
  assert added.total == added.arguments + added.more


def test_the_arguments_of_a_step_are_what_its_placement_says(tiny_dense):
  mesh = dataclasses.replace(tiny_dense.mesh, data=8)
  one, eight = (
    argument_bytes(
      make_train_spec(tiny_dense, make_partitioner(each, tiny_dense.rules, jax.devices()[: each.data])).abstract_state
    )
    for each in (dataclasses.replace(mesh, data=1), mesh)
  )
  assert one / 8 < eight < one / 4


def test_a_state_that_cannot_fit_is_refused_before_anything_is_compiled(tiny_dense, free, monkeypatch):
  monkeypatch.setattr(prepare, "make_train_step", lambda spec: pytest.fail("it is lowered"))
  free(2**14)
  with pytest.raises(UserError) as caught:
    prepared_on(tiny_dense, NO_TEXT)
  line = str(caught.value)
  assert line.startswith("the train step of dense needs ") and "\n" not in line
  assert (
    "cpu has 0.0 MiB free" in line and "lower training.batch_size=8, raise training.gradient_accumulation=1" in line
  )
  assert "set model.remat=none to layer_inputs" in line
  smallest = dataclasses.replace(tiny_dense, model=dataclasses.replace(tiny_dense.model, remat="layer_inputs"))
  with pytest.raises(UserError) as caught:
    prepared_on(smallest, NO_TEXT)
  assert "model.remat" not in str(caught.value)


def test_temporaries_that_cannot_fit_are_refused_before_they_are_allocated(tiny_dense, free):
  training = dataclasses.replace(tiny_dense.training, batch_size=2**20)
  huge = dataclasses.replace(tiny_dense, training=training, model=dataclasses.replace(tiny_dense.model, num_layers=1))
  free(64 * 2**30)
  with pytest.raises(
    UserError, match=r"needs .* GiB while it runs\), but cpu has 8\.0 GiB free; lower training\.batch_s"
  ):
    prepared_on(huge, NO_TEXT)


def test_an_evaluation_that_cannot_fit_is_refused_before_training(tiny_dense, free):
  free(2**14)
  spec = make_train_spec(tiny_dense, make_partitioner(tiny_dense.mesh, tiny_dense.rules))
  with pytest.raises(UserError, match=r"the evaluation of dense needs .*; lower evaluation\.batch_size=8, or use more"):
    compile_scorer(spec)


def test_members_that_fit_alone_must_fit_together(tiny_dense, free):
  partitioner = make_partitioner(tiny_dense.mesh, tiny_dense.rules)
  free(8 * 100)
  check_together([Memory(40, 20), Memory(40, 10)], partitioner)
  with pytest.raises(UserError, match="measuring 3 members in turn needs"):
    check_together([Memory(40, 20), Memory(40, 10), Memory(1, 1)], partitioner)


def test_devices_of_the_cpu_share_what_the_host_has_and_what_says_nothing_is_not_checked(tiny_dense, free):
  free(800)
  assert free_bytes(make_partitioner(tiny_dense.mesh, tiny_dense.rules)) == 100


def test_the_host_has_what_is_available_within_its_control_groups_and_limits(tmp_path, monkeypatch):
  available = memory.available_host_bytes()
  assert 0 < available < 2**50
  (tmp_path / "memory.max").write_text("5000000\n")
  (tmp_path / "memory.current").write_text("3000000\n")
  (tmp_path / "memory.stat").write_text("anon 1\nactive_file 7\ninactive_file 1000000\n")
  assert memory._left(tmp_path, "memory.max", "memory.current") == [3_000_000]
  (tmp_path / "memory.max").write_text("max\n")
  assert memory._left(tmp_path, "memory.max", "memory.current") == []
  assert memory._left(tmp_path / "gone", "memory.max", "memory.current") == []
  monkeypatch.setattr(resource, "getrlimit", lambda which: (1, 1))
  assert memory.available_host_bytes() == 0
