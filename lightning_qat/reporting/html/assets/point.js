/* The page of one point: its numbers, what to do, its histogram, its series, and the ops around it. */

const SERIES_NAMES = { scale: "scale", clipped_share: "clipped share", flip_rate: "flips of weight codes", scale_drift: "drift of the scale", sqnr: "SQNR in dB", score: "sensitivity" };
const FROM_ZERO = new Set(["clipped_share", "flip_rate"]);

class PointPage {
  constructor(data, dialog, close) {
    this.data = data;
    this.dialog = dialog;
    this.place = Object.fromEntries(data.points.columns.map((column, index) => [column.key, index]));
    dialog.addEventListener("close", close);
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }

  show(index) {
    const row = this.data.points.rows[index];
    this.dialog.replaceChildren(
      make("button", { type: "button", class: "close", text: "Close", onclick: () => this.dialog.close() }),
      make("h2", { id: "point-name", class: "name", text: row[0] }),
      ...this.advice(index), this.facts(row), ...this.histogram(index, row), ...this.series(index), ...this.neighbours(index));
    enableCopying(this.dialog);
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
  }

  hide() {
    if (this.dialog.open) this.dialog.close();
  }

  advice(index) {
    const advice = this.data.advice[index];
    if (!advice) return [];
    const parts = [make("p", { text: advice.evidence }), make("p", { class: "note", text: `Measured ${advice.measured}` })];
    if (advice.action) parts.push(make("p", {}, make("strong", { text: "What to do: " }), advice.action));
    if (advice.yaml) parts.push(make("div", { class: "paste" }, make("button", { type: "button", class: "copy", text: "Copy" }), make("pre", {}, make("code", { text: advice.yaml })), make("p", { class: "note", text: this.data.place })));
    return parts;
  }

  facts(row) {
    const list = make("dl", { class: "facts" });
    this.data.points.columns.forEach((column, at) => {
      if (at === 0 || row[at] === null) return;
      list.append(make("div", { title: column.help }, make("dt", {}, make("a", { href: `#${column.anchor}`, text: column.label })), make("dd", { text: formatIn(column, row[at]) })));
    });
    return list;
  }

  histogram(index, row) {
    const found = this.data.histograms[index];
    if (!found) return [];
    const scale = row[this.place.scale];
    const [lowest, highest] = [row[this.place.lowest], row[this.place.highest]];
    const isKnown = finite(scale) && finite(lowest) && finite(highest);
    const zero = isKnown ? Math.round(found[0] - lowest / scale) : 0;
    const last = isKnown ? Math.round(highest / scale) + zero : found[0] + found[2].length * found[1] - 1;
    const text = "Values by code, on a logarithmic axis; between the dashed lines is the range that the type represents.";
    return [make("figure", {}, make("figcaption", { text }), histogramChart(found, last, isKnown ? scale : null, zero))];
  }

  series(index) {
    const charts = make("div", { class: "charts" });
    for (const [key, name] of Object.entries(SERIES_NAMES)) {
      const found = this.data.series[key];
      const values = found ? found.values[index].map(asNumber) : [];
      if (!values.some((value) => finite(value) && value !== 0)) continue;
      const chart = lineChart([{ name, values }], { label: `${name} over the epochs`, withZero: FROM_ZERO.has(key), format: SHARES.has(key) ? formatShare : formatNumber, place: (at) => `epoch ${found.epochs[at]}` });
      charts.append(make("figure", {}, make("figcaption", { text: `${name} over the epochs` }), chart));
    }
    return charts.childElementCount ? [charts] : [];
  }

  neighbours(index) {
    const { ops, op_of_point: opOf } = this.data.graph;
    const own = opOf[index];
    if (own === null || own === undefined) return [];
    const consumers = ops.map((op, place) => [op, place]).filter(([op]) => op[3].includes(own)).map(([, place]) => place);
    const lines = [["Comes from", ops[own][3]], ["Goes to", consumers]].map(([label, places]) => {
      const line = make("p", {}, make("strong", { text: `${label}: ` }));
      places.forEach((place, number) => {
        const point = ops[place][4];
        line.append(number ? ", " : "", point === null ? make("span", { class: "name", text: ops[place][0] }) : pointLink(point));
      });
      if (!places.length) line.append(label === "Comes from" ? "no op of the region" : "the output of the region");
      return line;
    });
    return lines;
  }
}
