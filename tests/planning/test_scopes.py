"""The scopes that a plan names are those of the model and of the train step."""

import ast
import dataclasses
import pathlib
import re

from moejax.config.fields import with_fields
from moejax.partitioning import make_partitioner
from moejax.planning.cost import SCOPES
from moejax.training.state import make_train_spec
from moejax.training.step import abstract_inputs, make_train_step

ROOT = pathlib.Path(__file__).parents[2]


def test_the_source_opens_exactly_the_scopes_that_a_plan_knows():
  opened = {
    node.args[0].value
    for path in (ROOT / "moejax").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "named_scope"
    if isinstance(node.args[0], ast.Constant)
  }
  assert opened == {*SCOPES} and len(SCOPES) == len(opened)


def test_every_scope_reaches_the_program_of_a_model_that_has_all_parts(tiny_moe, tiny_dense):
  moe = dataclasses.replace(tiny_moe.model.moe, num_shared_experts=1)
  model = dataclasses.replace(tiny_moe.model, num_kv_heads=1, attention_experts=tiny_moe.model.num_heads, moe=moe)
  experiment = dataclasses.replace(tiny_moe, model=model)
  words: set[str] = set()
  for changed in (
    with_fields(experiment, {"model.multi_token_depth": 1, "training.losses.multi_token": 0.3}),
    with_fields(tiny_dense, {"model.depths": "top_k", "training.losses.depths": 0.01}),
  ):
    spec = make_train_spec(changed, make_partitioner(changed.mesh, changed.rules))
    text = make_train_step(spec).lower(*abstract_inputs(spec)).as_text(debug_info=True)
    words |= {word for path in re.findall(r'loc\("([^"]+)"', text) for word in re.split(r"[/()]", path)}
  assert {*SCOPES} <= words
