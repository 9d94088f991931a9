/* The sections below the table: error along the depth, points over the epochs, the model by scopes, error against cost. */

const HEAT_ROWS = 40;
const MOST_LOW = 5;
const HEAT_COLUMNS = { scale_drift: "drift of the scale", flip_rate: "flips of weight codes", clipped_share: "clipped share", score: "sensitivity" };

const SHARES = new Set(["flip_rate", "clipped_share", "scale_drift"]);

/** How wide a chart may be, so that its letters have their size. */
const roomIn = (id) => Math.max(320, byId(id).clientWidth);

function showDepth(depth) {
  if (!depth.names.length) return;
  const lines = [];
  if (depth.accumulated.some(finite)) lines.push({ name: "accumulated", values: depth.accumulated });
  if (depth.own.some(finite)) lines.push({ name: "own", values: depth.own, kind: "own" });
  const isCalm = !data.points.flagged.length;
  const chart = lineChart(lines, {
    width: roomIn("depth-chart"), height: 280, label: "Signal to noise ratio along the execution order",
    place: (index) => depth.names[index].slice(roomIn("depth-chart") < 700 ? -14 : -36), mark: depth.jump, isCalm, format: inDecibels,
    markText: depth.jump === null ? "" : `first jump: ${depth.names[depth.jump].slice(-36)}`,
  });
  const legend = make("p", { class: "legend" }, ...lines.map((line) => make("span", { class: `key ${line.kind || ""}`, text: line.name })));
  byId("depth-chart").append(legend, chart);
  if (depth.jump !== null) {
    const name = depth.names[depth.jump];
    const point = depth.points[depth.jump];
    const text = make("p", {}, "The first jump (the ratio falls 6 dB, one bit, below the lowest before) is at ");
    text.append(point === null ? make("span", { class: "name", text: name }) : pointLink(point), ".");
    if (isCalm) text.append(" No finding warns of a point, so this only says where most of the error begins.");
    byId("depth-chart").append(text);
  }
  const worst = depth.low.slice(0, MOST_LOW).map((index) => [depth.own[index], index]);
  if (worst.length) {
    const text = make("p", {}, "Own ratio lower than the diagnosis calls fine for the type: ");
    worst.forEach(([value, index], number) => {
      const point = depth.points[index];
      text.append(number ? ", " : "", point === null ? make("span", { class: "name", text: depth.names[index] }) : pointLink(point), ` (${formatNumber(value)} dB)`);
    });
    byId("depth-chart").append(text);
  }
  const without = depth.names.filter((_, index) => finite(depth.accumulated[index]) && !finite(depth.own[index]));
  if (lines.length > 1 && without.length) {
    const names = without.slice(0, 5).join(", ") + (without.length > 5 ? ` and ${without.length - 5} more` : "");
    byId("depth-chart").append(make("p", { class: "note", text: `Without an error of its own, so without a value of "own": ${names}.` }));
  }
}

const inDecibels = (value) => `${formatNumber(value)} dB`;

function pointLink(index) {
  const name = data.points.rows[index][0];
  return make("a", { class: "name", href: `#point=${encodeURIComponent(name)}`, text: name });
}

function showEpochs(series, names) {
  const columns = Object.keys(HEAT_COLUMNS).filter((key) => key in series && series[key].epochs.length > 1);
  if (!columns.length) return;
  const select = make("select", { "aria-label": "What is shown" });
  const moves = (key, rows) => rows.some((row) => row.some((value) => finite(value) && value !== 0));
  for (const key of columns) {
    const text = HEAT_COLUMNS[key] + (moves(key, series[key].values) ? "" : " (all 0)");
    select.append(make("option", { value: key, text }));
  }
  /* What is flagged shows why; else the first column that is not 0 everywhere. */
  const flagged = data.points.flagged;
  select.value = columns.find((key) => moves(key, flagged.map((index) => series[key].values[index]))) ||
    columns.find((key) => moves(key, series[key].values)) || columns[0];
  byId("heat-tools").append(select);
  const show = () => {
    const { epochs, values } = series[select.value];
    const size = (row) => row.reduce((most, value) => (finite(value) ? Math.max(most, Math.abs(value)) : most), -1);
    const order = values.map((row, index) => [size(row), index]).filter(([most]) => most >= 0);
    order.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    const rows = order.slice(0, HEAT_ROWS).map(([, index]) => ({ name: names[index], values: values[index] }));
    const parts = [heatChart(rows, epochs, `${HEAT_COLUMNS[select.value]} of points over the epochs`, SHARES.has(select.value) ? formatShare : formatNumber)];
    if (order.length > HEAT_ROWS) parts.push(make("p", { class: "note", text: `The first ${HEAT_ROWS} of ${order.length} points.` }));
    byId("heat-chart").replaceChildren(...parts);
  };
  select.addEventListener("change", show);
  show();
}

const typeClass = (type) => (["int8", "int16", "float"].includes(type) ? type : type ? "other" : "none");

/** The ops in execution order as one strip; neighbours of one type are one piece, float is hatched. */
function showGraph(graph) {
  if (!graph.ops.length) return;
  const pieces = [];
  graph.ops.forEach(([name, , type]) => {
    const last = pieces.at(-1);
    if (last && (last.type === type || !type)) { last.count += 1; last.to = name; }
    else pieces.push({ type, count: 1, from: name, to: name });
  });
  const [width, height] = [roomIn("strip-chart"), 34];
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Types of the ops in execution order" }, hatching("float-hatch", "var(--text)"));
  let x = 0;
  for (const piece of pieces) {
    const size = (piece.count / graph.ops.length) * width;
    const tip = `${piece.type || "as before"}: ${piece.count} ops, ${piece.from} to ${piece.to}`;
    svg.append(draw("rect", { class: `type ${typeClass(piece.type)}`, x, y: 2, width: size, height: height - 4, tip }));
    if (piece.type === "float") svg.append(draw("rect", { fill: "url(#float-hatch)", x, y: 2, width: Math.max(size, 2), height: height - 4, tip }));
    if (piece.type && size > 9 * piece.type.length) svg.append(draw("text", { class: `on-${typeClass(piece.type)}`, x: x + 6, y: 21, text: piece.type, "pointer-events": "none" }));
    x += size;
  }
  const legend = make("p", { class: "legend" });
  for (const type of new Set(graph.ops.map((op) => op[2]).filter(Boolean))) {
    const count = graph.ops.filter((op) => op[2] === type).length;
    legend.append(make("span", { class: `key type ${typeClass(type)}`, text: `${type}: ${count} ops` }));
  }
  const isFloat = graph.ops.some((op) => op[2] === "float");
  const said = isFloat ? "Hatched: it computes in float." : "No op of the region computes in float.";
  byId("strip-chart").append(legend, svg, make("p", { class: "note", text: `In execution order. ${said}` }));
  byId("scope-tree").append(...scopeNodes(graph.ops.map((op, index) => ({ parts: op[0].split("."), index })), 0, graph));
}

/** One level of scopes; what is inside is made when it is opened. */
function scopeNodes(entries, level, graph) {
  const groups = new Map();
  for (const entry of entries) {
    const key = entry.parts[level];
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(entry);
  }
  return [...groups].map(([name, inside]) => {
    if (inside.length === 1 && inside[0].parts.length === level + 1) return opNode(name, graph.ops[inside[0].index]);
    const counts = new Map();
    for (const { index } of inside) counts.set(graph.ops[index][2], (counts.get(graph.ops[index][2]) || 0) + 1);
    const chips = [...counts].filter(([type]) => type).map(([type, count]) => make("span", { class: `key type ${typeClass(type)}`, text: `${count} ${type}` }));
    const node = make("details", { class: "scope" }, make("summary", {}, make("span", { class: "name", text: name }), " ", ...chips));
    node.addEventListener("toggle", () => {
      if (node.open && node.childElementCount === 1) {
        const deeper = inside.filter((entry) => entry.parts.length > level + 1);
        const own = inside.filter((entry) => entry.parts.length === level + 1);
        node.append(...own.map((entry) => opNode(name, graph.ops[entry.index])), ...scopeNodes(deeper, level + 1, graph));
      }
    });
    return node;
  });
}

function opNode(name, [, kind, type, , point, reason]) {
  const label = point === null ? make("span", { class: "name", text: name }) : make("a", { class: "name", href: `#point=${encodeURIComponent(data.points.rows[point][0])}`, text: name });
  const chip = type ? make("span", { class: `key type ${typeClass(type)}`, text: type }) : "";
  return make("p", { class: "op" }, label, ` ${kind} `, chip, reason ? ` ${reason}` : "");
}

function showFront(front) {
  const choices = front.choices.filter(([cost, sqnr]) => finite(cost) && finite(sqnr));
  if (!choices.length || !byId("front-chart")) return;
  const line = { name: "SQNR", values: choices.map(([, sqnr]) => sqnr) };
  byId("front-chart").append(lineChart([line], {
    width: roomIn("front-chart"), height: 240, format: inDecibels, label: "Predicted signal to noise ratio against cost",
    place: (index) => `cost ${formatNumber(choices[index][0])}`,
    open: (index) => openChoice(choices[index][2]),
  }));
}

/** Open the listed choice that raises as many points as a dot of the chart, or the nearest one. */
function openChoice(raised) {
  const listed = [...document.querySelectorAll(".choice")];
  const distance = (choice) => Math.abs(Number(choice.dataset.raised) - raised);
  const [nearest] = listed.sort((one, other) => distance(one) - distance(other));
  nearest.open = true;
  nearest.scrollIntoView({ block: "nearest" });
  nearest.querySelector("summary").focus();
}
