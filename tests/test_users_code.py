"""Mistakes in routers, dispatches, layers, optimizers and schedules of a user's own file, by where they show."""

import functools
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax import cli, lookup
from moejax.config import DATA_EXPERT_MODEL, Experiment, Mesh
from moejax.config.kinds import RAISED_BY
from moejax.errors import UserError
from moejax.models.feed_forward import FEED_FORWARDS, apply_feed_forward, feed_forward
from moejax.models.moe.dispatch import DISPATCHES
from moejax.models.moe.layer import MoELayer
from moejax.models.moe.router import ROUTERS
from moejax.partitioning import make_partitioner
from moejax.training.optimizers import OPTIMIZERS, make_optimizer
from moejax.user_files import failure_of_users_code

MINE = """
import dataclasses

import jax.numpy as jnp
import optax

from moejax.config import AdamW, EinsumDispatch, Experiment, MLP, MoE, Cosine, TopKRouter
from moejax.experiments.quickstart import quick_small
from moejax.models.feed_forward import FEED_FORWARDS
from moejax.models.moe.dispatch import DISPATCHES
from moejax.models.moe.router import ROUTERS
from moejax.training.optimizers import OPTIMIZERS

def fail(how):
  if how == "raise":
    return {}["gone"]
  if how == "import":
    import no_such_module
  if how == "lines":
    raise ValueError("two\\nlines")
  if how == "shapes":
    jnp.zeros((2, 3)) + jnp.zeros((4, 5))

def cast(x):
  return x.astype(jnp.float16)

def broken(base, kind, table):
  made = dataclasses.make_dataclass(kind, [("how", str, "")], bases=(base,), frozen=True, kw_only=True,
                                    namespace={"__module__": __name__})

  def run(config, *others):
    fail(config.how)
    if config.how == "none":
      return None
    return globals()[f"wrong_{kind}"](config, table[base](config, *others), *others)

  table[made] = run
  return made

def wrong_Router(config, routing, *_):
  weights = routing.weights_OUMA
  return dataclasses.replace(routing, **{
    "shape": {"weights_OUMA": weights[..., :1]}, "dtype": {"weights_OUMA": cast(weights)},
    "list": {"weights_OUMA": [1]},
    "wide": {name: getattr(routing, name).repeat(2, -1) for name in ("experts_OUMA", "weights_OUMA", "chosen_OUMA")},
  }.get(config.how, {}))

def wrong_Dispatch(config, returned, *_):
  out, dropped = returned
  return {"shape": (out[:, :1], dropped), "dtype": (cast(out), dropped), "list": [out, dropped], "one": out,
          "dropped": (out, dropped.sum())}.get(config.how, returned)

def wrong_Layer(config, layer, model, partitioner, rngs):
  call = type(layer).__call__
  changes = {"shape": lambda x: x[:, :1], "dtype": cast, "list": lambda x: [x], "late": lambda x: fail("raise")}
  if config.how in changes:
    made = type("Changed", (type(layer),), {"__call__": lambda self, x: changes[config.how](call(self, x))})
    return made(model, model.d_ff, partitioner, rngs)
  if config.how == "parameters":
    return type(layer)(model, model.d_ff * 2, partitioner, rngs)
  return layer

def wrong_Optimizer(config, made, *_):
  def update(gradients, state, parameters=None):
    updates, after = made.update(gradients, state, parameters)
    if config.how == "late":
      fail("raise")
    return {"shape": ({"w": updates["w"][:1]}, after), "dtype": ({"w": cast(updates["w"])}, after),
            "list": ([updates["w"]], after), "state": (updates, after[:1])}.get(config.how, (updates, after))
  return optax.GradientTransformation(made.init, update)

Router = broken(TopKRouter, "Router", ROUTERS)
Dispatch = broken(EinsumDispatch, "Dispatch", DISPATCHES)
Layer = broken(MLP, "Layer", FEED_FORWARDS)
Optimizer = broken(AdamW, "Optimizer", OPTIMIZERS)

def schedule(self, progress):
  fail(self.how)
  return {"none": None, "nan": float("nan"), "negative": -0.1, "text": "a"}.get(self.how, 1.0)

Schedule = dataclasses.make_dataclass(
  "Schedule", [("how", str, "")], bases=(Cosine,), frozen=True, kw_only=True,
  namespace={"__module__": __name__, "after_warmup": schedule, "__post_init__": lambda self: None})

def made(**how):
  how = {"router": "", "dispatch": "", "layer": "", "optimizer": "", "schedule": ""} | how
  base = quick_small()
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=8, group_size=8, every=2,
            router=Router(how=how["router"]), dispatch=Dispatch(how=how["dispatch"]))
  model = dataclasses.replace(base.model, num_layers=2, d_model=16, num_heads=4, num_kv_heads=4, d_ff=24, moe=moe,
                              feed_forward=Layer(how=how["layer"]))
  optimizer = Optimizer(learning_rate=0.1, how=how["optimizer"], schedule=Schedule(how=how["schedule"]))
  return dataclasses.replace(base, name="mine", model=model, optimizer=optimizer)
"""

RAISING = {
  "raise": "KeyError: 'gone'",
  "import": "ModuleNotFoundError: No module named 'no_such_module'",
  "lines": "ValueError: two",
  "shapes": "TypeError: add got incompatible shapes",
}
RETURNED = {
  "router": {
    "none": "returned NoneType, not a moejax.models.moe.routing.Routing",
    "shape": "returned weights_OUMA as float32[1, 2, 8, 1], not as float32[1, 2, 8, 2]",
    "dtype": "returned weights_OUMA as float16[1, 2, 8, 2], not as float32[1, 2, 8, 2]",
    "list": "returned weights_OUMA as list, not as float32[1, 2, 8, 2]",
    "wide": "returned experts_OUMA as int32[1, 2, 8, 4], not as int32[1, 2, 8, 2]",
  },
  "dispatch": {
    "none": "returned NoneType, not the tuple (out_OUMD, dropped_OU)",
    "one": "returned float32[1, 2, 8, 16], not the tuple (out_OUMD, dropped_OU)",
    "list": "returned list, not the tuple (out_OUMD, dropped_OU)",
    "shape": "returned out_OUMD as float32[1, 1, 8, 16], not as float32[1, 2, 8, 16]",
    "dtype": "returned out_OUMD as float16[1, 2, 8, 16], not as float32[1, 2, 8, 16]",
    "dropped": "returned dropped_OU as int32[], not as int32[1, 2]",
  },
  "layer": {
    "none": "returned NoneType, not a flax.nnx.Module",
    "shape": "returned x_BTD as float32[2, 1, 16], not as float32[2, 8, 16]",
    "dtype": "returned x_BTD as float16[2, 8, 16], not as float32[2, 8, 16]",
    "list": "returned x_BTD as list, not as float32[2, 8, 16]",
    "parameters": "declares parameters of shapes [(16, 24), (16, 24), (16, 24)], but its module has [(16, 48)",
  },
  "optimizer": {
    "none": "returned NoneType, not an optax.GradientTransformation",
    "shape": "returned updates at ['w'] as float32[1, 3], not as float32[2, 3]",
    "dtype": "returned updates at ['w'] as float16[2, 3], not as float32[2, 3]",
    "list": "returned updates of another structure than it was given",
    "state": "returned a state of another structure than it was given",
  },
  "schedule": {
    "nan": "returned nan for step 500 of 1000; a fraction",
    "negative": "returned -0.1 for step 500 of 1000; a fraction",
  },
}  # fmt: skip
LATER = {"layer": ("late",), "optimizer": ("late",), "schedule": ("none", "text")}
"""What raises only after the function returned, or where its value is used."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Makes the experiment of MINE with a mistake."""
  tables = (ROUTERS, DISPATCHES, FEED_FORWARDS, OPTIMIZERS)
  before = [dict(table) for table in tables]
  path = tmp_path_factory.mktemp("mine") / "mine.py"
  path.write_text(MINE)
  yield lookup.import_file(str(path)).made
  for table, content in zip(tables, before, strict=True):
    table.clear()
    table.update(content)


def trace(experiment: Experiment) -> None:
  """Traces every kind of an experiment alone, without a step."""
  model, partitioner = experiment.model, make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  x_BTD, valid_BT = jax.ShapeDtypeStruct((2, 8, 16), "float32"), jax.ShapeDtypeStruct((2, 8), "bool")

  def layers(x_BTD: jax.Array, valid_BT: jax.Array) -> Any:
    dense = feed_forward(model, partitioner, nnx.Rngs(params=0))
    return MoELayer(model, partitioner, nnx.Rngs(params=0))(
      apply_feed_forward(model.feed_forward, dense, x_BTD), valid_BT
    )

  jax.eval_shape(layers, x_BTD, valid_BT)
  weights = nnx.State({"w": nnx.Param(jnp.zeros((2, 3)), names=("embed", "mlp"))})
  optimizer = make_optimizer(experiment.optimizer, weights)
  parameters = nnx.to_pure_dict(weights)
  optimizer.update(parameters, optimizer.init(parameters), parameters)


def test_without_a_mistake_all_of_them_are_traced(made):
  trace(made())


@pytest.mark.parametrize("kind", RETURNED)
def test_what_is_returned_is_checked_and_named_with_what_was_expected(made, kind):
  for how, message in RETURNED[kind].items():
    with pytest.raises(UserError) as error:
      trace(made(**{kind: how}))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert re.search(r"\w+ [A-Z]\w+ of .*mine\.py ", str(error.value))


@pytest.mark.parametrize("kind", RETURNED)
def test_an_exception_is_shown_with_the_lines_of_the_user_and_the_kind_alone(made, kind):
  for how in (*RAISING, *LATER.get(kind, ())):
    with pytest.raises(Exception) as error:
      trace(made(**{kind: how}))
    lines, line = failure_of_users_code(error.value) or ("", "")
    text = RAISING.get(how, "") if how != "late" else RAISING["raise"]
    assert "mine.py" in lines and "site-packages" not in lines and text in line, (how, lines, line)
    assert re.search(rf"mine\.py:\d+: .*\({RAISED_BY}[\w-]+ {kind.title()} of .*mine\.py\)$", line), line


def test_a_schedule_that_fails_is_named_when_the_experiment_is_found(made):
  path = pathlib.Path(sys.modules[made.__module__].__file__)
  path.write_text(f"{MINE}\ndef failing():\n  return made(schedule='raise')\n")
  with pytest.raises(
    UserError, match=rf"mine\.py:\d+: KeyError: 'gone' \({RAISED_BY}schedule Schedule of .*mine\.py\)$"
  ):
    lookup.find(f"{path}:failing")


def test_the_command_exits_with_1_and_shows_no_line_of_a_library(made, monkeypatch, capsys):
  monkeypatch.setattr("moejax.api.train", lambda experiment, *others, **more: trace(experiment))
  monkeypatch.setattr(lookup, "find_experiment", functools.partial(lambda name: made(router=name)))
  for how, code in (("raise", 1), ("shape", 2)):
    with pytest.raises(SystemExit) as stopped:
      cli.main(["train", how, "--workdir", "unused"])
    shown = capsys.readouterr().err
    assert stopped.value.code == code and "site-packages" not in shown and "bug in moejax" not in shown
    assert shown.splitlines()[-1].startswith("moejax: ") and (code == 2 or 'mine.py", line' in shown)
