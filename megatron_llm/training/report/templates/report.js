"use strict";
// Draws the charts again when a reader chooses another axis or other runs, and tells the values below the pointer.
// The page is complete without it; scales, ticks and paths are those of charts.py.
const data = JSON.parse(document.getElementById("report-data").textContent);
const hidden = new Set();
let along = "step";

function ticks(low, high, whole) {
  let size = 10 ** Math.floor(Math.log10((high - low) / 5));
  size *= [1, 2, 5, 10].find((factor) => (high - low) / (size * factor) <= 5);
  if (whole) size = Math.max(size, 1);
  const found = [];
  for (let i = Math.ceil(low / size); i <= Math.floor(high / size); i++) found.push(i * size);
  return found;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), count = Math.ceil(Math.log10(high)) - first + 1;
  const every = Math.max(1, Math.floor(count / 6));
  for (const factors of [[1], [1, 2, 5]]) {
    const found = [];
    for (let i = 0; i < count; i += every) for (const factor of factors) found.push(factor * 10 ** (first + i));
    const inside = found.filter((tick) => low <= tick && tick <= high);
    if (inside.length >= 3) return inside;
  }
  return ticks(low, high).filter((tick) => tick > 0);
}

function number(value, digits = 4) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-4)) return String(Number(value.toPrecision(3)).toExponential()).replace("e+", "e");
  for (const [unit, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit && size >= 1e4) return Number((value / unit).toPrecision(digits)).toLocaleString("en") + suffix;
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 12 });
}

const positions = (curve) => data.axes[curve.axis][along];
const shown = (chart) => chart.curves.filter((curve) => !hidden.has(curve.run));
const extent = (values) => values.reduce(([low, high], v) => (v === null ? [low, high] : [Math.min(low, v), Math.max(high, v)]), [Infinity, -Infinity]);

function xRange() {
  if (along === "step") return data.x;
  const all = Object.values(data.charts).flatMap((chart) => chart.curves.map((curve) => extent(positions(curve))));
  const [low, high] = extent(all.flat().filter(Number.isFinite));
  if (!(low <= high)) return data.x; // no run says its tokens
  return low < high ? [low, high] : [low - 0.5, high + 0.5];
}

function yRange(chart) {
  const columns = shown(chart).flatMap((curve) => [curve.values, curve.low || [], curve.high || []]);
  let [low, high] = extent(columns.map((c) => extent(c.filter((v) => v !== null && (v > 0 || !chart.log)))).flat().filter(Number.isFinite));
  if (!(low <= high)) [low, high] = [0, chart.divide];
  [low, high] = [low / chart.divide, high / chart.divide];
  if (chart.log) {
    if (!(low > 0)) low = 1;
    if (!(low < high)) [low, high] = [low / 2, low * 2];
    const margin = (high / low) ** 0.04;
    return [low / margin, high * margin];
  }
  if (chart.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  const margin = (high - low) * 0.04;
  return [chart.zero && low === 0 ? low : low - margin, high + margin];
}

function paths(curve, place, height) {
  const at = positions(curve).map(place), dots = [], line = [];
  let pen = "M";
  const pair = (i, v) => `${(10 * at[i]).toFixed(1)} ${(1000 - 1000 * v).toFixed(1)}`;
  const heights = (column) => column.map((v, i) => (v === null || at[i] === null ? NaN : height(v)));
  const mid = heights(curve.values);
  mid.forEach((v, i) => {
    if (Number.isNaN(v)) { pen = "M"; return; }
    line.push(pen + pair(i, v) + (pen === "M" ? "h0" : ""));
    dots.push(`M${pair(i, v)}h0`);
    pen = "L";
  });
  const found = [[curve.kind, line.join("")]];
  if (curve.kind === "dots" || dots.length === 1) found.push(["dot", dots.join("")]);
  if (!curve.low) return found;
  const low = heights(curve.low), high = heights(curve.high), areas = [];
  for (let i = 0, start = 0; i <= low.length; i++)
    if (i === low.length || Number.isNaN(low[i] + high[i])) {
      const stretch = [...low.keys()].slice(start, i);
      if (i > start) areas.push("M" + [...stretch.map((j) => pair(j, high[j])), ...stretch.reverse().map((j) => pair(j, low[j]))].join("L") + "Z");
      start = i + 1;
    }
  return [["band", areas.join("")], ...found];
}

function labels(box, side, found) {
  box.replaceChildren(...found.map(([place, text]) => {
    const label = document.createElement("span");
    label.style[side] = `${place.toFixed(2)}%`;
    label.textContent = text;
    return label;
  }));
}

function redraw(figure) {
  const chart = data.charts[figure.id], svg = figure.querySelector("svg[preserveAspectRatio]");
  const [x0, x1] = xRange(), [y0, y1] = yRange(chart);
  const place = (x) => (x === null ? null : (100 * (x - x0)) / (x1 - x0));
  const height = (value) => {
    const y = value / chart.divide;
    return chart.log ? (y > 0 ? Math.log(y / y0) / Math.log(y1 / y0) : NaN) : (y - y0) / (y1 - y0);
  };
  const rows = (chart.log ? logTicks(y0, y1) : ticks(y0, y1)).map((tick) => [100 - 100 * height(tick * chart.divide), number(tick)]);
  labels(figure.querySelector(".y"), "top", rows);
  labels(figure.querySelector(".x"), "left", ticks(x0, x1, true).map((tick) => [place(tick), number(tick)]));
  const drawn = [["grid", rows.map(([top]) => `M0 ${(10 * top).toFixed(1)}H1000`).join("")]];
  const curves = shown(chart).flatMap((curve) => paths(curve, place, height).map(([kind, d]) => [`${kind} c${curve.colour}`, d]));
  drawn.push(...curves.filter(([kind]) => kind.startsWith("band")), ...curves.filter(([kind]) => !kind.startsWith("band")));
  svg.replaceChildren(...drawn.map(([kind, d]) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
    return path;
  }));
  const marks = data.marks.filter((mark) => chart.marks.includes(mark.kind));
  figure.querySelectorAll("[data-mark]").forEach((element, i) => {
    element.classList.toggle("hidden", hidden.has(marks[i].run) || marks[i][along] === null);
    element.style.left = `${place(marks[i][along])}%`;
  });
}

function nearest(curve, x) {
  let best = -1;
  positions(curve).forEach((p, i) => {
    if (p !== null && (best < 0 || Math.abs(p - x) < Math.abs(positions(curve)[best] - x))) best = i;
  });
  return best;
}

function tell(part) {
  const [x0, x1] = xRange(), x = x0 + part * (x1 - x0);
  for (const figure of document.querySelectorAll(".chart")) {
    const chart = data.charts[figure.id], readout = figure.querySelector(".readout"), plot = figure.querySelector(".plot");
    plot.querySelector(".cursor")?.remove();
    const items = part === null ? [] : shown(chart).map((curve) => {
      const i = nearest(curve, x), value = i < 0 ? null : curve.values[i];
      const range = curve.low && i >= 0 && value !== null ? ` (${number(curve.low[i] / chart.divide)} to ${number(curve.high[i] / chart.divide)})` : "";
      const where = i < 0 ? "" : `, step ${Math.round(data.axes[curve.axis].step[i]).toLocaleString("en")}`;
      return [(data.runs.length > 1 ? `${data.runs[curve.run]}, ` : "") + curve.label + where, value === null ? "no number" : number(value / chart.divide, 5) + range, curve.colour];
    });
    readout.replaceChildren(...items.map(([label, value, colour]) => {
      const item = document.createElement("span"), swatch = document.createElement("i"), bold = document.createElement("b");
      swatch.className = `swatch c${colour}`;
      bold.textContent = value;
      item.append(swatch, `${label} `, bold);
      return item;
    }));
    if (part === null) continue;
    const cursor = document.createElement("div");
    cursor.className = "cursor";
    cursor.style.left = `${100 * part}%`;
    plot.append(cursor);
  }
}

function press(selector, act) {
  document.querySelectorAll(selector).forEach((button) => button.addEventListener("click", () => {
    act(button);
    tell(null);
    document.querySelectorAll(".chart").forEach(redraw);
  }));
}

document.documentElement.classList.add("js");
press("[data-axis]", (button) => {
  along = button.dataset.axis;
  document.querySelectorAll("[data-axis]").forEach((each) => each.setAttribute("aria-pressed", each === button));
});
press("[data-toggle]", (button) => {
  const run = Number(button.dataset.toggle);
  hidden[hidden.has(run) ? "delete" : "add"](run);
  button.setAttribute("aria-pressed", !hidden.has(run));
});
press(".log", (button) => {
  const chart = data.charts[button.closest(".chart").id];
  chart.log = !chart.log;
  button.setAttribute("aria-pressed", chart.log);
});
let part = 0.5;
document.querySelectorAll(".plot").forEach((plot) => {
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    tell((part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width))));
  });
  plot.addEventListener("pointerleave", () => tell(null));
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
    if (!move) return;
    event.preventDefault();
    tell((part = Math.min(1, Math.max(0, part + move))));
  });
  plot.addEventListener("blur", () => tell(null));
});
