/* What happens when the page opens: the URL says which rows, which columns and which point are shown. */

/** What is shown, kept behind the "#" of the URL: #q=conv&sort=-score&point=layers.0.conv1.weight, or &at=glossary */
class PageState {
  get() {
    const hash = location.hash.slice(1);
    return hash.includes("=") ? Object.fromEntries(new URLSearchParams(hash)) : {};
  }

  set(changes, remember = false) {
    const entries = Object.entries({ ...this.get(), at: "", ...changes }).filter(([, value]) => value);
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
showEpochs(data.series, pointNames);
showGraph(data.graph);
showFront(data.front);

/** Say of everything that scrolls sideways that it does, as soon as it is shown and whenever its width changes. */
function markWide() {
  const seen = new ResizeObserver((entries) => {
    for (const box of new Set(entries.map(({ target }) => target.closest(".scroll")))) box?.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  });
  for (const box of document.querySelectorAll(".scroll")) for (const one of [box, ...box.children]) seen.observe(one);
}

markWide();
enableCopying(document);
enableTheme();
/** Show a section or a word of the glossary, and let the keyboard go on from there. */
function goTo(id) {
  const element = byId(id);
  if (!element) return;
  for (const pointed of document.querySelectorAll(".pointed")) pointed.classList.remove("pointed");
  element.classList.add("pointed");
  element.tabIndex = -1;
  element.focus({ preventScroll: true });
  element.scrollIntoView();
}

/* Links inside of the page keep the filters that are in the URL. */
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;  // the reader wants another tab
  const target = decodeURIComponent(link.getAttribute("href").slice(1));
  const index = places.get(target.replace(/^point=/, ""));
  if (target.startsWith("point=") && index !== undefined) openPoint(index);
  else if (byId(target)) {
    state.set({ at: target, point: "" }, true);
    showState();
    goTo(target);
  } else return;
  event.preventDefault();
});
/* On paper nothing can be opened. */
window.addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("#verdict details:not([open]), #findings details:not([open])")) {
    closed.open = true;
    closed.dataset.printed = "";
  }
});
window.addEventListener("afterprint", () => {
  for (const opened of document.querySelectorAll("details[data-printed]")) {
    opened.open = false;
    delete opened.dataset.printed;
  }
});
window.addEventListener("popstate", showState);
window.addEventListener("hashchange", showState);
showState();
goTo(state.get().at);
document.documentElement.dataset.ready = "true";
