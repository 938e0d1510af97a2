"""Formats the output of `moejax show` and `moejax list`, without importing JAX."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moejax.config.experiment import Experiment, Suite
from moejax.config.parameters import flops_per_token, full_sequence_steps, parameter_counts, tokens_per_step
from moejax.config.plain import to_plain
from moejax.config.walk import leaves
from moejax.terminal import Fitting


def facts(experiment: Experiment) -> dict[str, Any]:
  """The numbers and the configuration of an experiment, as `moejax show NAME --json` prints them.

  Steps and tokens are computed for sequences without padding, since the text is not read.
  """
  parameters, steps = parameter_counts(experiment.model), full_sequence_steps(experiment)
  return {
    "name": experiment.name,
    "parameters_total": parameters.total,
    "parameters_active": parameters.active,
    "parameters_embedding": parameters.embedding,
    "parameters_multi_token": parameters.total - parameter_counts(experiment.model.main).total,
    "parameters_non_embedding": parameters.non_embedding,
    "parameters_active_non_embedding": parameters.active_non_embedding,
    "model_flops_per_token": flops_per_token(experiment.model, experiment.data.sequence_length),
    "tokens_per_step": tokens_per_step(experiment),
    "steps": steps,
    "tokens": steps * tokens_per_step(experiment),
    "training_flops": steps
    * tokens_per_step(experiment)
    * flops_per_token(experiment.model, experiment.data.sequence_length),
    "config": to_plain(experiment),
  }


def suite_facts(suite: Suite) -> dict[str, Any]:
  """`facts` of every member, and the settings of the suite."""
  pairs = [
    {
      "dense": pair.dense.name,
      "candidates": [candidate.name for candidate in pair.candidates],
      "seeds": pair.seeds,
      "upcycled": [to_plain(each) for each in pair.upcycled],
    }
    for pair in suite.pairs
  ]
  return {**to_plain(suite), "pairs": pairs, "members": [facts(member) for member in suite.members]}


def experiment_page(experiment: Experiment) -> RenderableType:
  """Formats parameters, FLOPs, budget and every field of an experiment."""
  numbers = facts(experiment)
  table = Table(box=None, show_header=False, pad_edge=False)
  table.add_column(justify="right")
  table.add_column()
  budget = experiment.training.budget
  source = (
    "as set"
    if experiment.training.steps
    else f"{budget.tokens_per_parameter:g} tokens per parameter ({budget.parameters})"
  )
  rows = [
    ("parameters", f"{numbers['parameters_total']:,}"),
    ("active", f"{numbers['parameters_active']:,}"),
    ("embedding", f"{numbers['parameters_embedding']:,}"),
    ("multi-token prediction", f"{numbers['parameters_multi_token']:,}"),
    ("non-embedding", f"{numbers['parameters_non_embedding']:,}"),
    ("training FLOPs per token", f"{numbers['model_flops_per_token']:,}"),
    ("tokens per step", f"{numbers['tokens_per_step']:,}"),
    ("budget", f"{numbers['tokens']:,} tokens, {numbers['steps']:,} steps of full sequences: {source}"),
    ("training FLOPs", f"{numbers['training_flops']:.3e}"),
  ]
  for name, value in rows:
    if value == "0":  # the model has none
      continue
    table.add_row(Text(name, style="dim"), value)
  return Group(Text(experiment.name, style="bold"), table, Text(), _tree(experiment))


def suite_page(suite: Suite) -> RenderableType:
  """Formats a table of the members and the settings of a suite."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for head in ("member", "pair", "total", "active", "FLOPs per token", "tokens per step"):
    table.add_column(head, justify="left" if head in ("member", "pair") else "right", no_wrap=True)
  for pair in suite.pairs:
    for experiment in (pair.dense, *pair.candidates):
      numbers = facts(experiment)
      table.add_row(
        experiment.name,
        pair.dense.name,
        *(
          f"{numbers[name]:,}"
          for name in ("parameters_total", "parameters_active", "model_flops_per_token", "tokens_per_step")
        ),
      )
  settings = "\n".join(f"{name} = {value}" for name, value in _fields(suite))
  return Group(Text(suite.name, style="bold"), Fitting(table), Text(settings))


def scores_page(scores: Mapping[str, Any], results: Mapping[str, Any]) -> RenderableType:
  """Formats the main score of each benchmark with the numbers of examples, few-shot examples and truncated prompts."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for head in ("benchmark", "metric"):
    table.add_column(head, no_wrap=True)
  cut = results.get("cut")  # None in a results.json that the harness itself wrote
  for head in ("score", "examples", "shots", *(["cut"] if cut else [])):
    table.add_column(head, justify="right", no_wrap=True)
  for name, score in scores.items():
    tasks = _subtasks(name, results["group_subtasks"])
    examples = sum(results["n-samples"][task]["effective"] for task in tasks)
    stderr = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    shots = ", ".join(str(n) for n in sorted({results["n-shot"][task] for task in tasks}))
    row = [f"{score.value:.4f}{stderr}", f"{examples:,}", shots]
    if cut:
      requests, of_those = (sum(cut[task][what] for task in tasks) for what in ("requests", "cut"))
      row.append(f"{of_those:,}/{requests:,}" if of_those else "0")
    table.add_row(Text(name), Text(score.metric), *row)
  return Fitting(table)


def list_page(rows: list[tuple[str, Experiment | Suite, str]]) -> RenderableType:
  """Formats a table with one line per experiment and suite."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("name", no_wrap=True)
  table.add_column("kind")
  table.add_column("total / active", justify="right", no_wrap=True)
  table.add_column("what")
  for name, value, summary in rows:
    if isinstance(value, Suite):
      table.add_row(Text(name, style="bold"), "suite", f"{len(value.members)} members", summary)
    else:
      parameters = parameter_counts(value.model)
      kind = "moe" if value.model.moe else "dense"
      table.add_row(name, kind, f"{_short(parameters.total)} / {_short(parameters.active)}", summary)
  return table


def _subtasks(name: str, groups: Mapping[str, list[str]]) -> list[str]:
  """The tasks of a group, including nested groups. For a task, its own name."""
  children = groups.get(name) or []
  return [task for child in children for task in _subtasks(child, groups)] if children else [name]


def _tree(experiment: Experiment) -> Text:
  """Formats every field as its command-line option, with its value."""
  text = Text()
  for name, value in _fields(experiment):
    text.append(f"--{name.replace('_', '-')}", style="cyan")
    text.append(f" {value}\n")
  return text


def _fields(configuration: Any) -> list[tuple[str, Any]]:
  """Path and value of every field except the name and the members."""
  return [
    (path, " ".join(map(str, value)) if isinstance(value, tuple) else value)
    for path, value in leaves(configuration)
    if path != "name" and path.partition(".")[0] != "pairs"
  ]


def _short(number: int) -> str:
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if number >= 0.9995 * size:  # three digits would round up to the next unit
      return f"{number / size:.3g}{unit}"
  return str(number)
