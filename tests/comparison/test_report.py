"""The report's page, as a parser reads it."""

import csv
import html.parser
import io
import json
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest

from moejax.comparison import basis, palette
from moejax.comparison.page_tables import Cell, Table
from moejax.comparison.plots.differences import differences
from moejax.comparison.plots.drawing import draw
from moejax.comparison.plots.loss_curves import loss_curves
from moejax.comparison.plots.speed_accuracy import speed_accuracy
from moejax.comparison.quantities import MISSING
from moejax.comparison.record import from_json
from moejax.comparison.report import report_page, write_report

pytestmark = pytest.mark.usefixtures("without_library")

VOID = {"meta", "link", "br", "input"}


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


@pytest.fixture(scope="module")
def text(finished) -> str:
  return (finished / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def page(text) -> Page:
  return Page(text)


def table_of(page: Page, head: str) -> list[list[str]]:
  """The table with this column, with single spaces."""
  (table,) = [table for table in page.tables if head in [cell.strip() for cell in table[0]]]
  return [[" ".join(cell.split()) for cell in row] for row in table]


def test_the_finding_and_every_verdict_are_there(page, comparison):
  assert comparison["finding"] in page.text
  for pair in comparison["pairs"]:
    assert pair["verdict"] in page.text
  for number in (
    "1.020",
    "\N{MINUS SIGN}0.070 (\N{MINUS SIGN}0.080 to \N{MINUS SIGN}0.061)",
    "+1.29 (+1.04 to +1.54) points",
    "training times equal within 5 %",
  ):
    assert number in page.text


def test_the_members_table_has_every_member_then_the_baselines(page, comparison):
  head, *rows = table_of(page, "Active parameters")
  assert [row[0].split()[0] for row in rows] == [m["name"] for m in comparison["members"]] + ["unigram", "bigram"]
  assert all(len(row) == len(head) for row in rows)
  assert rows[1] == [
    "moe_small_8e MoE, equal step time; 4 layers, 128 wide; 8 experts, 2 per token, capacity 1.25, one layer in 2 "
    "sparse",
    "622k", "232k", "15.5 ms ± 1.3 %", "132k", f"{MISSING} 3.1 % dropped, load 2.40 x mean", "18.2 s",
    "1,176", "2.41M", "19.0 s",
    "2.241 ± 0.012", "54.41 ± 0.23",
  ]  # fmt: skip
  assert rows[-1][-2:] == ["3.5213", "29.18"]


def test_every_number_of_comparison_json_is_there_unrounded(page, comparison):
  head, *rows = next(table for table in map(clean, page.tables) if table[1][0] == "name")
  assert head == ["Key"] + [member["name"] for member in comparison["members"]]
  shown = {row[0]: row[1:] for row in rows}
  for key in comparison["members"][0]:
    expected = [member[key] for member in comparison["members"]]
    if isinstance(expected[0], list):
      texts = [", ".join(item if isinstance(item, str) else json.dumps(item) for item in each) for each in expected]
      assert shown[key] == texts
    elif not isinstance(expected[0], str):
      assert [None if cell == MISSING else json.loads(cell) for cell in shown[key]] == expected


def clean(table: list[list[str]]) -> list[list[str]]:
  return [[" ".join(cell.split()) for cell in row] for row in table]


def test_the_downloads_have_the_exact_values(page, comparison):
  links = {link["download"]: link["href"] for link in page.of("a") if "download" in link}
  read = from_json(json.loads(unquote(links["comparison.json"].partition(",")[2])))
  assert read == from_json(comparison)
  rows = list(csv.DictReader(io.StringIO(unquote(links["members.csv"].partition(",")[2]))))
  for row, member in zip(rows, comparison["members"], strict=False):
    assert row["Member"] == member["name"] and float(row["Step time"]) == member["step_time_s"]
    assert float(row["Bits per byte"]) == member["bits_per_byte"] and float(row["Tokens"]) == member["tokens"]


def test_a_csv_file_runs_no_formula():
  table = Table("t", "t", ("Name",), ((Cell("=1+1", "=1+1"), Cell("@x"), Cell("minus 2", -2)),))
  assert table.csv() == "Name\n'=1+1,'@x,-2\n"


def test_provenance_is_flat_text(page):
  rows = {row[0]: row[1] for row in clean(page.tables[-1])}
  assert rows["versions.jax"] == "0.10.2"
  assert rows["corpus.train"] == "python-standard-library"
  assert rows["corpus.bytes"] == "11204331"


def test_routers_end_with_their_health(page):
  tables = [table for table in map(clean, page.tables) if table[0][0] == "Layer"]
  assert len(tables) == 4
  assert tables[0][0] == ["Layer", "Largest / mean load", "Dropped", "Entropy (nats)"]
  assert [row[0] for row in tables[0][1:]] == ["layer 2", "layer 4"]


def test_the_first_screen_says_what_the_answer_rests_on_and_what_would_change_it(page):
  for words in ("What this rests on", "for each member", "612 documents, 11.2M bytes", " runs, ", "1 x cpu"):
    assert words in page.text
  assert "Another scale or a longer budget" in page.text and "3.52" in page.text


def test_several_seeds_and_the_weight_of_documents_are_told(comparison, metrics_of):
  for member in comparison["members"]:
    member["runs"] = [member["name"]]
  assert [text for text in basis.would_change(from_json(comparison), {}) if "One seed does not show" in text]
  comparison["members"][0]["runs"] = ["dense_small", "dense_small-seed1"]
  for pair in comparison["pairs"]:
    pair["documents_effective"] = 4.2
  rows = [*metrics_of(comparison["members"][0]), {"step": 10**6, "held_out/documents": 18, "held_out/targets": 20_000}]
  read, metrics = from_json(comparison), {"dense_small": rows}
  facts = dict(basis.rests_on(read, metrics))
  assert facts["Training seeds"] == "1 for each member, up to 2 for dense_small"
  assert facts["Held-out text"] == "18 documents, 20.0k tokens; as informative as 4 documents of equal size"
  assert facts["Training"].startswith("7 runs, ")
  assert not [text for text in basis.would_change(read, metrics) if "seed" in text]
  assert [text for text in basis.would_change(read, metrics) if "18 documents are few" in text]


def test_intervals_outcomes_and_the_three_kinds_of_fairness_are_shown_as_they_stand(comparison, write_comparison):
  comparison = of_one_pair(comparison)
  basis = {
    "equal": "flops", "at": 3.2e12, "outcome": "candidate better", "bits_per_byte_difference": -0.031,
    "bits_per_byte_difference_interval": [-0.05, -0.012], "factor": 1.42, "factor_interval": [1.1, 1.8],
  }  # fmt: skip
  candidate = {
    "moe": "moe_small_8e", "step_time_ratio": 1.02, "step_time_ratio_interval": [0.97, 1.081],
    "equal_time": "not established", "outcome": "not established", "notes": ["12 % of the choices <were> dropped"],
    "bits_per_byte_difference": -0.07, "bits_per_byte_difference_interval": [-0.12, -0.02], "bases": [basis],
    "bits_per_byte_detectable": 0.044, "whole_run_ratio": 1.21, "within_tolerance": True,
  }  # fmt: skip
  comparison["pairs"][0] |= candidate | {"candidates": [candidate]}
  page = Page(report_page(write_comparison(comparison)))
  row = table_of(page, "Detectable")[1]
  assert row[0] == "moe_small_8e 12 % of the choices <were> dropped" and row[2] == "1.020 (0.970 to 1.081)"
  minus = "\N{MINUS SIGN}"
  assert row[3:] == ["1.210", "not established", f"{minus}0.070 ({minus}0.120 to {minus}0.020)", "0.044", MISSING,
                     "not established"]  # fmt: skip
  assert table_of(page, "Fair by")[1][1:] == [
    "equal training FLOPs", "3.20T", f"{minus}0.031 ({minus}0.050 to {minus}0.012)", "candidate better",
    "1.420 (1.100 to 1.800)",
  ]  # fmt: skip
  assert "not established that training times are equal within 5 %" in page.text
  figure = differences(from_json(comparison))
  assert [row["high"] for row in figure.spec["data"]["values"]] == [-0.02]
  assert list(figure.drawings()) == ["bits_per_byte_difference", "step_time_ratio"]


def test_each_run_shows_in_what_it_differs_from_its_pair(comparison, write_comparison):
  directory = write_comparison(of_one_pair(comparison))
  for name, experts in (("dense_small", None), ("moe_small_8e", {"num_experts": 8, "router": {"kind": "<b>"}})):
    content = {"name": name, "steps": 9, "model": {"d_model": 128, "moe": experts}}
    (directory / "runs" / name / "experiment.json").write_text(json.dumps(content))
  page = Page(report_page(directory))
  first, *rows = next(table for table in map(clean, page.tables) if table[0][0] == "Field")
  assert first == ["Field", "dense_small", "moe_small_8e"]
  assert {row[0]: row[1:] for row in rows} == {
    "model.moe.num_experts": [MISSING, "8"],
    "model.moe.router.kind": [MISSING, "<b>"],
  }
  every = [table for table in map(clean, page.tables) if table[0][0] == "Field"][-1]
  assert ["model.d_model", "128", "128"] in every and ["steps", "9", "9"] in every


def test_the_page_loads_nothing(page, text):
  assert not page.of("link") and not page.of("img") and not page.of("iframe")
  assert all("src" not in attributes for _, attributes in page.tags)
  assert not re.search(r"https?:|url\(|@import", text)
  (policy,) = [tag["content"] for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
  assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy and "connect-src" not in policy
  assert len(text) < 3e6


def test_every_link_leads_to_a_file_or_a_part_of_the_page(page, finished):
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  assert len(ids) == len(set(ids))
  links = [link["href"] for link in page.of("a") if not link["href"].startswith("data:")]
  assert "../comparison.json" in links and "../runs/moe_large_8e/metrics.jsonl" in links
  for link in links:
    assert link[1:] in ids if link.startswith("#") else (finished / "report" / unquote(link)).is_file()
  drawn = {link.rpartition(".")[0] for link in links if link.endswith((".png", ".svg"))}
  assert {path.name for path in (finished / "report").iterdir()} == {"index.html"} | {
    f"{name}.{ending}" for name in drawn for ending in ("svg", "png")
  }
  assert {"speed_accuracy", "speed_bits_per_byte", "loss_time_dense_small", "expert_load_moe_small_8e"} <= drawn


def test_every_plot_has_words_and_every_table_head_a_scope(page):
  plots = [attributes for attributes in page.of("div") if attributes.get("role") == "img"]
  assert len(plots) == 12 and all(len(attributes["aria-label"]) > 60 for attributes in plots)
  assert all(attributes["scope"] in ("row", "col") for attributes in page.of("th"))


def test_text_cannot_become_markup(comparison, write_comparison):
  comparison.update(suite="<b>", finding='a < b & "c" <script>alert(1)</script>', pairs=[])
  comparison["members"] = comparison["members"][:1]
  name = "x<i>&'\"</script>{{7*7}}"
  comparison["members"][0].update(name=name, pair=name)
  comparison["provenance"] = {"<u>": "</table><script>"}
  text = report_page(write_comparison(comparison, (name,)))
  page = Page(text)
  assert {"b", "i", "u"} & {tag for tag, _ in page.tags} == set() and len(page.of("script")) == 3
  assert "<b>" in page.text and comparison["finding"] in page.text and "</table><script>" in page.text
  assert name in page.text
  data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)[1]
  assert "<" not in data
  rows = json.loads(data)["figures"]["speed_accuracy"]["spec"]["data"]["values"]
  assert [row["member"] for row in rows] == [name]


def test_the_text_of_a_user_is_no_expression_and_no_field_of_a_figure(comparison, metrics_of):
  """Brackets and dots in the name of a field, and quotes in an expression, have a meaning to Vega."""
  name = "a.b[0]'\"\\ + 1"
  comparison = of_one_pair(comparison)
  comparison["members"][0].update(name=name, pair=name)
  comparison["members"][1]["pair"] = comparison["pairs"][0]["dense"] = name
  rows = metrics_of(comparison["members"][0])
  read = from_json(comparison)
  figures = [speed_accuracy(read), *loss_curves(read, {name: rows})]
  assert len(figures) == 2

  def values(spec, path=""):
    for key, value in spec.items() if isinstance(spec, dict) else enumerate(spec):
      if isinstance(value, dict | list):
        yield from values(value, f"{path}/{key}")
      elif value == name or name in str(key):
        yield f"{path}/{key}"

  for figure in figures:
    places = {re.sub(r"\d+", "N", place) for place in values(figure.spec)}
    assert places <= {"/data/values/N/member", "/data/values/N/run", "/data/values/N/pair",
                      "/encoding/color/scale/domain/N", "/layer/N/encoding/fill/scale/domain/N"}  # fmt: skip
    svg, _ = draw(figure.spec, figure.title, figure.statement, palette.variables(read))
    assert "a.b[0]&apos;" in svg or "a.b[0]'" in svg


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
  page = Page(report_page(directory))
  assert "No finding yet" in page.text and "2.311 ± 0.012" in page.text
  assert "training result of moe_small_8e, moe_small_16e, dense_large, moe_large_8e, moe_large_16e" in page.text
  assert "metrics of moe_small_16e, dense_large, moe_large_8e, moe_large_16e" in page.text
  assert "baseline unigram_bits_per_byte" in page.text and "dense_large, no match yet" in page.text


def test_a_comparison_that_has_only_begun(comparison, write_comparison):
  names = [member["name"] for member in comparison["members"]]
  members = [{key: member[key] for key in ("name", "kind", "pair")} for member in comparison["members"]]
  directory = write_comparison({"suite": "s", "members": members, "pairs": []}, tuple(names))
  page = Page(report_page(directory))
  assert not page.of("figure") and f"step time of {', '.join(names)}" in page.text


def test_a_complete_comparison_says_what_was_not_trained(comparison, write_comparison):
  comparison["members"] = comparison["members"][:3]
  comparison["pairs"] = comparison["pairs"][:1]
  for of in (comparison["pairs"][0], comparison["pairs"][0]["candidates"][0]):
    of.update(equal_time="violated", within_tolerance=False, bits_per_byte_difference=0.004)
    of["bits_per_byte_difference_interval"] = [-0.0041, 0.0121]
  comparison["members"][2].update(bits_per_byte=None, accuracy=None)
  directory = write_comparison(comparison, ("moe_small_16e",))
  page = Page(report_page(directory))
  assert "Not trained in this comparison: moe_small_16e." in page.text and "not complete" not in page.text
  assert "training times not equal within 5 %" in page.text and "MoE, closest but not shown equal" in page.text
  assert "+0.004 (\N{MINUS SIGN}0.004 to +0.012)" in page.text


def test_a_missing_comparison_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    write_report(tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_report_does_not_import_jax():
  code = "import sys, moejax.comparison.report, moejax.comparison.table; assert not {'jax', 'flax'} & set(sys.modules)"
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
  assert f"moe_small_8e: {warning}" in Page(report_page(directory)).text


def test_benchmarks_are_a_column_and_a_curve_each(comparison, write_comparison):
  comparison["members"], comparison["pairs"] = comparison["members"][:3], comparison["pairs"][:1]
  first, second, _ = comparison["members"]
  first |= {"tasks/sciq/acc": 0.31, "tasks/sciq/acc_stderr": 0.02, "tasks/average/accuracy": 0.31}
  second |= {"tasks/sciq/acc": 0.35, "tasks/sciq/acc_stderr": 0.02, "tasks/average/accuracy": 0.35}
  page = Page(report_page(write_comparison(comparison)))
  cells = table_of(page, "sciq: acc (%)")
  assert cells[0][1:] == ["sciq: acc (%)", "average: accuracy (%)"]
  assert cells[1][1:] == ["31.0 ± 2.0", "31.00"] and cells[2][1:] == ["35.0 ± 2.0", "35.00"]
  assert cells[3][1:] == [MISSING] * 2  # not asked
  links = {link["href"] for link in page.of("a")}
  assert {"speed_tasks_sciq_acc.png", "speed_tasks_average_accuracy.svg"} <= links


def test_a_comparison_without_benchmarks_does_not_speak_of_them(page):
  assert "Benchmarks" not in page.text


def test_a_benchmark_score_that_is_no_number_is_refused(comparison, write_comparison):
  comparison["members"][0]["tasks/sciq/acc"] = "high"
  with pytest.raises(ValueError, match="tasks/sciq/acc='high' is not a number"):
    report_page(write_comparison(comparison))


def test_goodput_and_lost_time_are_a_row_for_each_member_that_has_them(comparison, write_comparison):
  comparison["members"][0] |= {"goodput/fraction": 0.931, "goodput/save_s": 12.5}
  comparison["members"][3] |= {"goodput/fraction": 0.5, "goodput/repeated_s": 90.0}
  table = table_of(Page(report_page(write_comparison(comparison))), "Goodput")
  heads, first, second = (row[1:] for row in table)
  assert heads == ["Goodput", "Lost: save", "Lost: repeated"]
  assert first == ["93.1 %", "12.5 s", "0 s"] and second == ["50.0 %", "0 s", "90.0 s"]
  assert "dense_small" in table[1][0] and "dense_large" in table[2][0]


def test_a_comparison_without_goodput_does_not_speak_of_it(page):
  assert "Goodput" not in page.text
