"""The report in a real browser: what it draws, how it answers a reader, and whether everybody can read it."""

import contextlib
import json
import re
import shutil
import threading

import pytest

import moejax
from moejax.comparison.plots.drawing import library
from moejax.comparison.report import report_page
from moejax.comparison.watch import Server
from moejax.decision.page import as_html

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def whole(finished):
  """A comparison directory with a whole report."""
  text = report_page(finished)
  assert "https:" not in text.replace(library(), "") and len(text) < 3e6
  (finished / "report" / "index.html").write_text(text)
  return finished


@contextlib.contextmanager
def opened(browser, address, *, width=1280, height=900, color_scheme="light"):
  """The page at `address` once all figures are drawn. `page.complaints` are messages of its console."""
  context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme)
  page = context.new_page()
  page.complaints, page.requested = [], []
  page.on("console", lambda message: page.complaints.append(message.text))
  page.on("pageerror", lambda error: page.complaints.append(str(error)))
  page.on("request", lambda request: page.requested.append(request.url))
  page.goto(address)
  page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
  yield page
  context.close()


def address_of(directory) -> str:
  return (directory / "report" / "index.html").as_uri()


@pytest.fixture
def page(browser, whole):
  with opened(browser, address_of(whole)) as page:
    yield page


def figure(page, name):
  return page.locator(f'[data-figure="{name}"]')


def test_every_figure_is_drawn_without_a_complaint_or_a_request(page, whole):
  frames = page.locator("[data-figure]")
  assert frames.count() == 12
  for i in range(frames.count()):
    assert frames.nth(i).locator("svg .mark-group").count() > 0
  assert page.complaints == []
  assert page.requested == [address_of(whole)]


def test_a_point_tells_its_member_and_its_numbers(page):
  frame = figure(page, "speed_accuracy")
  frame.locator(".mark-symbol path").nth(1).hover()
  tooltip = page.locator("#vg-tooltip-element.visible")
  tooltip.wait_for()
  assert "moe_small_8e" in tooltip.inner_text() and "2.241 ± 0.012" in tooltip.inner_text()
  loss = figure(page, "loss_dense_small")
  loss.locator("svg").hover()
  sync_api.expect(page.locator("#vg-tooltip-element.visible")).to_contain_text("loss, smoothed")


def test_the_legend_hides_and_shows_a_member_by_mouse_and_keyboard(page):
  frame = figure(page, "speed_accuracy")
  points, labels = frame.locator(".mark-symbol path"), frame.locator(".mark-text.role-mark text")
  assert points.count() == 6 and "moe_small_8e" in labels.all_text_contents()
  box = frame.get_by_role("checkbox", name="moe_small_8e")
  box.uncheck()
  sync_api.expect(points).to_have_count(5)
  assert "moe_small_8e" not in labels.all_text_contents()
  box.focus()
  page.keyboard.press("Space")
  sync_api.expect(points).to_have_count(6)


def test_choices_change_the_axes_and_the_words(page):
  frame = figure(page, "speed_accuracy")

  def axes() -> str:
    return " ".join(frame.locator(".role-axis-title text").all_text_contents())

  assert "bits per byte" in axes() and "step time (ms)" in axes()
  frame.get_by_role("combobox", name="Quality").select_option("next-token accuracy on held-out text")
  frame.get_by_role("combobox", name="Against").select_option("model FLOPs of training")
  frame.get_by_role("combobox", name="Scale").select_option("log")
  sync_api.expect(frame.locator(".plot")).to_contain_text("model FLOPs of training")
  assert "next-token accuracy (%)" in axes()
  assert "53.12 ± 0.23 %" in frame.locator(".plot").get_attribute("aria-label")
  assert frame.locator(".mark-symbol path").count() == 6
  loss = figure(page, "loss_dense_small")
  for against in ("training tokens", "training FLOPs", "training step", "elapsed time of training"):
    loss.get_by_role("combobox", name="Against").select_option(against)
    sync_api.expect(loss.locator(".role-axis-title").first).to_contain_text(against)
  assert page.complaints == []


def test_zoom_narrows_the_axis_and_reset_returns(page):
  frame = figure(page, "loss_dense_small")

  def ticks() -> list[str]:
    return frame.locator(".role-axis-label").first.locator("text").all_text_contents()

  before = ticks()
  frame.get_by_role("button", name="Zoom in").click()
  sync_api.expect(frame.locator(".role-axis-label").first).not_to_have_text("".join(before))
  frame.get_by_role("button", name="Reset").click()
  sync_api.expect(frame.locator(".role-axis-label").first).to_have_text("".join(before))
  assert page.complaints == []


def test_a_table_sorts_by_the_value_of_a_column(page):
  table = page.locator("table.sortable", has_text="Total parameters")
  head = table.get_by_role("button", name="Step time")

  def names() -> list[str]:
    return [text.split()[0] for text in table.locator("tbody").first.locator("th").all_inner_texts()]

  rising = ["dense_small", "moe_small_8e", "moe_small_16e", "moe_large_8e", "dense_large", "moe_large_16e"]
  head.click()
  assert names() == rising
  head.focus()
  page.keyboard.press("Enter")
  assert names() == rising[::-1]
  assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_axe_finds_no_fault(browser, whole, width, scheme):
  axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
  with opened(browser, address_of(whole), width=width, color_scheme=scheme) as page:
    for details in page.locator("details").all():
      details.evaluate("element => element.open = true")
    found = violations(axe, page)
  assert found == []


def violations(axe, page) -> list[tuple]:
  found = axe.Axe().run(page).response["violations"]
  return [(fault["id"], fault["help"], [node["html"][:120] for node in fault["nodes"][:3]]) for fault in found]


def test_a_phone_scrolls_the_tables_and_not_the_page(browser, whole):
  with opened(browser, address_of(whole), width=390, height=844) as page:
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    table = page.locator(".scroll:has(.sortable)").first
    assert table.evaluate("element => element.scrollWidth > element.clientWidth")
    for svg in page.locator(".plot svg").all():
      box = svg.bounding_box()
      assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_print_has_every_column_whole_and_light(browser, whole):
  with opened(browser, address_of(whole), width=1032, color_scheme="dark") as page:
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" != dark
    cut = page.evaluate(
      "[...document.querySelectorAll('th, td, .plot svg')].filter(cell => "
      "cell.getBoundingClientRect().right > 1032.5 || cell.scrollWidth > cell.clientWidth + 1"
      ").map(cell => cell.outerHTML.slice(0, 100))"
    )
    assert cut == []
    hidden = page.evaluate("[...document.querySelectorAll('td')].filter(cell => !cell.checkVisibility()).length")
    assert hidden == 0
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_the_names_of_a_user_do_nothing(browser, comparison, write_comparison):
  name = "<img src=x onerror=alert(1)></script><script>alert(2)</script>'\"`${1}{{7*7}}"
  comparison["members"], comparison["pairs"] = comparison["members"][:2], comparison["pairs"][:1]
  comparison["members"][0].update(name="a[0].b", pair="a[0].b")
  comparison["members"][1].update(name=name, pair="a[0].b")
  comparison["pairs"][0].update(dense="a[0].b", moe=name)
  directory = write_comparison(comparison, ("a[0].b", name))
  (directory / "report").mkdir()
  (directory / "report" / "index.html").write_text(report_page(directory))
  with opened(browser, address_of(directory)) as page:
    page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
    frame = figure(page, "speed_accuracy")
    frame.locator(".mark-symbol path").nth(1).hover()
    page.locator("#vg-tooltip-element.visible").wait_for()
    assert name in page.locator("#vg-tooltip-element").inner_text()
    frame.get_by_role("checkbox").nth(1).uncheck()
    sync_api.expect(frame.locator(".mark-symbol path")).to_have_count(1)
    assert page.locator("img").count() == 0 and page.complaints == []


def test_a_large_comparison_is_drawn_in_seconds(browser, comparison, metrics_of, write_comparison):
  dense, moe = comparison["members"][:2]
  members = [dense] + [{**moe, "name": f"moe_{i}", "matched": i == 0, "num_experts": 64} for i in range(12)]
  pairs = [{**comparison["pairs"][0], "moe": "moe_0"}]
  directory = write_comparison(comparison | {"members": members, "pairs": pairs})
  (directory / "report").mkdir()
  text = report_page(directory)
  (directory / "report" / "index.html").write_text(text)
  assert len(text) < 2e7 and len(json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])) == 2
  with opened(browser, address_of(directory)) as page:
    assert page.complaints == [] and page.evaluate("document.documentElement.scrollWidth") == 1280


def test_a_served_page_shows_new_results_by_itself(browser, comparison, write_comparison):
  directory = write_comparison(comparison, tuple(member["name"] for member in comparison["members"]))
  with Server(directory, 0) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      with opened(browser, server.address) as page:
        page.wait_for_timeout(2500)  # it has asked for the version once
        (directory / "comparison.json").write_text(json.dumps(comparison | {"finding": "A new finding."}))
        sync_api.expect(page.locator(".finding")).to_have_text("A new finding.", timeout=30_000)
        assert page.complaints == [] and all(url.startswith(server.address) for url in page.requested)
    finally:
      server.shutdown()
      thread.join()


def test_the_page_of_a_decision_is_drawn_and_has_no_accessibility_violations(browser, tmp_path):
  axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
  pair = [moejax.find("dense_6b4"), moejax.find("moe_6b4_64e")]
  decision = moejax.decide(pair, "v5p:4x8x8", days=21, space={"width": [0.5, 1.0]})
  path = tmp_path / "decision.html"
  path.write_text(as_html(decision))
  for scheme in ("light", "dark"):
    with opened(browser, path.as_uri(), color_scheme=scheme) as page:
      frames = page.locator("[data-figure]")
      assert frames.count() == 2
      for i in range(2):
        assert frames.nth(i).locator("svg .mark-group").count() > 0
      assert page.complaints == [] and page.requested == [path.as_uri()]
      assert violations(axe, page) == []
