"""Matrices of experts that are sharded within a layer and gathered for it, in a program for GPU.

L stacked layers  E experts  D embed  F hidden
"""

import importlib.util
import subprocess
import sys

import pytest

LAYOUTS = r"""
import re
from dataclasses import replace
from moejax.config import GroupedDispatch, Mesh, MoE
from moejax.experiments import EXPERIMENTS
from moejax.planning.topology import parse_topology, prepare_environment

topology = parse_topology("gpu:h100:8")
prepare_environment(topology)
from moejax.planning.compile import compile_step

base = EXPERIMENTS["quick_small"]()
moe = MoE(num_experts=4, experts_per_token=2, d_ff=384, dispatch=GroupedDispatch())
model = replace(base.model, num_layers=3, d_model=256, moe=moe, compute_dtype="bfloat16", layers="scanned")
training, evaluation = (replace(part, batch_size=8) for part in (base.training, base.evaluation))
experiment = replace(base, model=model, training=training, evaluation=evaluation, mesh=Mesh(data=8))
text = compile_step(experiment, topology).text
for shape in ("3,4,32,384", "3,4,384,32"):
  print(shape, *sorted(set(re.findall(rf"f32\[{shape}\]{{([0-9,]+)", text))))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="compiling for GPU needs pip install moejax[gpu-plan]"
)
def test_no_parameter_of_all_layers_is_transposed_before_a_layer_is_gathered():
  """Shards of a dimension that is not the first lie apart in memory. XLA would gather them in another layout, and keep
  a float32 copy of all layers in it. In another process, as XLA's flags of this one name devices of CPU."""
  done = subprocess.run([sys.executable, "-c", LAYOUTS], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.splitlines() == ["3,4,32,384 3,2,1,0", "3,4,384,32 3,2,1,0"]
