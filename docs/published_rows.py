"""Published training runs as experiments: shape, topology, mesh, rematerialization and precision from the words of a
list with one run a line, as `python docs/ledger.py` reads it."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from moejax.config import AdamW, Data, Evaluation, Experiment, Mesh, Model, MoE, Precision, Training
from moejax.config.attention import Attention, GroupedQuery, Latent
from moejax.config.dispatch import EinsumDispatch, GroupedDispatch
from moejax.config.parameters import flops_per_token, tokens_per_step
from moejax.config.remat import Remat, Saved
from moejax.config.router import Router
from moejax.config.sharding import DATA_EXPERT_MODEL, Rules
from moejax.errors import UserError
from moejax.planning.meshes import on_topology
from moejax.planning.plan import ROUTER_LOAD
from moejax.planning.precision import check_precisions
from moejax.planning.topology import Topology, parse_topology

SUPPORTED = ("sliding window", "sliding window and sinks", "MLA", "host offload", "gb200")
"""Features of `needs` that an experiment expresses."""

EIGHT_BITS = {"fp8": "fp8", "mxfp8": "fp8", "int8": "int8"}
"""Features of `needs` whose products are priced in the type, where the chip has it. A program is compiled with those of
routed experts (`model.precision.experts`). The scales of mxfp8 are not priced."""

UNSTATED_ATTENTION = "axlearn"
"""The framework of which only the times of runs tell whether they had a fused attention kernel (docs/step-time.md).
Nothing is fitted to them."""

PLAIN_ATTENTION = 2048
"""Sequence length of those of its runs, Fuji v1, that took as long on GPU as with plain attention."""

CUDNN_ATTENTION = 0.55
"""Fraction of peak that cuDNN's attention, with which the other runs on GPU were made, reaches on H100: 645 TFLOP/s
forward (tokamax 0.0.12), about 500 backward. The formula is fitted to these runs with it."""

CUTLASS_GROUPED = 0.71
"""Fraction of peak that CUTLASS's grouped product, with which frameworks in PyTorch train, reaches on H200: 704 TFLOP/s
for 16 groups of 128,000 rows and matrices of 7168 x 7168 (pytorch/pytorch, pull request 156203)."""

UNLIKE = (("global with head dim", "other heads in global layers"),)
"""Words of the shape of a row, and the features that moejax lacks for it."""

HALF_WEIGHTS = "bf16 weights"
"""Words of a note of a run whose parameters were in bfloat16."""

SHARDS_OPTIMIZER = "Megatron"
"""The framework that, without `fsdp`, shares the state of the optimizer among replicas."""

TWO_MATRICES = ("MaxText 22B",)
"""Models with the size in their name if a feed-forward layer has two matrices (here 22.1B; 29.4B with three)."""

REMAT: tuple[tuple[str, Remat], ...] = (
  # Words of a row's `remat`, the first that is there. Without any of them, it names values.
  ("as moejax's maxtext", "layer_inputs"),
  ("kept but those of the feed-forward", "attention"),
  ("dots and attention", "dots"),
  ("full", "layer_inputs"),
  ("not stated", "attention"),
  ("none stated", "attention"),
)

VALUES: tuple[tuple[str, tuple[Saved, ...]], ...] = (
  ("q, k, v", ("queries", "keys_values")),
  ("k, v", ("keys_values",)),
  ("attention context", ("context",)),
  ("attention output", ("attention_out",)),
  ("layer input", ("layer_inputs",)),
  ("second feed-forward product", ("experts_out",)),
)
"""Values of `moejax.config.remat` by words of a row's `remat`."""


class InexpressibleError(Exception):
  """A row that moejax cannot express; the arguments are the features that it lacks."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One published run."""

  id: str
  experiment: Experiment
  topology: Topology
  missing: tuple[str, ...]
  """Features that it is planned without."""
  precision: str
  """The type in which its large products are priced, as `moejax.planning.precision.at_precision` takes it."""
  published_s: float | None
  balanced: bool = False
  """Whether all experts had the same load."""
  calibrates: bool = True
  """Whether the utilisation of the chip is fitted to it, if its time is given."""
  plain_attention: bool = False
  """Whether its program is compiled with plain attention."""


def read_row(values: dict[str, Any]) -> Row:
  """The experiment of one line.

  Raises:
    InexpressibleError: moejax lacks what the row cannot be planned without.
  """
  needs = list(values.get("needs", ()))
  shape = values.get("shape")
  if shape is None:
    raise InexpressibleError("a stated shape")
  missing, bits = [need for need in needs if need not in SUPPORTED], "bfloat16"
  if "fsdp 2 between slices" in values["sharding"]:
    missing.append("FSDP across slices")
  if "sliding window" in needs and "attention" not in shape:
    missing.append("the sliding window, whose length is not stated")
  missing += [what for words, what in UNLIKE if words in str(shape.get("attention"))]
  if HALF_WEIGHTS in values.get("note", ""):
    missing.append("weights in bfloat16")
  topology = _topology(values)
  for need in (need for need in needs if need in EIGHT_BITS):
    try:
      check_precisions([EIGHT_BITS[need]], topology)
    except UserError:  # the chip computes such products in bfloat16
      continue
    bits = EIGHT_BITS[need]
    if need == EIGHT_BITS[need]:
      missing.remove(need)
  if "sequence" not in values or not values["sequence"]:
    raise InexpressibleError("a stated sequence length")
  mesh = _mesh(values["sharding"], topology, bool(shape.get("experts")))
  if mesh.context > 1:
    missing.remove("context parallelism")
  if mesh.replica > 1 and values["framework"].startswith(SHARDS_OPTIMIZER) and "fsdp" not in values["sharding"]:
    missing.append("optimizer state shared among replicas")
  of_experts = bits if shape.get("experts") and bits != "bfloat16" else "compute"
  experiment = Experiment(
    name=values["id"],
    model=dataclasses.replace(_model(shape, values), precision=Precision(experts=of_experts)),
    data=Data(sequence_length=values["sequence"]),
    training=Training(batch_size=values["global_batch"], gradient_accumulation=_parts(values, mesh)),
    optimizer=AdamW(learning_rate=3e-4),
    evaluation=Evaluation(batch_size=values["global_batch"]),
    rules=_rules(values["sharding"]),
  )
  if shape["d_model"] % mesh.data:  # more shards than the width can have: the rest are replicas
    shards = math.gcd(shape["d_model"], mesh.data)
    missing.append(f"{mesh.data} shards of a width of {shape['d_model']}")
    mesh = dataclasses.replace(mesh, replica=mesh.replica * mesh.data // shards, data=shards)
  try:
    experiment = on_topology(dataclasses.replace(experiment, mesh=mesh), topology)
  except UserError as error:
    raise InexpressibleError(f"mesh: {error}") from error
  moe = experiment.model.moe
  calibrates = not values["framework"].startswith(UNSTATED_ATTENTION) and (moe is None or moe.dispatch.has_capacity)
  row = Row(values["id"], experiment, topology, tuple(missing), bits, None, _is_balanced(values), calibrates)
  row = dataclasses.replace(row, plain_attention=ran_plain_attention(values["framework"], experiment, topology))
  return dataclasses.replace(row, published_s=_published_s(values, row))


def _is_balanced(values: dict[str, Any]) -> bool:
  return any(word in values.get("note", "") for word in ("forced balance", "random routing"))


def ran_plain_attention(framework: str, experiment: Experiment, topology: Topology) -> bool:
  """Whether a run took as long as with plain attention."""
  v1 = framework.startswith(UNSTATED_ATTENTION) and experiment.data.sequence_length == PLAIN_ATTENTION
  return v1 and topology.chip.platform == "gpu"


@contextlib.contextmanager
def kernels_as_published(plain_attention: bool) -> Iterator[None]:
  """While it lasts, programs are made with plain attention on every device, if `plain_attention`. Otherwise, the fused
  kernel on GPU has the price of cuDNN's. Grouped products on GPU have the price of CUTLASS's, in formulas too."""
  from moejax.kernels.attention import attention
  from moejax.models import attend
  from moejax.planning import estimate, kernels

  as_plain = mock.patch.object(attend, "attention_for", lambda *_: attention)
  as_fused = mock.patch.object(kernels, "TRITON_ATTENTION", CUDNN_ATTENTION)
  of_products = dict.fromkeys(kernels.TRITON_SHARE, CUTLASS_GROUPED)
  by_formula = kernels.PRODUCT_SHARE / CUTLASS_GROUPED
  with (
    as_plain if plain_attention else as_fused,
    mock.patch.dict(kernels.TRITON_SHARE, of_products),
    mock.patch.dict(estimate.GROUPED, gpu=by_formula),
  ):
    yield


def whole_row(values: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """A row with what it has `as its bf16 row`: the first row of the same chip and model. Rematerialization `as on` some
  number of chips is that of the row of that number, and a row without a shape has the shape and the note of that first
  row."""
  if chips := re.fullmatch(r"as on (\d+)", values.get("remat", "")):
    same = (row for row in rows if (row["chip"], row["model"]) == (values["chip"], values["model"]))
    return values | {"remat": next(row["remat"] for row in same if row["chips"] == int(chips[1]))}
  if values["topology"] != "as its bf16 row":
    alike = ("chip", "model", "topology")
    same = [row for row in rows if "shape" in row and all(row.get(key) == values.get(key) for key in alike)]
    if "shape" in values or not same:
      return values
    return values | {"shape": same[0]["shape"], "note": f"{same[0].get('note', '')}; {values.get('note', '')}"}
  name = f"{values['chip']}-{values['model']}"
  base = next(row for row in rows if row["id"].startswith(name) and "shape" in row)
  kept = {key: values[key] for key in ("id", "precision", "note", "given", "source")}
  return base | kept | {"needs": [*base.get("needs", ()), *values["needs"]]}


def _parts(values: dict[str, Any], mesh: Mesh) -> int:
  """Microbatches of a step, as in `16 parts` or `micro batch 4`, which is of one data-parallel device."""
  if stated := re.search(r"(\d+) parts", values["sharding"]):
    return int(stated[1])
  if local := re.search(r"(?:micro|local) batch (\d+)", values["sharding"]):
    return max(1, values["global_batch"] // (int(local[1]) * mesh.size // mesh.model))
  return 1


def _rules(sharding: str) -> Rules:
  """Without `fsdp`, each device of a row of GPUs has all dense weights."""
  replicated = "fsdp" not in sharding and "micro batch" in sharding
  return tuple((name, () if name == "embed" and replicated else axes) for name, axes in DATA_EXPERT_MODEL)


def _topology(values: dict[str, Any]) -> Topology:
  name = values["topology"] if values["topology"].startswith("gpu:") else f"{values['chip']}:{values['topology']}"
  return parse_topology(name, values["slices"])


def _model(shape: dict[str, Any], values: dict[str, Any]) -> Model:
  moe = None
  gated = "two matrices" not in shape.get("activation", "") and values.get("model") not in TWO_MATRICES
  if shape.get("experts"):
    note = values.get("note", "")
    load = 1.0 if _is_balanced(values) else ROUTER_LOAD
    capacity = _number(r"capacity masks, ([\d.]+)", note)
    # Frameworks on GPU have buffers for the rows that are there, not for the most that there can be.
    room = _number(r"capacity ([\d.]+)", note) or (load if values["topology"].startswith("gpu:") else None)
    shared = shape.get("shared_experts", 0) or round(shape.get("shared_d_ff", 0) / shape["d_ff"])
    moe = MoE(
      num_experts=shape["experts"],
      experts_per_token=shape["top_k"],
      d_ff=shape["d_ff"],
      every=shape.get("every", 1),
      leading_dense=shape.get("dense_layers_first", 0),
      num_shared_experts=shared,
      dispatch=EinsumDispatch() if capacity else GroupedDispatch(receive_factor=room),
      capacity_factor=capacity or 1.0,
      group_size=values["sequence"] if capacity and "group = a sequence" in note else None,
      **({"router": Router(renormalize=False)} if shape["top_k"] == 1 else {}),
    )
  remat, saved, offloaded = _rematerialization(values["remat"], moe is not None)
  return Model(
    num_layers=shape["layers"],
    d_model=shape["d_model"],
    num_heads=shape["heads"],
    num_kv_heads=shape.get("kv_heads", shape["heads"]),
    head_dim=shape["mla"]["nope"] if "mla" in shape else shape["head_dim"],
    d_ff=shape.get("d_ff_dense", shape["d_ff"]),
    vocab_size=shape["vocab"],
    tie_embeddings=shape.get("tied", False),
    qk_norm=shape.get("qk_norm", False),
    activation="swiglu" if gated else "gelu",
    moe=moe,
    attention=_attention(shape),
    logit_chunks=int(_number(r"logits in (\d+) parts", values["remat"]) or 1),
    compute_dtype="bfloat16",
    gradient_dtype="compute",  # as the frameworks that were timed
    remat=remat,
    save_activations=saved,
    offload_activations=offloaded,
  )


def _number(pattern: str, words: str) -> float | None:
  found = re.search(pattern, words)
  return float(found[1].rstrip(".")) if found else None


def _rematerialization(words: str, sparse: bool) -> tuple[Remat, tuple[Saved, ...], tuple[Saved, ...]]:
  """The policy, and the values that are saved and those that are offloaded, as in `layer input and q, k, v moved to the
  host, attention context kept`. The backward pass of a dense layer does not read its last product."""
  policy = next((policy for known, policy in REMAT if known in words), None)
  moved = words.partition("moved to the host")[0] if "moved to the host" in words else ""
  named, offloaded = (
    tuple(dict.fromkeys(value for known, values in VALUES if known in part for value in values))
    for part in (words, moved)
  )
  if not sparse:
    named, offloaded = (tuple(value for value in part if value != "experts_out") for part in (named, offloaded))
  if policy is None and "minimal" in words:  # all matrix products of a dense model, as XLA's policy of that name
    named = ("queries", "keys_values", "attention_out", "feed_forward_in")
  if policy is None and not named:
    raise InexpressibleError(f"rematerialization: {words}")
  saved = () if policy else tuple(value for value in named if value != "layer_inputs")
  return policy or ("selected" if saved else "layer_inputs"), saved, offloaded


def _attention(shape: dict[str, Any]) -> tuple[Attention, ...]:
  """As in `5 local layers (window 1024) to 1 global`, `window of 128 in every second layer` or `every fourth layer
  full`. A pattern that does not divide the layers is spelled out."""
  if "mla" in shape:
    mla = shape["mla"]
    return (Latent(kv_rank=mla["kv_rank"], q_rank=mla["q_rank"], rotary_dim=mla["rope"], value_dim=mla["v"]),)
  words = shape.get("attention", "")
  window = re.search(r"window (?:of )?(\d+)", words)
  if not window:
    return (GroupedQuery(),)
  every = next(number for word, number in (("every second", 2), ("every fourth", 4), ("5 local", 6)) if word in words)
  local, full = (GroupedQuery(window=of, sinks="sinks" in words) for of in (int(window[1]), None))
  pattern = (*[local] * (every - 1), full)
  layers = shape["layers"]
  return pattern if layers % every == 0 else tuple(pattern[layer % every] for layer in range(layers))


def _mesh(sharding: str, topology: Topology, sparse: bool) -> Mesh:
  """As in `fsdp 64 x expert 4`, `data 2 x fsdp 8`, `fsdp 32 x context 2` or `experts over the same 8`. The data axis
  takes what is left."""
  devices = topology.devices
  sizes = {name: 1 for name in ("fsdp", "tensor", "expert", "data", "context")}
  for name, size in re.findall(r"(fsdp|tensor|experts?|data|context) (?:over )?(\d+)", sharding):
    sizes[name.removesuffix("s") if name.startswith("expert") else name] *= int(size)
  if shared := re.search(r"experts over the same (\d+)", sharding):
    sizes["expert"] = int(shared[1])
  model, expert = sizes["tensor"], sizes["expert"] if sparse else 1
  if "fsdp" in sharding or not sparse:
    replica = max(topology.slices, sizes["data"] if "fsdp" in sharding else 1)
  else:  # without `fsdp`, GPUs with the same experts are replicas
    replica = devices // (model * expert) if "micro batch" in sharding else topology.slices
  inside = devices // (replica * model * expert * sizes["context"])
  return Mesh(replica=replica, data=max(1, inside), expert=expert, context=sizes["context"], model=model)


def _published_s(values: dict[str, Any], row: Row) -> float | None:
  """Seconds of a step of a row that is given; TFLOP/s count as MaxText counted them, attention in full."""
  if not values.get("given"):
    return None
  if "published_s" in values:
    return values["published_s"]
  flops = tokens_per_step(row.experiment) * flops_per_token(row.experiment.model, values["sequence"])
  return flops / values["chips"] / (values["published_teraflops"] * 1e12)
