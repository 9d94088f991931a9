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

function showState() {
  grid.show();
}

enableCopying(document);
enableTheme();
window.addEventListener("popstate", showState);
showState();
document.documentElement.dataset.ready = "true";
