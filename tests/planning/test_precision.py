"""In the program that libtpu compiles: the type in which devices sum gradients, and the router's precision."""

import functools
import importlib.util

import pytest

from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, MoE, Training
from moejax.planning.compile import compile_step
from moejax.planning.program import parse
from moejax.planning.topology import parse_topology, prepare_environment
from moejax.progress import SILENT

pytestmark = [
  pytest.mark.nightly,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs pip install moejax[tpu]"
  ),
]
TOPOLOGY = parse_topology("v5e:2x2")


@functools.cache
def instructions(dispatch: str, gradient_dtype: str):
  """All of the train step of a small sparse model, whose batch and weights are in four shards over data."""
  moe = MoE(num_experts=8, experts_per_token=2, d_ff=384, every=2, group_size=128, dispatch=dispatch)
  experiment = Experiment(
    name="small",
    model=Model(
      num_layers=2, d_model=512, num_heads=4, num_kv_heads=2, head_dim=128, d_ff=1024, vocab_size=2048, moe=moe,
      gradient_dtype=gradient_dtype, remat="attention",
    ),
    data=Data(sequence_length=256), training=Training(batch_size=16), optimizer=AdamW(learning_rate=1e-3),
    evaluation=Evaluation(batch_size=16), mesh=Mesh(data=4),
  )  # fmt: skip
  prepare_environment(TOPOLOGY)
  program = parse(compile_step(experiment, TOPOLOGY, SILENT).text)
  return [found for computation in program.computations.values() for found in computation.instructions]


def summed(dispatch: str, gradient_dtype: str) -> set[str]:
  """Types in which devices sum arrays as large as a shard of a layer's smallest matrix: gradients, on this mesh."""
  smallest = 512 * 256 // 4
  return {
    shape.dtype
    for found in instructions(dispatch, gradient_dtype)
    if found.opcode.removesuffix("-start") in ("all-reduce", "reduce-scatter")
    for shape in found.shapes
    if shape.elements >= smallest
  }


@pytest.mark.parametrize("dispatch", ["einsum", "grouped"])
def test_devices_sum_gradients_of_matrices_in_the_type_that_is_asked_for(dispatch):
  assert summed(dispatch, "float32") == {"f32"}
  assert "bf16" in summed(dispatch, "compute")


def test_the_router_multiplies_float32_at_full_precision():
  products = [
    found
    for found in instructions("einsum", "float32")
    if found.opcode in ("convolution", "dot") and "/router/" in found.op_name
  ]
  assert products and all("operand_precision={highest,highest}" in found.attributes for found in products)
