"""Dispatches: what is refused, each in a line with the remedy, and their facts."""

import pytest

from moejax.config import DenseDispatch, Dispatch, EinsumDispatch, GroupedDispatch
from moejax.errors import UserError


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    (EinsumDispatch, {"priority": "random"}, r"dispatch\.priority='random' is not one of choice, token$"),
    (GroupedDispatch, {"exchange": "none"}, r"dispatch\.exchange='none' is not one of all_to_all, all_gather$"),
    (GroupedDispatch, {"receive_factor": 0.0}, r"dispatch\.receive_factor=0\.0 must be above 0$"),
    (GroupedDispatch, {"exchange_chunks": 0}, r"dispatch\.exchange_chunks=0 must lie between 1 and 64$"),
    (
      GroupedDispatch,
      {"exchange": "all_gather", "receive_factor": 2.0},
      r"dispatch\.receive_factor=2\.0 would have no effect with dispatch\.exchange=all_gather",
    ),
  ],
)
def test_what_cannot_be_meant_is_refused(kind, fields, message):
  with pytest.raises(UserError, match=f"^{message}"):
    kind(**fields)


def test_facts_of_each_kind():
  facts = ("has_capacity", "has_masks", "looks_ahead")
  made = (EinsumDispatch(), EinsumDispatch(priority="token"), GroupedDispatch(), DenseDispatch())
  assert [[fact for fact in facts if getattr(dispatch, fact)] for dispatch in made] == [
    list(facts), ["has_capacity", "has_masks"], [], [],
  ]  # fmt: skip


def test_a_model_that_generates_drops_nothing():
  assert EinsumDispatch(priority="token").without_drops() == GroupedDispatch()
  assert GroupedDispatch(exchange="all_gather").without_drops() == GroupedDispatch(exchange="all_gather")
  assert GroupedDispatch(receive_factor=1.0, exchange_chunks=2).without_drops() == GroupedDispatch()
  assert DenseDispatch().without_drops() == DenseDispatch()


def test_fields_that_need_an_exchange_are_those_that_are_set():
  assert GroupedDispatch(receive_factor=2.0).exchange_fields == {"receive_factor": 2.0}
  assert GroupedDispatch(exchange="all_gather").exchange_fields == {"exchange": "all_gather"}
  assert not GroupedDispatch().exchange_fields and not EinsumDispatch(priority="token").exchange_fields


def test_a_dispatch_without_a_kind_is_einsum():
  assert Dispatch(priority="token") == EinsumDispatch(priority="token")
