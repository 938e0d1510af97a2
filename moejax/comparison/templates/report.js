"use strict";
const made = JSON.parse(document.getElementById("figures").textContent);

// A JSON merge patch (RFC 7386).
const isObject = value => value !== null && typeof value === "object" && !Array.isArray(value);
function patched(target, patch) {
  if (!isObject(patch)) return patch;
  const merged = isObject(target) ? {...target} : {};
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete merged[key];
    else merged[key] = patched(merged[key], value);
  }
  return merged;
}

class Figure {
  constructor(element) {
    this.element = element;
    Object.assign(this, made.figures[element.dataset.figure]);
    this.plot = element.querySelector(".plot");
    this.choosers = [...element.querySelectorAll("select")];
    this.boxes = [...element.querySelectorAll(".legend input")];
    for (const chooser of this.choosers) chooser.addEventListener("change", () => this.draw());
    for (const box of this.boxes) box.addEventListener("change", () => this.hide());
    for (const button of element.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => this.zoom(Number(button.dataset.zoom)));
    }
    this.alt = this.plot.getAttribute("aria-label");
  }

  chosen() {
    return this.choosers.map((chooser, i) => this.choices[i].options[chooser.selectedIndex]);
  }

  specification() {
    const width = this.plot.clientWidth;
    let spec = this.chosen().reduce((whole, option) => patched(whole, option.patch), this.spec);
    if (spec.facet) {
      const columns = width < 520 ? 1 : spec.columns;
      const each = Math.max(140, Math.floor((width - 30) / columns) - 55);
      spec = {...spec, columns, spec: {...spec.spec, width: each}};
    } else {
      spec = {...spec, width: "container", autosize: {type: "fit-x", contains: "padding"}};
    }
    // The page has a legend of its own, for the keyboard too.
    if (this.boxes.length) spec.encoding = {...spec.encoding, color: {...spec.encoding.color, legend: null}};
    return spec;
  }

  async draw() {
    this.width = this.plot.clientWidth;
    const options = {mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false,
                     config: made.config, tooltip: {disableDefaultStyle: true}};
    const result = await vegaEmbed(this.plot, this.specification(), options);
    if (this.view) this.view.finalize();
    this.view = result.view;
    this.plot.setAttribute("aria-label", this.chosen()[0]?.alt ?? this.alt);
    // The picture is described by the label of its frame.
    for (const svg of this.plot.querySelectorAll("svg")) svg.setAttribute("aria-hidden", "true");
    if (this.boxes.some(box => !box.checked)) await this.hide();
  }

  async hide() {
    await this.view.signal("hidden", this.boxes.filter(box => !box.checked).map(box => box.value)).runAsync();
  }

  // Zooms the x axis around its center. A factor of 0 resets both axes.
  async zoom(factor) {
    if (!factor) return this.draw();
    for (const {field, channel} of this.view.signal("zoom_tuple_fields")) {
      const scale = this.view.scale(channel);
      const [to, from] = scale.type === "log" ? [Math.log, Math.exp] : [x => x, x => x];
      const [low, high] = scale.domain().map(to);
      const half = (high - low) / 2 * (channel === "x" ? factor : 1);
      // The y axis stays as it is, but Vega zooms both axes or none.
      this.view.signal(`zoom_${field}`, [from((low + high) / 2 - half), from((low + high) / 2 + half)]);
    }
    await this.view.runAsync();
  }
}

const figures = [...document.querySelectorAll("[data-figure]")].map(element => new Figure(element));
const drawn = (async () => {
  for (const figure of figures) {
    await figure.draw();
    await new Promise(resolve => setTimeout(resolve));  // the page answers between figures
  }
  document.documentElement.dataset.drawn = figures.length;
})();

let waiting;
new ResizeObserver(() => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    for (const figure of figures) if (figure.view && figure.width !== figure.plot.clientWidth) figure.draw();
  }, 150);
}).observe(document.body);

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => {
    const cell = row.cells[i], value = cell.dataset.value;
    return value === undefined ? cell.textContent : value === "" ? NaN : Number(value);
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b) : a - b;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
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

// A closed part of the page is printed too.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach(details => details.open = true);
});
addEventListener("afterprint", () => closed.forEach(details => details.open = false));
