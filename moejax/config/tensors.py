"""Every tensor of a model whose dimensions have logical axes, so that rules are checked before JAX is imported.

A test compares these lists with the tensors that the traced train step constrains.
"""

import math
from collections.abc import Iterator

from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.sharding import Mesh, Rules, axes_of, check_dimensions, shards
from moejax.errors import UserError

Dimensions = dict[str, int]
"""Size of each dimension by its logical axis."""


def parameters(model: Model) -> Iterator[tuple[str, Dimensions]]:
  """Yields the dimensions of each parameter, with the field that determines its size."""
  D = model.d_model
  yield "model.d_model", {"embed": D}
  yield "model.vocab_size", {"vocab": model.vocab_size, "embed": D}
  stacked = {"layers": model.num_periods} if model.layers == "scanned" else {}
  yield from ((field, stacked | dimensions) for field, dimensions in _of_layers(model))
  if model.leading_layers:
    yield from (*_of_attention(model), *_of_feed_forward(model))
  if model.multi_token_depth:
    yield from _of_layers(model.last_layer)


def _of_layers(model: Model) -> Iterator[tuple[str, Dimensions]]:
  """Parameters of the layers of a period, each without a dimension of layers."""
  yield "model.d_model", {"embed": model.d_model}
  yield from (*_of_attention(model), *_of_feed_forward(model))
  if model.moe:
    E, F = model.moe.num_experts, model.moe.d_ff
    yield "moe.num_experts", {"experts": E, "expert_embed": model.d_model, "expert_mlp": F}
  if model.moe or model.depths.is_routed:
    yield "model.num_layers", {}  # routers


def activations(model: Model, batch: int, length: int, rules: Rules, mesh: Mesh) -> Iterator[Dimensions]:
  """Yields the dimensions of each activation for `batch` sequences of `length` tokens."""
  if shards(rules, mesh, "sequence") > 1:
    yield {"batch": batch, "sequence": length // math.gcd(model.logit_chunks, length), "vocab": model.vocab_size}
  else:
    yield {"batch": batch * length, "vocab": model.vocab_size}
  if model.attention_experts or model.depths.is_routed:
    yield {"batch": batch}  # metrics of their router
  for seen in _lengths(model, length):
    yield from _of_dense_layers(model, batch, seen, shards(rules, mesh, "sequence") > 1)
    if model.moe:
      yield from _of_sparse_layers(model.moe, model.d_model, batch * seen, seen, shards(rules, mesh, "outer"))


def _lengths(model: Model, length: int) -> tuple[int, ...]:
  """The lengths of a sequence in the layers of the model."""
  return tuple(dict.fromkeys((length, model.depths.slots(length))))


def _of_dense_layers(model: Model, batch: int, length: int, is_sharded: bool) -> Iterator[Dimensions]:
  tokens = {"batch": batch, "sequence": length}
  yield tokens
  yield tokens | {"act_embed": model.d_model}
  yield tokens | {"heads": model.num_heads}
  yield tokens | {"kv_heads": model.num_kv_heads}
  for width in dict.fromkeys(shape["mlp"] for _, shape in _of_feed_forward(model) if "mlp" in shape):
    yield tokens | {"mlp": width} if is_sharded else {"batch": batch * length, "mlp": width}


def _of_sparse_layers(moe: MoE, D: int, tokens: int, length: int, O: int) -> Iterator[Dimensions]:
  M, E, F = moe.group_tokens(length), moe.num_experts, moe.d_ff
  U = tokens // M // O
  C = moe.capacity(M)
  groups = {"outer": O, "groups": U, "group_tokens": M}
  yield groups
  yield groups | {"act_embed": D}
  yield {"outer": O, "groups": U * M // math.gcd(M, length)}  # router metrics, by set of tokens
  if moe.router.has_capacity:
    yield {"outer": O, "groups": U}
  yield from moe.dispatch.activations(O=O, U=U, M=M, C=C, E=E, D=D, F=F)


def _of_attention(model: Model) -> Iterator[tuple[str, Dimensions]]:
  """Parameters of the attention layers."""
  for attention in dict.fromkeys(model.attention):
    for shape in attention.shapes(model).values():
      heads = next((name for name in ("heads", "kv_heads") if name in shape), None)
      field = f"model.num_{heads}" if heads else "model.attention"
      yield field, {name: size for name, size in shape.items() if name}


def _of_feed_forward(model: Model) -> Iterator[tuple[str, Dimensions]]:
  """Parameters of the feed-forward layers that process every token."""
  if model.num_sparse_layers < model.num_layers:
    shapes = model.feed_forward.shapes(model.d_model, model.d_ff, model.is_gated).values()
    yield from (("model.d_ff", {name: size for name, size in shape.items() if name}) for shape in shapes)
  if model.moe and model.moe.num_shared_experts:
    width = model.moe.num_shared_experts * model.moe.d_ff
    yield "moe.num_shared_experts x moe.d_ff", {"embed": model.d_model, "mlp": width}


def check_parameters(model: Model, rules: Rules, mesh: Mesh) -> None:
  """Checks that the rules can shard every parameter.

  Raises:
    UserError: If two dimensions of a parameter use one mesh axis, or a dimension is not divisible by its mesh axes.
  """
  for field, dimensions in parameters(model):
    check_dimensions(field, dimensions, rules, mesh)


def check_activations(field: str, model: Model, batch: int, length: int, rules: Rules, mesh: Mesh) -> None:
  """Checks that the rules can shard every activation of a batch.

  Args:
    field: the field that determines the batch size, for messages.
    model: the model.
    batch: number of sequences.
    length: number of tokens per sequence.
    rules: the rules.
    mesh: the mesh.

  Raises:
    UserError: If they cannot, or if attention or a sparse layer does not support them.
  """
  if shards(rules, mesh, "sequence") > 1 and model.depths.is_routed:
    raise UserError(
      f"rules: 'sequence' is sharded over {' x '.join(axes_of(rules, mesh, 'sequence'))}, but "
      f"model.depths.kind={model.depths.kind} needs whole sequences; use () for sequence, or mesh.context=1"
    )
  if model.moe:
    _check_groups(field, model, model.moe, batch, length, rules, mesh)
    model.moe.dispatch.check_rules(rules, mesh)
  for dimensions in activations(model, batch, length, rules, mesh):
    of_input = dimensions.keys() <= {"batch", "sequence"}
    check_dimensions(field if of_input else f"activation {' x '.join(dimensions)}", dimensions, rules, mesh)


def _check_groups(field: str, model: Model, moe: MoE, batch: int, length: int, rules: Rules, mesh: Mesh) -> None:
  """Checks that the tokens of sparse layers are whole routing groups, as many on each shard."""
  group, parts = moe.group_tokens(length), shards(rules, mesh, "outer") * shards(rules, mesh, "groups")
  groups, rest = divmod(batch * length, group)
  if rest:
    raise UserError(
      f"moe.group_size={group} does not divide the {batch * length} tokens of {field} "
      f"({batch} sequences of {length}); use a group size that does"
    )
  if groups % parts:
    raise UserError(
      f"{field}: {batch} sequences have {groups} routing groups of moe.group_size={group}, which are not divisible by "
      f"the {parts} shards of mesh ({mesh}); lower moe.group_size or raise the batch size"
    )
  through = model.depths.slots(length)
  group, rows = moe.group_tokens(through), batch * through // parts
  if rows % group:
    # Each divisor of the group size divides all tokens too, which are checked above.
    raise UserError(
      f"moe.group_size={group} does not divide the {rows} tokens that go through a sparse layer of model.depths.kind="
      f"{model.depths.kind}{f' on each of {parts} shards' if parts > 1 else ''}: depths.share={model.depths.share} of "
      f"data.sequence_length={length} is {through} tokens of each of the {batch} sequences of {field}; use "
      f"{math.gcd(group, rows)}, or None, with which such a layer has groups of a size of its own"
    )
