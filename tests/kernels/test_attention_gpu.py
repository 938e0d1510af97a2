"""Attention on GPU, in Pallas' interpreter, against plain attention in float32; and compiled without a GPU."""

import collections
import functools
import importlib.util
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.attention import CONTEXT, attention, attention_for, fused_attention_gpu
from moejax.kernels.attention_gpu import block_width
from moejax.models.attend import _platform

TOLERANCE = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1e-2}
"""Of the norm of a difference, relative to the norm. bfloat16 has 8 bits of precision."""

CANCELS = 3
"""Factor of the limit of the gradient of a sink, which is a sum over all positions whose terms cancel."""


def operands(B, T, N, K, H, J, dtype="float32", seed=0):
  """Queries, keys, values, sinks, and numbers of documents of random lengths. Each sequence ends in padding."""
  random = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, J)
  q, k, v = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
  segments_BT = 1 + np.cumsum(random.random((B, T)) < 4 / T, axis=1)
  segments_BT[:, T - T // 8 :] = 0
  return (q, k, v, jnp.asarray(random.normal(size=N), jnp.float32)), jnp.asarray(segments_BT, jnp.int32)


def result_and_gradients(attend, arguments, segments_BT, window, sinks):
  """The output, and the gradients of queries, keys, values and, if there are any, sinks."""
  q, _, v, _ = arguments
  weight = jnp.asarray(np.random.default_rng(1).normal(size=(*q.shape[:3], v.shape[-1])), jnp.float32)

  def weighted(q, k, v, sinks_N):
    out_BTNH = attend(q, k, v, segments_BT, window, sinks_N if sinks else None)
    return jnp.sum(out_BTNH.astype(jnp.float32) * weight), out_BTNH

  (_, out), gradients = jax.value_and_grad(weighted, (0, 1, 2, 3) if sinks else (0, 1, 2), has_aux=True)(*arguments)
  return out, *gradients


def assert_equals_plain(arguments, segments_BT, window=None, sinks=False):
  run = jax.jit(result_and_gradients, static_argnums=(0, 3, 4))
  found = run(functools.partial(fused_attention_gpu, interpret=True), arguments, segments_BT, window, sinks)
  exact = tuple(x.astype(jnp.float32) for x in arguments)
  expected = run(attention, exact, segments_BT, window, sinks)
  norms = [np.linalg.norm(x) for x in expected]
  for name, mine, other, norm, like in zip(
    ("out", "q", "k", "v", "sinks"), found, expected, norms, (arguments[0], *arguments), strict=False
  ):
    assert mine.dtype == like.dtype and mine.shape == other.shape, name
    # The gradients of queries and keys vanish where a document has one position: those of values do not.
    size = max(norm, norms[3]) if name in "qk" else norm * (CANCELS if name == "sinks" else 1)
    difference = np.linalg.norm(np.asarray(mine, np.float64) - np.asarray(other)) / size
    assert difference < TOLERANCE[arguments[0].dtype.name], name  # NaN is not


def test_the_kernels_equal_plain_attention_with_grouped_heads_documents_a_window_sinks_and_padding():
  """192 positions are one and a half blocks of the forward pass and three of the backward pass."""
  arguments, segments_BT = operands(1, 192, 2, 1, 16, 16)
  assert_equals_plain(arguments, segments_BT, window=40, sinks=True)


SHAPES = [
  (256, 4, 2, 32, 32, None, False),
  (192, 6, 1, 64, 64, 70, False),
  (300, 2, 2, 80, 80, None, True),
  (320, 2, 1, 128, 128, 128, True),
  (160, 2, 2, 192, 128, None, False),  # latent attention
  (200, 2, 1, 24, 48, 1, True),
  (72, 2, 1, 8, 6, 30, True),
  (136, 2, 1, 256, 256, 100, True),
]
"""T, N, K, H, J, window and whether there are sinks."""


@pytest.mark.parametrize(
  ("T", "N", "K", "H", "J", "window", "sinks", "dtype"),
  [
    # The blocks of float16 are those of bfloat16, which has as many bytes: one shape of it is in the gate.
    pytest.param(*shape, dtype, marks=pytest.mark.nightly if dtype == "float16" and i else pytest.mark.slow)
    for i, shape in enumerate(SHAPES)
    for dtype in ("float32", "float16", "bfloat16")
  ],
)
def test_any_head_dimension_type_window_and_length_equals_plain_attention(T, N, K, H, J, window, sinks, dtype):
  if H == 256 and dtype == "float32":  # too wide for the kernels
    q_BTNH = jnp.zeros((1, T, N, H))
    assert attention_for("gpu", q_BTNH, q_BTNH) is attention
    return
  assert_equals_plain(*operands(2, T, N, K, H, J, dtype), window, sinks)


@pytest.mark.parametrize(("head_dim", "width"), [(1, 16), (8, 16), (16, 16), (17, 32), (80, 128), (192, 256)])
def test_blocks_have_the_columns_of_an_instruction_at_least(head_dim, width):
  """The interpreter does not show that Triton sums products of fewer columns several times."""
  assert block_width(head_dim) == width


@pytest.mark.parametrize(
  ("capability", "platform"), [("7.5", "older gpu"), ("8.0", "gpu"), ("12.0", "gpu"), ("gfx942", "older gpu")]
)
def test_gpus_without_triton_have_plain_attention(capability, platform):
  device = types.SimpleNamespace(compute_capability=capability)
  found = _platform(types.SimpleNamespace(platform="gpu", device=device))
  q_BTNH = jnp.zeros((1, 16, 1, 16))
  assert found == platform
  assert attention_for(found, q_BTNH, q_BTNH) is (fused_attention_gpu if platform == "gpu" else attention)


@pytest.mark.slow
def test_random_shapes_equal_plain_attention():
  random = np.random.default_rng(7)
  for seed in range(12):
    T, K, G, H, J = (int(random.integers(1, most)) for most in (280, 4, 4, 65, 65))
    window = None if seed % 3 == 0 else int(random.integers(1, T + 20))
    arguments, segments_BT = operands(int(random.integers(1, 3)), T, K * G, K, H, J, seed=seed)
    assert_equals_plain(arguments, segments_BT, window, sinks=bool(seed % 2))


@pytest.mark.slow
def test_documents_whose_numbers_repeat_or_fall_are_those_with_the_same_number():
  arguments, _ = operands(1, 192, 1, 1, 16, 16)
  assert_equals_plain(arguments, jnp.asarray(np.repeat([5, 2, 5, 0, 2, 9], 32), jnp.int32)[None])


def kernels_read(jaxpr):
  """Names of the kernels of which a result is read. JAX keeps calls of others, which XLA leaves out."""
  read = {id(x) for part in jaxpr.eqns for x in part.invars} | {id(x) for x in jaxpr.outvars}
  calls = [part for part in jaxpr.eqns if part.primitive.name == "pallas_call"]
  return [call.params["name"] for call in calls if read & {id(x) for x in call.outvars}]


@pytest.mark.parametrize(("names", "forward_passes"), [((CONTEXT,), 1), ((), 2)])
def test_the_backward_pass_computes_what_is_not_saved_again_and_no_more(names, forward_passes):
  (q, k, v, sinks_N), segments_BT = operands(1, 64, 2, 1, 16, 16)

  @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
  def layer(q, k, v, sinks_N):
    return jnp.sin(fused_attention_gpu(q, k, v, segments_BT, 16, sinks_N))

  traced = jax.make_jaxpr(jax.grad(lambda *of: jnp.sum(layer(*of)), (0, 1, 2, 3)))(q, k, v, sinks_N)
  (recomputed,) = (part for part in traced.eqns if part.primitive.name == "remat2")
  called = [*kernels_read(traced.jaxpr), *kernels_read(recomputed.params["jaxpr"])]
  expected = {"attention_fwd_window_16": forward_passes, "attention_dq_window_16": 1, "attention_dkv_window_16": 1}
  assert collections.Counter(called) == expected


needs_gpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="compiling for GPU needs pip install moejax[gpu-plan]"
)

CASES = [
  ("a100", 4096, 128, 128, None, "bfloat16"),
  ("h100", 4096, 128, 128, 1000, "bfloat16"),
  ("h100", 4200, 80, 80, None, "float16"),
  ("h200", 4096, 64, 64, None, "bfloat16"),
  ("b200", 4096, 192, 128, None, "bfloat16"),
  ("a100", 4096, 256, 256, 1000, "bfloat16"),
  ("b200", 4096, 128, 128, None, "float32"),
  ("h100", 256, 8, 4, None, "bfloat16"),
]
"""Chip, T, H, J, window and dtype."""

COMPILES = """
import re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from moejax.kernels.attention import fused_attention_gpu
from moejax.planning import gpu_target

def temporary_bytes(chip, T, H, J, window, dtype, shared):
  target = re.sub(r"(shared_memory_per_block_optin:) \\d+", rf"\\1 {shared}", gpu_target.describe(chip))
  device = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices[0]
  here = jax.sharding.SingleDeviceSharding(device)
  shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=here)
  arguments = shape(2, T, 6, H), shape(2, T, 2, H), shape(2, T, 2, J), shape(6, dtype="float32")
  segments_BT = shape(2, T, dtype="int32")

  def weighted(q, k, v, sinks_N, segments_BT):
    return fused_attention_gpu(q, k, v, segments_BT, window, sinks_N).astype(jnp.float32).sum()

  lowered = jax.jit(jax.value_and_grad(weighted, (0, 1, 2, 3))).lower(*arguments, segments_BT)
  return lowered.compile().memory_analysis().temp_size_in_bytes

for case in eval(sys.argv[1]):
  print(temporary_bytes(*case, 99 * 2**10), flush=True)
"""


@pytest.mark.slow
@needs_gpu_compiler
def test_it_compiles_with_the_shared_memory_of_every_data_center_gpu_and_no_memory_for_scores():
  """99 KiB are those of L4, A10 and L40S. In another process, as XLA's flags of this one name devices of CPU."""
  done = subprocess.run([sys.executable, "-c", COMPILES, repr(CASES)], capture_output=True, text=True)
  found = [int(line) for line in done.stdout.split()]
  assert done.returncode == 0, (CASES[len(found)], done.stderr[-2000:])
  for case, temporary_bytes in zip(CASES, found, strict=True):
    scores = 4 * 2 * 6 * case[1] ** 2
    assert temporary_bytes < scores / 8, case
