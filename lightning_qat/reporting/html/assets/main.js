/* What happens when the page opens: the URL says which rows, which columns and which point are shown. */

/** What is shown, kept behind the "#" of the URL: #q=conv&sort=-score&point=layers.0.conv1.weight */
class PageState {
  get() {
    const hash = location.hash.slice(1);
    return hash.includes("=") ? Object.fromEntries(new URLSearchParams(hash)) : {};
  }

  set(changes, remember = false) {
    const entries = Object.entries({ ...this.get(), ...changes }).filter(([, value]) => value);
    const url = `#${new URLSearchParams(entries)}`;
    history[remember ? "pushState" : "replaceState"](null, "", url);
  }
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // pages that are opened from a disk may not use the clipboard in some browsers
    const area = make("textarea", { readonly: true, text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say("Copied.");
}

function enableCopying(root) {
  for (const button of root.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copyText(button.parentElement.querySelector("code").textContent));
  }
}

function enableTheme() {
  const button = byId("theme");
  const isDark = () => (document.documentElement.dataset.theme ||
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    name();
  });
  name();
}

const data = JSON.parse(byId("data").textContent);
const state = new PageState();
const places = new Map(data.points.rows.map((row, index) => [row[0], index]));
const openPoint = (index) => {
  state.set({ point: data.points.rows[index][0] }, true);
  showState();
};
const grid = new PointGrid(data.points, byId("grid"), byId("tools"), state, openPoint);

const pointPage = new PointPage(data, byId("point"), () => {
  if (state.get().point) state.set({ point: "" });
});

function showState() {
  grid.show();
  const index = places.get(state.get().point);
  if (index === undefined) pointPage.hide();
  else pointPage.show(index);
}

const pointNames = data.points.rows.map((row) => row[0]);
showDepth(data.depth);
showEpochs(data.series, pointNames, openPoint);
showGraph(data.graph);
showFront(data.front);

enableCopying(document);
enableTheme();
/* A link to a point keeps the filters that are in the URL. */
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#point="]');
  const index = link && places.get(decodeURIComponent(link.getAttribute("href").slice(7)));
  if (index === undefined || index === null) return;
  event.preventDefault();
  openPoint(index);
});
window.addEventListener("popstate", showState);
window.addEventListener("hashchange", showState);
showState();
document.documentElement.dataset.ready = "true";
