"""Which values of a layer the forward pass saves for the backward pass, by name.

A layer computes, in this order: queries, keys and values; their context (the output of the attention kernel); the
output of attention; the rows of experts; the products into a hidden layer, of experts or not; the products out of it.
"""

from collections.abc import Iterable
from typing import Literal, get_args

Remat = Literal["none", "products", "dots", "attention", "layer_inputs", "selected"]

Saved = Literal[
  "attention", "products", "layer_inputs", "queries", "keys_values", "context", "attention_out", "feed_forward_in",
  "feed_forward_out", "expert_rows", "experts_in", "experts_out",
]  # fmt: skip

ROUTER = "router"
"""Name of a router's logits, choices and rows. They are saved with any value of experts, which are then those of the
same choices."""

OF_EXPERTS = ("expert_rows", "experts_in", "experts_out")

GROUPS: dict[str, tuple[str, ...]] = {
  "attention": ("queries", "keys_values", "context", "attention_out"),
  "products": ("feed_forward_in", "feed_forward_out", *OF_EXPERTS, ROUTER),
}
"""The values of each name that stands for several."""

SAVED: dict[Remat, tuple[Saved, ...]] = {
  "none": (),
  "products": ("attention", "products", "layer_inputs"),
  "dots": ("attention", "feed_forward_in", "feed_forward_out", "layer_inputs"),
  "attention": ("attention", "layer_inputs"),
  "layer_inputs": ("layer_inputs",),
  "selected": ("layer_inputs",),
}
"""What each value of `Model.remat` saves by name, without `Model.save_activations`."""


def values_of(names: Iterable[str]) -> tuple[str, ...]:
  """The values that names of `Saved` stand for, each once."""
  return tuple(dict.fromkeys(value for name in names for value in GROUPS.get(name, (name,))))


def saved_values(remat: Remat, save_activations: tuple[Saved, ...]) -> tuple[str, ...]:
  """The values that are saved by name, so that they can be offloaded."""
  found = values_of((*SAVED[remat], *save_activations))
  return (*found, ROUTER) if set(found) & set(OF_EXPERTS) and ROUTER not in found else found


def policies_that_save(name: str) -> list[str]:
  """The values of `Model.remat` that save what `name` stands for."""
  return [remat for remat in get_args(Remat) if set(values_of((name,))) <= set(values_of(SAVED[remat]))]
