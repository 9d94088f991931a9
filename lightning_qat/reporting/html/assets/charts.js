/* Charts as SVG, made element by element. Colours come from the style sheet; shapes and texts say the same. */

const MOST_DOTS = 400;
const MOST_LABELS = 9;
const LETTER = 6.8;  // width of a letter in a chart, nearly
const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name === "tip") element.append(draw("title", { text: value }));
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const finite = (value) => typeof value === "number" && Number.isFinite(value);

/** The smallest and the largest of many numbers; a range of some width if all are equal. */
function extent(values, withZero = false) {
  let [low, high] = withZero ? [0, 0] : [Infinity, -Infinity];
  for (const value of values) {
    if (!finite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high || (withZero && low === high)) return [0, 1];
  const room = low === high ? Math.abs(low) / 2 || 1 : 0;
  return [withZero && low === 0 ? 0 : low - room, high + room];
}

/** A round distance that divides a range into two to five parts. */
function roundStep([low, high]) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((times) => times * power >= rough * 0.999) * power;
}

/** Two to seven round numbers inside a range. */
function roundTicks([low, high], step) {
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) ticks.push(Number((at * step).toPrecision(12)) + 0);
  return ticks;
}

const scaleTo = ([low, high], from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);

/** The places that have a label, as many as fit: that of the mark first, then both ends, then those between. */
function placesOnAxis(count, x, width, options) {
  const between = Array.from({ length: Math.min(count, MOST_LABELS) }, (_, n) => Math.round((n * (count - 1)) / Math.max(1, Math.min(count, MOST_LABELS) - 1)));
  const marked = Number.isInteger(options.mark) ? [options.mark] : [];
  const taken = [];
  for (const place of new Set([...marked, 0, count - 1, ...between])) {
    const text = options.place(place);
    const half = text.length * LETTER / 2;
    const at = Math.max(half, Math.min(width - half, x(place)));
    if (taken.every(([, other, name]) => Math.abs(other - at) > half + name.length * LETTER / 2 + LETTER)) taken.push([place, at, text]);
  }
  return taken;
}

/** Lines over common x places, with dots where there are few. Each line: {name, values, kind}. */
function lineChart(lines, options) {
  const [width, height, left, bottom] = [options.width || 360, options.height || 170, 52, 26];
  const count = Math.max(...lines.map((line) => line.values.length));
  const exact = extent(lines.flatMap((line) => line.values.filter(finite)), options.withZero);
  const step = roundStep(exact);
  const range = [Math.floor(exact[0] / step + 1e-9) * step, Math.ceil(exact[1] / step - 1e-9) * step];  // no value lies beyond the last tick
  const x = scaleTo([0, Math.max(1, count - 1)], left + 6, width - 10);
  const y = scaleTo(range, height - bottom, 12);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label });
  const format = options.format || formatNumber;
  for (const value of roundTicks(range, step)) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - 6, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end", text: format(value) }));
  }
  for (const [place, at, text] of placesOnAxis(count, x, width, options)) {
    svg.append(draw("text", { class: place === options.mark ? "strong" : null, x: at, y: height - 8, "text-anchor": "middle", text }));
    svg.append(draw("line", { class: "axis", x1: x(place), x2: x(place), y1: height - bottom, y2: height - bottom + 4 }));
  }
  for (const line of lines) {
    const path = [];
    let isOpen = false;
    line.values.forEach((value, place) => {
      if (finite(value)) path.push(`${isOpen ? "L" : "M"}${x(place).toFixed(1)} ${y(value).toFixed(1)}`);
      isOpen = finite(value);
    });
    svg.append(draw("path", { class: `line ${line.kind || ""}`, d: path.join("") }));
    if (count <= MOST_DOTS) line.values.forEach((value, place) => {
      if (!finite(value)) return;
      const dot = { class: `dot ${line.kind || ""}`, tip: `${options.place(place)}: ${line.name} ${format(value)}` };
      if (options.open) dot.onclick = () => options.open(place);
      svg.append(line.kind === "own" ? draw("rect", { ...dot, x: x(place) - 2.5, y: y(value) - 2.5, width: 5, height: 5 })
        : draw("circle", { ...dot, cx: x(place), cy: y(value), r: 2.6 }));
    });
  }
  if (options.mark !== null && options.mark !== undefined) {
    const at = x(options.mark);
    svg.append(draw("line", { class: options.isCalm ? "mark calm" : "mark", x1: at, x2: at, y1: 10, y2: height - bottom }));
    const isRight = at > width / 2;
    svg.append(draw("text", { class: "strong", x: at + (isRight ? -5 : 5), y: 18, "text-anchor": isRight ? "end" : "start", text: options.markText }));
  }
  return svg;
}

/** Values by their code; what is clipped stands hatched beyond the ends of the range. Counts are logarithmic. */
function histogramChart([firstCode, width, counts, below, above], lastCode, scale, zero) {
  const [wide, high, left, bottom] = [640, 210, 46, 40];
  const all = [below, ...counts, above];
  const most = Math.log10(1 + Math.max(1, ...all));
  const step = (wide - left - 16) / (all.length + 1);
  const svg = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": "Histogram of the values by code" });
  svg.append(hatching("clipped-hatch", "var(--own)"));
  const y = (count) => high - bottom - (Math.log10(1 + count) / most) * (high - bottom - 22);
  all.forEach((count, place) => {
    const isClipped = place === 0 || place === all.length - 1;
    const x = left + place * step + (place === 0 ? 0 : place === all.length - 1 ? step : step / 2);
    const from = firstCode + (place - 1) * width;
    const tip = isClipped ? `${count} values clipped ${place ? "above" : "below"} the range` : `codes ${from} to ${Math.min(from + width - 1, lastCode)}: ${count} values`;
    svg.append(draw("rect", { class: isClipped ? "clipped" : "bar", fill: isClipped ? "url(#clipped-hatch)" : null,
      x: x + 0.5, y: y(count), width: Math.max(1, step - 1), height: Math.max(0, high - bottom - y(count)), tip }));
  });
  const ends = [left + step * 1.25, left + (all.length - 1) * step + step * 0.75];
  const codes = [firstCode, lastCode];
  ends.forEach((x, side) => {
    svg.append(draw("line", { class: "mark", x1: x, x2: x, y1: 16, y2: high - bottom }));
    const anchor = side ? "end" : "start";
    svg.append(draw("text", { x: x + (side ? -4 : 4), y: high - bottom + 15, "text-anchor": anchor, text: `code ${codes[side]}` }));
    if (scale !== null) svg.append(draw("text", { x: x + (side ? -4 : 4), y: high - bottom + 30, "text-anchor": anchor, text: formatNumber((codes[side] - zero) * scale) }));
  });
  if (below) svg.append(draw("text", { class: "strong", x: left, y: 12, text: `${below} clipped below` }));
  if (above) svg.append(draw("text", { class: "strong", x: wide - 10, y: 12, "text-anchor": "end", text: `${above} clipped above` }));
  for (const count of [0, Math.max(...all)]) svg.append(draw("text", { x: left - 5, y: y(count) + 4, "text-anchor": "end", text: String(count) }));
  return svg;
}

/** A pattern, so that what it fills is told apart without colours. */
function hatching(id, color) {
  const line = draw("path", { d: "M0 6L6 0", stroke: color, "stroke-width": 1.6 });
  return draw("defs", {}, draw("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" }, line));
}

const shadeOf = (strength) => (0.06 + 0.94 * strength).toFixed(3);

/** Rows of cells, the stronger the larger. Each row: {name, values}. */
function heatChart(rows, epochs, label, format) {
  const [left, cell, line] = [8, Math.max(10, Math.min(26, 520 / epochs.length)), 20];
  const most = Math.max(1e-30, ...rows.flatMap((row) => row.values.filter(finite).map(Math.abs)));
  const names = left + epochs.length * cell + 8;
  const letters = 12 + Math.min(48, Math.max(8, ...rows.map((row) => row.name.length)));  // the value stands before the name
  const [width, height] = [Math.max(names, left + 110) + letters * LETTER, 24 + rows.length * line];
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "fixed", role: "img", "aria-label": label });
  svg.append(draw("text", { x: left, y: 13, text: `epoch ${epochs[0]} to ${epochs[epochs.length - 1]}` }));
  const key = Math.max(names, left + 110);
  const shades = [0, 0.25, 0.5, 0.75, 1];
  const largest = Math.max(0, ...rows.flatMap((row) => row.values.filter(finite).map(Math.abs)));
  svg.append(draw("text", { x: key, y: 13, text: "0" }), draw("text", { class: "largest", x: key + 12 + 12 * shades.length, y: 13, text: format(largest) }));
  shades.forEach((shade, n) => svg.append(draw("rect", { class: "heat", x: key + 10 + 12 * n, y: 4, width: 11, height: 11, "fill-opacity": shadeOf(shade) })));
  rows.forEach((row, index) => {
    const y = 20 + index * line;
    row.values.forEach((value, place) => {
      const strength = finite(value) ? Math.sqrt(Math.abs(value) / most) : 0;
      svg.append(draw("rect", { class: "heat", x: left + place * cell, y, width: cell - 1, height: line - 2,
        "fill-opacity": finite(value) ? shadeOf(strength) : 0,
        tip: `${row.name}, epoch ${epochs[place]}: ${finite(value) ? format(value) : "no value"}` }));
    });
    const last = row.values.filter(finite).at(-1);
    const name = row.name.length > 48 ? `${row.name.slice(0, 20)}…${row.name.slice(-26)}` : row.name;
    const text = draw("text", { x: names, y: y + 13, text: `${last === undefined ? "" : format(last)}  ${name}`, class: "link", tip: row.name });
    svg.append(draw("a", { href: `#point=${encodeURIComponent(row.name)}` }, text));
  });
  return svg;
}
