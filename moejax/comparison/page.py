"""Writes the report as a self-contained HTML page with all styles, scripts and figures."""

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from moejax.comparison import curves, page_tables, quantities, record
from moejax.comparison.markup import Markup, element, join
from moejax.comparison.page_style import CSS, SORT
from moejax.comparison.palette import member_colors
from moejax.comparison.plots.drawing import Plot
from moejax.comparison.plots.speed_accuracy import task_measures
from moejax.comparison.record import Comparison, MatchedPair

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
CLEAR = 2.0
"""Number of standard errors from which a difference is reported as significant."""


def page(
  comparison: Comparison,
  metrics: Mapping[str, curves.Metrics],
  speed: Sequence[Plot],
  losses: Sequence[Plot],
  loads: Mapping[str, Plot],
  routers: Mapping[str, Plot],
  benchmarks: Sequence[Plot],
) -> str:
  """The whole document."""
  title = f"{comparison.suite}: dense versus mixture-of-experts at equal step time"
  head = join(
    element("meta", charset="utf-8"),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("meta", name="color-scheme", content="light dark"),
    element("meta", http_equiv="Content-Security-Policy", content=POLICY),
    element("title", title),
    element("style", Markup(CSS)),
  )
  colors = member_colors(comparison)
  main = element(
    "main",
    _opening(comparison, metrics),
    _section("Pairs", _pairs(comparison, colors)),
    _section("Speed and accuracy", _figures(speed, "No member has both a step time and a result yet.")),
    _section("Members", _members(comparison, colors)),
    _section("Benchmarks", _benchmarks(comparison, colors, benchmarks)) if benchmarks else None,
    _section("Training loss", _figures(losses, "No member has logged a loss and a step time yet.")),
    _section("Expert load", _loads(comparison, metrics, loads)),
    _section("Routing", _routing(metrics, routers)),
    _section("Method", _method(comparison)),
    _section("Goodput", _goodput(comparison, colors)) if any(member.goodput for member in comparison.members) else None,
    _section("Provenance", _provenance(comparison, metrics)),
  )
  body = element("body", main, element("script", Markup(SORT)))
  return "<!doctype html>\n" + element("html", element("head", head), body, lang="en") + "\n"


def _section(title: str, *children: object) -> Markup:
  name = title.lower().replace(" ", "-")
  return element("section", element("h2", title, id=name), *children, aria_labelledby=name)


def _opening(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> Markup:
  finding = comparison.finding or "No finding yet: the comparison is not complete."
  notice = None
  if not comparison.complete:
    lacking = record.missing(comparison, metrics)
    items = element("ul", *(element("li", text) for text in lacking)) if lacking else None
    notice = element("div", "This comparison is not complete. Still missing:", items, class_="notice", role="note")
  return element(
    "header",
    element("p", "moejax: dense versus mixture-of-experts at equal step time", class_="eyebrow"),
    element("h1", comparison.suite),
    element("p", finding, class_="finding"),
    notice,
  )


def _pairs(comparison: Comparison, colors: Mapping[str, str]) -> Markup:
  cards = [_card(pair, comparison.tolerance, colors) for pair in comparison.pairs]
  if not cards:
    return element("p", "No pair is matched yet.", class_="note")
  return join(
    element("div", *cards, class_="cards"),
    element(
      "p",
      "Differences are MoE minus dense, paired by document, ± standard error. Fewer bits per byte are better.",
      class_="note",
    ),
  )


def _card(pair: MatchedPair, tolerance: float, colors: Mapping[str, str]) -> Markup:
  within, verdict = pair.within_tolerance, pair.verdict
  if within is None:
    chip = element("span", "not matched yet", class_="chip warn")
  elif within:
    chip = element("span", f"✓ step times equal within {quantities.percent(tolerance, 0)}", class_="chip good")
  else:
    chip = element("span", f"✗ step times not equal within {quantities.percent(tolerance, 0)}", class_="chip warn")
  bits, bits_stderr = pair.bits_per_byte_difference, pair.bits_per_byte_difference_stderr
  accuracy, accuracy_stderr = pair.accuracy_difference, pair.accuracy_difference_stderr
  rows = (
    ("Step-time ratio", quantities.ratio(pair.step_time_ratio), "MoE / dense"),
    ("Bits per byte", quantities.with_stderr(bits, bits_stderr, signed=True), _side(bits, bits_stderr, -1)),
    (
      "Accuracy",
      quantities.with_stderr(accuracy, accuracy_stderr, scale=100.0, unit="points", signed=True),
      _side(accuracy, accuracy_stderr, 1),
    ),
  )
  facts = [join(element("dt", name), element("dd", value, element("small", words))) for name, value, words in rows]
  return element(
    "article",
    element("h3", f"{pair.dense} and {pair.moe}" if pair.moe else f"{pair.dense}, no match yet"),
    chip,
    element("dl", *facts),
    element("p", verdict) if verdict else None,
    class_="card",
    style=f"--pair:{colors[pair.moe or pair.dense]}",
  )


def _side(difference: float | None, stderr: float | None, better: int) -> str | None:
  """The side that a difference favors, if it is significant."""
  if not record.known(difference) or not record.known(stderr):
    return None
  assert difference is not None and stderr is not None
  if abs(difference) <= CLEAR * stderr:
    return f"no significant difference: within {CLEAR:g} standard errors"
  return f"{'MoE' if difference * better > 0 else 'dense'} is better, by more than {CLEAR:g} standard errors"


def _figures(plots: Sequence[Plot], nothing: str) -> Markup:
  if not plots:
    return element("p", nothing, class_="note")
  return element("div", *(_figure(plot) for plot in plots), class_="plots")


def _figure(plot: Plot, below: Markup | None = None) -> Markup:
  link = element("a", "PNG", href=quote(f"{plot.name}.png"))
  caption = element("figcaption", plot.caption, " ", link)
  return element("figure", element("div", Markup(plot.svg), class_="plot"), caption, below)


def _members(comparison: Comparison, colors: Mapping[str, str]) -> Markup:
  note = (
    "± is the standard error over held-out documents or, for step times, the interquartile range divided by the "
    "median. "
    "Budget is the training time of the pair. Tokens are training tokens without padding. MFU is the model FLOPs per "
    "second divided by the peak FLOP/s of the devices; dropped choices of experts are not counted. It is shown if the "
    "peak of the device is known."
  )
  untrained = [member.name for member in comparison.members if member.bits_per_byte is None]
  if untrained and comparison.complete:
    note += f" Not trained in this comparison: {', '.join(untrained)}."
  return join(
    page_tables.members_table(comparison, colors),
    element("p", note, class_="note"),
    element("details", element("summary", "Every number, unrounded"), page_tables.numbers_table(comparison)),
  )


def _benchmarks(comparison: Comparison, colors: Mapping[str, str], plots: Sequence[Plot]) -> Markup:
  measures = task_measures(comparison)
  note = (
    "Scores and standard errors of lm-evaluation-harness. The average is the unweighted mean of the accuracies. The "
    "options of each benchmark are in the results.json of a run."
  )
  return join(
    page_tables.benchmarks_table(comparison, colors, measures),
    element("p", note, class_="note"),
    _figures(plots, ""),
  )


def _loads(comparison: Comparison, metrics: Mapping[str, curves.Metrics], loads: Mapping[str, Plot]) -> Markup:
  if not loads:
    return element("p", "No MoE member has logged its router load yet.", class_="note")
  figures: list[Markup | None] = []
  for name, plot in loads.items():
    table = page_tables.router_table(name, metrics[name])
    # The table of a single member is next to its plot. With several members, each table is below its plot.
    figures += [_figure(plot), table] if len(loads) == 1 else [_figure(plot, table)]
  return join(
    element(
      "p",
      "A load of 1 means that an expert receives as many choices as in a balanced layer. The tables show means over "
      "the "
      "last tenth of training. Dropped is the fraction of choices beyond the capacity of an expert.",
      class_="note",
    ),
    element("div", *figures, class_="plots"),
  )


def _routing(metrics: Mapping[str, curves.Metrics], routers: Mapping[str, Plot]) -> Markup:
  """Entropy, dropped tokens, auxiliary losses, and the warnings of training."""
  if not routers:
    return element("p", "No member has logged router metrics yet.", class_="note")
  told = [f"{name}: {text}" for name, rows in metrics.items() for row in rows for text in row.get("warnings", ())]
  notice = element(
    "div", "Training warned:", element("ul", *(element("li", text) for text in told)), class_="notice", role="note"
  )
  return join(notice if told else None, _figures(list(routers.values()), ""))


def _method(comparison: Comparison) -> Markup:
  tolerance = quantities.percent(comparison.tolerance, 0)
  seeds = sorted({member.seed for member in comparison.members if member.seed is not None})
  trained = f"one training seed ({', '.join(map(str, seeds))})" if len(seeds) == 1 else "one training run per member"
  steps = (
    "Measure: all members take turns on the same devices, so that changes in speed affect all of them equally. The "
    "step "
    "time is the median.",
    f"Match: each dense model is paired with the MoE candidate whose step time is closest. They are considered equal "
    f"within {tolerance}.",
    "Budget: the training time of a pair is the time that its dense model needs for its compute-optimal number of "
    "tokens.",
    "Train: each member trains on the same text for the number of steps that fit into this time at its step time.",
    "Evaluate: all members are evaluated on the same held-out documents by bits per byte and next-token accuracy.",
  )
  return join(
    element("ol", *(element("li", step) for step in steps)),
    element(
      "p",
      "The standard error is over held-out documents, and paired by document for differences. All results are from "
      f"{trained}, so it includes the variation between documents, but not the variation between seeds, data orders or "
      "learning rates.",
    ),
  )


def _goodput(comparison: Comparison, colors: Mapping[str, str]) -> Markup:
  note = (
    "Goodput is the fraction of the time of a run that was spent on useful training steps. The other columns are the "
    "lost seconds by cause. They are not part of the training time by which members are compared."
  )
  return join(page_tables.goodput_table(comparison, colors), element("p", note, class_="note"))


def _provenance(comparison: Comparison, metrics: Mapping[str, curves.Metrics]) -> Markup:
  logged = [member.name for member in comparison.members if metrics.get(member.name)]
  links = [element("a", "comparison.json", href="../comparison.json")]
  links += [element("a", f"metrics of {name}", href=f"../runs/{quote(name)}/metrics.jsonl") for name in logged]
  listed = join(*(join(", " if i else None, link) for i, link in enumerate(links)))
  return join(page_tables.provenance_table(comparison.provenance), element("p", "Data: ", listed, "."))
