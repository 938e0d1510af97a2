"""The report's page, as a parser reads it."""

import html.parser
import json
import re
import subprocess
import sys

import pytest

from moejax.comparison.quantities import MISSING
from moejax.comparison.report import write_report

VOID = {"meta", "link", "br", "image", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
  """Every start tag with its attributes, the visible text, and the tables row by row."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.text, self.tables, self._open = "", [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self._open.append(tag)
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self._open.pop() == tag

  def handle_data(self, data):
    if not {"style", "script"} & set(self._open):
      self.text += data + " "
      if "tr" in self._open and {"td", "th"} & set(self._open):
        self.tables[-1][-1][-1] += data + " "

  def of(self, tag: str) -> list[dict]:
    return [attributes for name, attributes in self.tags if name == tag]


def page_of(directory) -> Page:
  return Page((directory / "report" / "index.html").read_text())


@pytest.fixture(scope="module")
def page(finished) -> Page:
  return page_of(finished)


def test_the_finding_and_every_verdict_are_there(page, comparison):
  assert comparison["finding"] in page.text
  for pair in comparison["pairs"]:
    assert pair["verdict"] in page.text
  for number in ("1.020", "\N{MINUS SIGN}0.0703 ± 0.0041", "+1.29 ± 0.11 points", "step times equal within 5 %"):
    assert number in page.text


def test_the_members_table_has_every_member_then_the_baselines(page, comparison):
  head, *rows = page.tables[0]
  assert [row[0].split()[0] for row in rows] == [m["name"] for m in comparison["members"]] + ["unigram", "bigram"]
  assert all(len(row) == len(head) for row in rows)
  texts = [" ".join(cell.split()) for cell in rows[1]]
  assert texts == [
    "moe_small_8e MoE, matched; 4 layers, 128 wide; 8 experts, 2 per token, capacity 1.25, one layer in 2 sparse",
    "622k", "232k", "15.5 ms ± 1.3 %", "132k", "unknown peak 3.1 % dropped", "18.2 s", "1,176", "2.41M",
    "2.241 ± 0.012",
    "54.41 ± 0.23",
  ]  # fmt: skip
  assert [cell.strip() for cell in rows[-1][-2:]] == ["3.5213", "29.18"]


def test_every_number_is_there_unrounded(page, comparison):
  rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in page.tables[1]}
  assert rows["Key"] == [member["name"] for member in comparison["members"]]
  for key in comparison["members"][0]:
    if key != "name" and not isinstance(comparison["members"][0][key], str):
      expected = [member[key] for member in comparison["members"]]
      assert [None if cell == "\N{EN DASH}" else json.loads(cell) for cell in rows[key]] == expected


def test_provenance_is_flat_text(page):
  rows = {row[0].strip(): row[1].strip() for row in page.tables[-1]}
  assert rows["versions.jax"] == "0.10.2"
  assert rows["corpus.train"] == "python-standard-library"
  assert rows["corpus.bytes"] == "11204331"


def test_routers_end_with_their_health(page):
  rows = page.tables[2]
  assert [cell.strip() for cell in rows[0]] == ["Layer", "Largest / mean load", "Dropped", "Entropy (nats)"]
  assert [row[0].strip() for row in rows[1:]] == ["layer 2", "layer 4"]


def test_the_page_loads_nothing(page, finished):
  assert not page.of("link") and not page.of("img") and not page.of("iframe")
  assert all("src" not in attributes for _, attributes in page.tags)
  for tag, attributes in page.tags:
    for name in ("href", "xlink:href"):
      target = attributes.get(name, "#")
      assert target.startswith(("#", "data:image/png;base64,")) or tag == "a", (tag, target[:50])
  text = (finished / "report" / "index.html").read_text()
  assert not re.search(r"https?:|url\((?!#)|@import", text)
  assert len(text) < 3e6


def test_every_link_leads_to_a_file(page, finished):
  links = [attributes["href"] for attributes in page.of("a")]
  assert "../comparison.json" in links and "../runs/moe_large_8e/metrics.jsonl" in links
  assert all((finished / "report" / link).is_file() for link in links)
  assert len([link for link in links if link.endswith(".png")]) == 14


def test_every_plot_has_words_and_every_table_head_a_scope(page):
  plots = page.of("svg")
  assert len(plots) == 14 and all(len(attributes["aria-label"]) > 60 for attributes in plots)
  assert all(attributes["scope"] in ("row", "col") for attributes in page.of("th"))
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  assert len(ids) == len(set(ids))


def test_nothing_but_the_report_is_written(finished):
  assert not [path for path in (finished / "report").iterdir() if path.suffix not in (".html", ".png")]


def test_text_cannot_become_markup(comparison, write_comparison):
  comparison.update(suite="<b>", finding='a < b & "c" <script>alert(1)</script>', pairs=[])
  comparison["members"] = comparison["members"][:1]
  comparison["members"][0].update(name="x<i>&'\"", pair="x<i>&'\"")
  comparison["provenance"] = {"<u>": "</table><script>"}
  directory = write_comparison(comparison)
  write_report(directory)
  page = page_of(directory)
  assert {"b", "i", "u"} & {tag for tag, _ in page.tags} == set() and len(page.of("script")) == 1
  assert "<b>" in page.text and comparison["finding"] in page.text and "</table><script>" in page.text
  links = [attributes["href"] for attributes in page.of("a") if attributes["href"].endswith(".png")]
  assert len(links) == 4


def test_a_comparison_under_way_shows_what_there_is_and_names_the_rest(comparison, write_comparison):
  comparison.update(complete=False, finding=None, baselines=None)
  for member in comparison["members"][1:]:
    for key in ("bits_per_byte", "bits_per_byte_stderr", "accuracy", "accuracy_stderr"):
      member[key] = None
  for pair in comparison["pairs"]:
    pair.update({key: None for key in pair if "difference" in key})
  comparison["pairs"][1].update(moe=None, step_time_ratio=None, within_tolerance=None, verdict=None)
  untrained = tuple(member["name"] for member in comparison["members"][2:])
  directory = write_comparison(comparison, untrained)
  assert write_report(directory) == directory / "report" / "index.html"
  page = page_of(directory)
  assert "No finding yet" in page.text and "2.311 ± 0.012" in page.text
  assert "training result of moe_small_8e, moe_small_16e, dense_large, moe_large_8e, moe_large_16e" in page.text
  assert "metrics of moe_small_16e, dense_large, moe_large_8e, moe_large_16e" in page.text
  assert "baseline unigram_bits_per_byte" in page.text and "dense_large, no match yet" in page.text


def test_a_comparison_that_has_only_begun(comparison, write_comparison):
  names = [member["name"] for member in comparison["members"]]
  members = [{key: member[key] for key in ("name", "kind", "pair")} for member in comparison["members"]]
  directory = write_comparison({"suite": "s", "members": members, "pairs": []}, tuple(names))
  page = Page(write_report(directory).read_text())
  assert not page.of("svg") and f"step time of {', '.join(names)}" in page.text


def test_a_complete_comparison_says_what_was_not_trained(comparison, write_comparison):
  comparison["members"] = comparison["members"][:3]
  comparison["pairs"] = comparison["pairs"][:1]
  comparison["pairs"][0].update(within_tolerance=False, bits_per_byte_difference=0.004)
  comparison["members"][2].update(bits_per_byte=None, accuracy=None)
  directory = write_comparison(comparison, ("moe_small_16e",))
  page = Page(write_report(directory).read_text())
  assert "Not trained in this comparison: moe_small_16e." in page.text and "not complete" not in page.text
  assert "step times not equal within 5 %" in page.text and "MoE, closest but not equal" in page.text
  assert "no significant difference: within 2 standard errors" in page.text


def test_a_missing_comparison_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    write_report(tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_report_does_not_import_jax():
  code = "import sys, moejax.comparison.report, moejax.comparison.table; assert not {'jax', 'flax'} & set(sys.modules)"
  code += "; assert 'matplotlib.pyplot' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


def of_one_pair(comparison):
  """The comparison with its first pair alone, whose report is drawn in a third of the time."""
  return comparison | {"members": comparison["members"][:2], "pairs": comparison["pairs"][:1]}


def test_what_training_warned_of_stands_in_the_report(comparison, write_comparison):
  comparison = of_one_pair(comparison)
  directory = write_comparison(comparison)
  warning = "layer_02: expert 3 of 8 received no token"
  with (directory / "runs" / "moe_small_8e" / "metrics.jsonl").open("a") as file:
    file.write("\n" + json.dumps({"step": 10**6, "warnings": [warning]}) + "\n")
  write_report(directory)
  page = page_of(directory)
  assert f"moe_small_8e: {warning}" in page.text
  assert (directory / "report" / "routing_moe_small_8e.png").stat().st_size > 10_000


@pytest.mark.slow
def test_benchmarks_are_a_column_and_a_curve_each(comparison, write_comparison):
  comparison["members"], comparison["pairs"] = comparison["members"][:3], comparison["pairs"][:1]
  first, second, _ = comparison["members"]
  first |= {"tasks/sciq/acc": 0.31, "tasks/sciq/acc_stderr": 0.02, "tasks/average/accuracy": 0.31}
  second |= {"tasks/sciq/acc": 0.35, "tasks/sciq/acc_stderr": 0.02, "tasks/average/accuracy": 0.35}
  directory = write_comparison(comparison)
  write_report(directory)
  page = page_of(directory)
  (table,) = [table for table in page.tables if "sciq: acc (%)" in [cell.strip() for cell in table[0]]]
  cells = [[" ".join(cell.split()) for cell in row] for row in table]
  assert cells[0][1:] == ["sciq: acc (%)", "average: accuracy (%)"]
  assert cells[1][1:] == ["31.0 ± 2.0", "31.00"] and cells[2][1:] == ["35.0 ± 2.0", "35.00"]
  assert cells[3][1:] == [MISSING] * 2  # not asked
  assert (directory / "report" / "speed_tasks_sciq_acc.png").exists()
  assert (directory / "report" / "speed_tasks_average_accuracy.png").exists()


def test_a_comparison_without_benchmarks_does_not_speak_of_them(page):
  assert "Benchmarks" not in page.text


def test_a_benchmark_score_that_is_no_number_is_refused(comparison, write_comparison):
  comparison["members"][0]["tasks/sciq/acc"] = "high"
  with pytest.raises(ValueError, match="tasks/sciq/acc='high' is not a number"):
    write_report(write_comparison(comparison))


@pytest.mark.slow
def test_goodput_and_lost_time_are_a_row_for_each_member_that_has_them(comparison, write_comparison):
  comparison["members"][0] |= {"goodput/fraction": 0.931, "goodput/save_s": 12.5}
  comparison["members"][3] |= {"goodput/fraction": 0.5, "goodput/repeated_s": 90.0}
  directory = write_comparison(comparison)
  write_report(directory)
  (table,) = [table for table in page_of(directory).tables if "Goodput" in [cell.strip() for cell in table[0]]]
  heads, first, second = ([" ".join(cell.split()) for cell in row[1:]] for row in table)
  assert heads == ["Goodput", "Lost: save", "Lost: repeated"]
  assert first == ["93.1 %", "12.5 s", "0 s"] and second == ["50.0 %", "0 s", "90.0 s"]
  assert "dense_small" in table[1][0] and "dense_large" in table[2][0]


def test_a_comparison_without_goodput_does_not_speak_of_it(page):
  assert "Goodput" not in page.text
