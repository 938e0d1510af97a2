"""The configuration of each run of a comparison, and how it differs from that of the dense model of its pair."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.comparison.page_tables import Cell, Table, flat
from moejax.comparison.quantities import MISSING
from moejax.comparison.record import Comparison, dense_names, pair_members
from moejax.files import read_json


def read_configurations(comparison: Comparison, directory: Path) -> dict[str, dict[str, str]]:
  """Every field of the experiment of each member that has been started, as text by dotted name."""
  configurations = {}
  for member in comparison.members:
    try:
      content = read_json(directory / "runs" / member.name / "experiment.json")
    except (OSError, ValueError):  # it has not been started, or the file is damaged, which is for `compare` to report
      continue
    if isinstance(content, dict):
      configurations[member.name] = dict(flat(content))
  return configurations


def differences(comparison: Comparison, configurations: Mapping[str, Mapping[str, str]]) -> list[Table]:
  """For each pair, the fields in which its members differ: a row for each field and a column for each member."""
  tables = []
  for dense in dense_names(comparison):
    names = [member.name for member in pair_members(comparison, dense) if member.name in configurations]
    if dense not in names or len(names) < 2:
      continue
    fields = dict.fromkeys(field for name in names for field in configurations[name] if field != "name")
    rows = []
    for field in fields:
      values = [configurations[name].get(field, MISSING) for name in names]
      if len(set(values)) > 1:
        rows.append((Cell(field), *map(Cell, values)))
    title = f"Fields in which the pair of {dense} differs"
    tables.append(Table(f"differences-{dense}", title, ("Field", *names), tuple(rows), words=True))
  return tables


def configuration_table(configurations: Mapping[str, Mapping[str, Any]]) -> Table:
  """Every field of every run."""
  fields = dict.fromkeys(field for fields in configurations.values() for field in fields)
  rows = tuple(
    (Cell(field), *(Cell(str(of.get(field, MISSING))) for of in configurations.values())) for field in fields
  )
  return Table("configurations", "Every field of every run", ("Field", *configurations), rows, words=True)
