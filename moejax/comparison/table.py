"""Formats the members of a comparison as a table for the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from moejax.comparison import quantities
from moejax.comparison.record import Against, Comparison, Member, candidates, dense_names, equal_names, pair_members
from moejax.terminal import Fitting


def terminal_table(comparison: Comparison) -> Fitting:
  """One line per member: each dense member followed by its candidates, then the baselines.

  = marks a candidate with established equal time, ~ the closest candidate if its equal time is not established.
  """
  title = Text(f"{comparison.suite}: dense and MoE at equal step time")
  table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", collapse_padding=True, pad_edge=False)
  table.add_column("member", no_wrap=True)
  for head in ("active/total", "step time", "ratio", "tokens", "bits/byte", "accuracy %"):
    table.add_column(head, justify="right", no_wrap=True)
  equal, against = equal_names(comparison), candidates(comparison)
  for dense in dense_names(comparison):
    members = pair_members(comparison, dense)
    for member in members:
      mark = "" if member.kind == "dense" else "  " if not member.matched else "~ "
      table.add_row(*_row("= " if member.name in equal else mark, member, against.get(member.name)))
    table.add_section()
  for name in ("unigram", "bigram"):
    bits, accuracy = (getattr(comparison.baselines, f"{name}_{key}") for key in ("bits_per_byte", "accuracy"))
    result = (quantities.with_stderr(bits, None), quantities.with_stderr(accuracy, None, scale=100.0))
    table.add_row(Text(f"{name} baseline"), *[""] * 4, *result)
  return Fitting(table)


def _row(mark: str, member: Member, against: Against | None) -> tuple[Text | str, ...]:
  # As Text, so that [brackets] in a name are not interpreted as markup.
  name = Text(mark + member.name, style="bold" if member.matched else "")
  return (
    name,
    f"{quantities.count(member.parameters_active)}/{quantities.count(member.parameters_total)}",
    quantities.duration(member.step_time_s),
    quantities.ratio(against.step_time_ratio) if against else "",
    quantities.count(member.tokens),
    quantities.with_stderr(member.bits_per_byte, member.bits_per_byte_stderr),
    quantities.with_stderr(member.accuracy, member.accuracy_stderr, scale=100.0),
  )
