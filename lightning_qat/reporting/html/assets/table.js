/* The table of all points: sorting, filters, a search, a choice of columns; of 10,000 rows only the visible ones exist. */

const ROW_HEIGHT = 31;
const SPARE_ROWS = 12;
const NARROW = 640;  // as in the style sheet
const PRINTED_ROWS = 300;
const FILTERS = ["dtype", "role", "verdict"];

class PointGrid {
  constructor(points, grid, tools, state, open) {
    this.columns = points.columns;
    this.rows = points.rows;
    this.flagged = new Set(points.flagged);
    this.grid = grid;
    this.state = state;
    this.open = open;
    this.place = Object.fromEntries(this.columns.map((column, index) => [column.key, index]));
    this.active = 0;
    this.names = this.rows.map((row) => String(row[0]).toLowerCase());
    this.numeric = this.columns.map((_, at) => this.rows.some((row) => asNumber(row[at]) !== undefined));
    this.makeTools(tools);
    this.grid.classList.add("live");
    this.grid.tabIndex = 0;
    this.grid.addEventListener("scroll", () => this.drawRows(), { passive: true });
    this.grid.addEventListener("keydown", (event) => this.onKey(event));
    window.addEventListener("resize", () => this.drawRows());
    window.addEventListener("beforeprint", () => this.drawRows(PRINTED_ROWS));
    window.addEventListener("afterprint", () => this.drawRows());
  }

  makeTools(tools) {
    tools.hidden = false;
    this.search = make("input", { type: "search", placeholder: "Search names", "aria-label": "Search names of points" });
    this.search.addEventListener("input", () => this.change({ q: this.search.value }));
    tools.append(this.search);
    this.selects = {};
    for (const key of FILTERS) {
      const values = [...new Set(this.rows.map((row) => row[this.place[key]]))].filter((value) => value !== null).sort();
      if (values.length < 2) continue;
      const label = this.columns[this.place[key]].label;
      const select = make("select", { "aria-label": `Filter by ${label}` });
      select.append(make("option", { value: "", text: `any ${label}` }));
      for (const value of values) select.append(make("option", { value, text: value }));
      select.addEventListener("change", () => this.change({ [key]: select.value }));
      this.selects[key] = select;
      tools.append(select);
    }
    this.boxes = make("div");
    this.columns.forEach((column, index) => {
      const empty = this.rows.every((row) => row[index] === null);
      const box = make("input", { type: "checkbox", value: column.key, disabled: empty || index === 0 });
      box.addEventListener("change", () => this.change({ cols: this.chosenColumns() }));
      this.boxes.append(make("label", { title: column.help }, box, ` ${column.label}${empty ? " (no data)" : ""}`));
    });
    tools.append(make("details", { class: "columns" }, make("summary", { text: "Columns" }), this.boxes));
    this.reset = make("button", { type: "button", text: "Reset", onclick: () => this.change(null) });
    this.count = make("span", { class: "count", role: "status" });
    tools.append(this.reset, this.count);
  }

  chosenColumns() {
    const chosen = [...this.boxes.querySelectorAll("input:checked")].map((box) => box.value);
    return chosen.join() === this.standardColumns().join() ? "" : chosen.join();
  }

  standardColumns() {
    const filled = (index) => this.rows.some((row) => row[index] !== null);
    return this.columns.filter((column, index) => index === 0 || (column.shown && filled(index))).map((column) => column.key);
  }

  /** On a narrow screen the verdict stands beside the name: it is seen without scrolling. */
  arranged(keys) {
    if (window.innerWidth > NARROW || !keys.includes("verdict")) return keys;
    return ["point", "verdict", ...keys.filter((key) => key !== "point" && key !== "verdict")];
  }

  /** Change what is shown, and put it into the URL. */
  change(changes) {
    this.state.set(changes === null ? { q: "", dtype: "", role: "", verdict: "", sort: "", cols: "" } : changes);
    this.grid.scrollTop = 0;
    this.active = 0;
    this.show();
  }

  /** Show what the URL asks for. */
  show() {
    const state = this.state.get();
    if (this.search.value !== (state.q || "")) this.search.value = state.q || "";
    for (const [key, select] of Object.entries(this.selects)) select.value = state[key] || "";
    const known = (state.cols || "").split(",").filter((key) => key in this.place && key !== "point");
    this.visible = state.cols ? ["point", ...known] : this.arranged(this.standardColumns());
    for (const box of this.boxes.querySelectorAll("input")) box.checked = this.visible.includes(box.value);
    const words = (state.q || "").toLowerCase().split(/\s+/).filter(Boolean);
    const filters = FILTERS.filter((key) => state[key]).map((key) => [this.place[key], state[key]]);
    this.order = this.rows.map((_, index) => index).filter((index) =>
      words.every((word) => this.names[index].includes(word)) &&
      filters.every(([at, value]) => this.rows[index][at] === value));
    this.sortOrder(state.sort || "");
    this.drawHead(state.sort || "");
    this.drawRows();
    const all = this.rows.length;
    this.count.textContent = this.order.length === all ? `${all} points` : `${this.order.length} of ${all} points`;
  }

  sortOrder(sort) {
    const key = sort.replace(/^-/, "");
    const at = this.place[key];
    if (at === undefined) return;
    const sign = sort.startsWith("-") ? -1 : 1;
    const value = this.numeric[at] ? (index) => asNumber(this.rows[index][at]) : (index) => this.rows[index][at];
    this.order.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      const [noA, noB] = [a === null || a === undefined, b === null || b === undefined];
      if (noA || noB) return noA - noB || one - other;  // what is missing comes last, in both directions
      if (Number.isNaN(a) || Number.isNaN(b)) return sign * (Number.isNaN(a) - Number.isNaN(b)) || one - other;
      return sign * (a < b ? -1 : a > b ? 1 : 0) || one - other;
    });
  }

  drawHead(sort) {
    const table = make("table", { role: "grid", "aria-rowcount": this.order.length + 1, "aria-label": "All points" });
    const group = make("colgroup");
    const head = make("tr", { "aria-rowindex": 1 });
    let total = 0;
    for (const key of this.visible) {
      const at = this.place[key];
      const column = this.columns[at];
      const width = this.width(at);
      total += width;
      const col = make("col");
      col.style.width = `${width}px`;
      group.append(col);
      const direction = sort === key ? "ascending" : sort === `-${key}` ? "descending" : "none";
      const mark = { ascending: " ▲", descending: " ▼", none: "" }[direction];
      const first = this.numeric[at] ? `-${key}` : key;
      const next = sort === first ? (first === key ? `-${key}` : key) : first;
      const button = make("button", { type: "button", title: column.help, text: column.label + mark, onclick: () => this.change({ sort: next }) });
      head.append(make("th", { scope: "col", "aria-sort": direction, class: this.numeric[at] ? "number" : null }, button));
    }
    table.style.width = `${total}px`;
    this.body = make("tbody");
    table.append(group, make("thead", {}, head), this.body);
    this.grid.replaceChildren(table);
  }

  /** Wide enough for the longest of some cells, within limits. */
  width(at) {
    const step = Math.max(1, Math.floor(this.rows.length / 200));
    let longest = this.columns[at].label.length + 2;
    for (let row = 0; row < this.rows.length; row += step) longest = Math.max(longest, formatIn(this.columns[at], this.rows[row][at]).length);
    const most = at === 0 ? Math.min(52, Math.max(16, Math.floor(window.innerWidth / 20))) : 34;
    return Math.round(Math.min(longest, most) * 8.8) + 26;
  }

  drawRows(most = 0) {
    if (!this.body) return;
    const height = Math.max(this.grid.clientHeight, window.innerHeight);  // before the first rows it has no height
    const first = most ? 0 : Math.max(0, Math.floor(this.grid.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const last = Math.min(this.order.length, most || first + Math.ceil(height / ROW_HEIGHT) + 2 * SPARE_ROWS);
    const rows = [];
    if (first) rows.push(this.spacer(first));
    for (let line = first; line < last; line += 1) rows.push(this.makeRow(line));
    if (most && last < this.order.length) {
      const text = `The first ${last} of ${this.order.length} points.`;
      rows.push(make("tr", {}, make("td", { colspan: this.visible.length, text })));
    } else if (last < this.order.length) rows.push(this.spacer(this.order.length - last));
    if (!this.order.length) rows.push(make("tr", {}, make("td", { colspan: this.visible.length, text: "No point matches." })));
    this.body.replaceChildren(...rows);
  }

  spacer(lines) {
    const cell = make("td", { colspan: this.visible.length });
    cell.style.height = `${lines * ROW_HEIGHT}px`;
    return make("tr", { class: "spacer", "aria-hidden": "true" }, cell);
  }

  makeRow(line) {
    const index = this.order[line];
    const row = make("tr", { "aria-rowindex": line + 2, class: line === this.active ? "active" : null });
    for (const key of this.visible) {
      const at = this.place[key];
      const isFlagged = key === "verdict" && this.flagged.has(index);
      const text = (isFlagged ? "! " : "") + formatIn(this.columns[at], this.rows[index][at]);
      const cell = make("td", { class: this.numeric[at] ? "number" : isFlagged ? "bad" : null, title: text.length > 20 ? text : null });
      if (at === 0) cell.append(make("a", { class: "name", href: `#point=${encodeURIComponent(text)}`, tabindex: -1, text }));
      else cell.textContent = text;
      row.append(cell);
    }
    row.addEventListener("click", (event) => {
      this.active = line;
      if (event.target.closest("a")) return;
      this.open(index);
    });
    return row;
  }

  onKey(event) {
    if (event.target !== this.grid) return;
    const page = Math.max(1, Math.floor(this.grid.clientHeight / ROW_HEIGHT) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" && this.order.length) this.open(this.order[this.active]);
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.active = Math.max(0, Math.min(this.order.length - 1, this.active + steps[event.key]));
    const top = this.active * ROW_HEIGHT;
    const room = this.grid.clientHeight - 3 * ROW_HEIGHT;
    if (top < this.grid.scrollTop) this.grid.scrollTop = top;
    if (top > this.grid.scrollTop + room) this.grid.scrollTop = top - room;
    this.drawRows();
    say(String(this.rows[this.order[this.active]]?.[0] ?? ""));
  }
}
