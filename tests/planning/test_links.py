"""Collectives under way at once, against times computed by hand."""

import pytest

from moejax.planning.collectives import Collective
from moejax.planning.links import Links


def moved(seconds: float, *links: str) -> Collective:
  return Collective("all-gather", "data", 4, 1, 1.0, seconds, frozenset(links))


def test_one_alone_takes_its_time_and_what_has_arrived_is_not_waited_for():
  links = Links()
  links.begin("a", moved(2.0, "x"), 1.0)
  assert links.end("a", 1.5) == pytest.approx(3.0)
  assert links.end("a", 5.0) == pytest.approx(5.0)


def test_a_small_one_shares_the_links_with_a_large_one_that_was_begun_before():
  links = Links()
  links.begin("large", moved(10.0, "x"), 0.0)
  links.begin("small", moved(1.0, "x"), 0.0)
  assert links.end("small", 0.0) == pytest.approx(2.0)
  assert links.end("large", 2.0) == pytest.approx(11.0)


def test_those_along_different_dimensions_do_not_meet():
  links = Links()
  links.begin("a", moved(3.0, "x"), 0.0)
  links.begin("b", moved(3.0, "y", "z"), 0.0)
  assert links.end("a", 0.0) == pytest.approx(3.0)
  assert links.end("b", 0.0) == pytest.approx(3.0)


def test_the_busiest_dimension_counts():
  links = Links()
  links.begin("a", moved(4.0, "x"), 0.0)
  links.begin("b", moved(4.0, "x", "y"), 0.0)
  links.begin("c", moved(1.0, "y"), 0.0)
  # All at half speed until c arrives at 2, when a and b have 3 left each and go on sharing x.
  assert links.end("c", 0.0) == pytest.approx(2.0)
  assert links.end("a", 2.0) == pytest.approx(8.0)
  assert links.end("b", 8.0) == pytest.approx(8.0)


def test_one_that_moves_nothing_is_done_at_once():
  links = Links()
  links.begin("b", moved(3.0, "x"), 0.0)
  links.begin("a", moved(0.0), 0.0)
  assert links.end("a", 0.0) == 0.0
  assert links.end("b", 0.0) == pytest.approx(3.0)
