"""The terminal's table."""

import io

import pytest
from rich.console import Console

from moejax.comparison.record import from_json
from moejax.comparison.table import terminal_table


def lines_of(comparison, width=100):
  console = Console(file=io.StringIO(), width=width)
  console.print(terminal_table(from_json(comparison)))
  return console.file.getvalue().splitlines()


def test_one_line_a_member_grouped_by_pair_then_baselines(comparison):
  lines = [line.strip() for line in lines_of(comparison) if line.strip()]
  assert lines[0] == "quickstart: dense and MoE at equal step time"
  assert [line.split()[0] for line in lines[3:]] == [
    "dense_small", "=", "moe_small_16e", "dense_large", "=", "moe_large_8e", "unigram", "bigram",
  ]  # fmt: skip
  assert lines[4].split() == [
    "=",
    "moe_small_8e",
    "232k/622k",
    "15.5",
    "ms",
    "1.020",
    "2.41M",
    "2.241",
    "±",
    "0.012",
    "54.41",
    "±",
    "0.23",
  ]
  assert lines[-1].split() == ["bigram", "baseline", "3.5213", "29.18"]


@pytest.mark.parametrize("name", ["d", "a_name_of_26_characters_xyz"])
def test_it_fits_in_100_columns_in_one_line_a_member(comparison, name):
  for member in comparison["members"]:
    member.update(bits_per_byte_stderr=0.0004, accuracy_stderr=0.0012, step_time_s=1.0123, parameters_total=35.4e9)
  comparison["members"][0]["pair"] = comparison["members"][0]["name"] = name
  comparison["members"][1]["pair"] = comparison["members"][2]["pair"] = comparison["pairs"][0]["dense"] = name
  lines = lines_of(comparison)
  assert max(map(len, lines)) <= 100
  assert len([line for line in lines if "±" in line]) == 6 and any(name in line for line in lines)


def test_what_is_not_known_is_a_dash_and_the_nearest_that_is_not_equal_is_marked(comparison):
  comparison["members"][1].update(bits_per_byte=None, accuracy=None)
  comparison["pairs"][0]["candidates"][0].update(equal_time="not established", step_time_ratio=None)
  line = next(line for line in lines_of(comparison) if "moe_small_8e" in line)
  assert line.split() == [
    "~", "moe_small_8e", "232k/622k", "15.5", "ms", "\N{EN DASH}", "2.41M", "\N{EN DASH}", "\N{EN DASH}",
  ]  # fmt: skip


def test_names_in_brackets_are_no_markup(comparison):
  comparison["suite"] = "[bold]x"
  assert "[bold]x" in lines_of(comparison)[0]


def test_where_the_terminal_is_narrow_each_figure_has_a_line_and_names_stay_whole(comparison):
  lines = lines_of(comparison, width=60)
  assert max(map(len, lines)) <= 60
  assert lines[0] == "quickstart: dense and MoE at equal step time"
  at = lines.index("= moe_small_8e")
  assert [line.split() for line in lines[at + 1 : at + 4]] == [
    ["active/total", "232k/622k"], ["step", "time", "15.5", "ms"], ["ratio", "1.020"],
  ]  # fmt: skip
