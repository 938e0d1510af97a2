"""The style sheet and the script of the report."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2126; --muted: #5a636d; --line: #dde1e6; --accent: #0b5fa5;
  --good: #0b6b4f; --good-soft: #dcf2ea; --warn: #8a4b00; --warn-soft: #fdeed8;
}
@media (prefers-color-scheme: dark) {
  .swatch:not(.hollow) { outline: 1px solid var(--muted); }
  :root {
    --page: #14171a; --card: #1d2126; --ink: #e6e9ec; --muted: #a3acb5; --line: #353b42; --accent: #7cc0f4;
    --good: #7fdcbb; --good-soft: #163a2f; --warn: #f5c07a; --warn-soft: #43301a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
a { color: var(--accent); }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.2rem); line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: 1.02rem; margin: 0; overflow-wrap: anywhere; }
p, ol { max-width: 70ch; margin: .5rem 0; }
.eyebrow { color: var(--muted); font-size: .9rem; margin: 0 0 .3rem; }
.finding { font-size: 1.2rem; line-height: 1.45; margin: 0 0 1rem; }
.note { color: var(--muted); font-size: .92rem; }
.notice {
  background: var(--warn-soft); color: var(--warn); border-radius: .6rem; padding: .7rem 1rem; max-width: none;
}
.notice ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.cards, .plots { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); align-items: start; }
.card {
  background: var(--card); border: 1px solid var(--line); border-left: .35rem solid var(--pair, var(--line));
  border-radius: .6rem; padding: 1rem 1.1rem; max-width: 44rem;
}
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .25rem .9rem; margin: .8rem 0; }
.card dt { color: var(--muted); }
.card dd { margin: 0; font-variant-numeric: tabular-nums; }
.card dd small { display: block; color: var(--muted); }
.chip { display: inline-block; border-radius: 1rem; padding: .1rem .7rem; font-size: .85rem; margin-top: .5rem; }
.chip.good { background: var(--good-soft); color: var(--good); }
.chip.warn { background: var(--warn-soft); color: var(--warn); }
figure { margin: 0; min-width: 0; }
.plot { background: #fff; color: #22262b; border: 1px solid var(--line); border-radius: .6rem; padding: .6rem; }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg text {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important;
}
figcaption { color: var(--muted); font-size: .9rem; padding: .4rem .2rem 0; }
.scroll {
  overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: .6rem 0;
}
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .6rem; white-space: nowrap; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
tbody tr + tr > *, tbody + tbody > tr:first-child > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
th:first-child, table.words td { text-align: left; }
.members th:first-child, .numbers th:first-child { position: sticky; left: 0; background: var(--card); }
.members tbody th small { display: block; color: var(--muted); font-weight: 400; white-space: normal; }
.narrow thead th { white-space: normal; }
.members tbody th { white-space: normal; min-width: 14rem; }
.members td.wrap { white-space: normal; }
.baselines { color: var(--muted); }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .45em; }
.swatch.hollow { background: none !important; border: .17em solid; }
td .under { display: block; color: var(--muted); font-size: .85em; }
table.words td { white-space: normal; overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort] button::after { content: " ▲"; font-size: .7em; }
th[aria-sort="descending"] button::after { content: " ▼"; }
details summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
@media (max-width: 40rem) {
  body { padding: 1.2rem .8rem 2rem; }
  .plot { padding: .3rem; }
  th, td { padding: .4rem .5rem; }
  .members tbody th { min-width: 9.5rem; max-width: 11rem; overflow-wrap: anywhere; }
  .members tbody th small { display: none; }
}
"""

SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => {
    const cell = row.cells[i], value = cell.dataset.value;
    return value === undefined ? cell.textContent : value === "" ? NaN : Number(value);
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a - b;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a, i), y = key(b, i);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return down ? compare(y, x) : compare(x, y);
      });
      body.append(...rows);
    };
  });
}
"""
