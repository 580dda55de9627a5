"use strict";
const { figures, dark: darkForLight } = JSON.parse(document.getElementById("data").textContent);
const page = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");
const paperWidth = 690; // CSS pixels between the margins of an A4 page
const gap = 16; // between figures that stand beside each other
const drawn = new Set();

const isDark = () => (page.dataset.theme ? page.dataset.theme === "dark" : prefersDark.matches);

/* A figure is drawn in light colours; on dark paper each has its counterpart. */
function inColors(figure, dark) {
  return JSON.parse(JSON.stringify(figure), (key, value) => (dark && darkForLight[value]) || value);
}

function draw(id, dark, width) {
  const { data, layout } = inColors(figures[id], dark);
  Plotly.react(id, data, { ...layout, width }, { displayModeBar: false, responsive: true });
  drawn.add(id);
}

/* A figure is drawn when it comes near the window, which it does not while it is folded away. */
const near = new IntersectionObserver((places) => {
  for (const { target, isIntersecting } of places) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    draw(target.id, isDark());
  }
}, { rootMargin: "400px" });

function nameButton() {
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-pressed", String(isDark()));
}

function paint() {
  for (const id of drawn) draw(id, isDark());
  nameButton();
}

button.addEventListener("click", () => {
  page.dataset.theme = isDark() ? "light" : "dark";
  paint();
});
prefersDark.addEventListener("change", paint);

function widthOnPaper(id) {
  const columns = Number(document.getElementById(id).closest("[data-columns]")?.dataset.columns ?? 1);
  return Math.floor((paperWidth - gap * (columns - 1)) / columns);
}

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
  if (window.Plotly) for (const id of Object.keys(figures)) draw(id, false, widthOnPaper(id));
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
  // What is folded away again has no width to be drawn in.
  for (const place of document.querySelectorAll("details:not([open]) .plot")) {
    if (!drawn.delete(place.id)) continue;
    Plotly.purge(place);
    near.observe(place);
  }
  paint();
});

/* Tables: a click on a heading sorts by its column, and a long table can be filtered. */
const sizes = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, us: 1e-6, ms: 1e-3, min: 60, M: 1e6, B: 1e9, G: 1e9, T: 1e12, P: 1e15 };

function amount(cell) {
  const found = cell.textContent.replaceAll(",", "").match(/^[!\s]*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-zA-Z]*)/);
  return found ? Number(found[1]) * (sizes[found[2]] ?? sizes[found[2][0]] ?? 1) : null;
}

function sort(table, column, down) {
  const keyed = [...table.tBodies].map((body) => [body, body.rows[0].cells[column]]);
  const order = (a, b) => {
    const [x, y] = [amount(a), amount(b)];
    if (x !== null && y !== null) return x - y;
    return x === y ? a.textContent.localeCompare(b.textContent) : x === null ? 1 : -1;
  };
  keyed.sort(([, a], [, b]) => (down ? order(b, a) : order(a, b)));
  table.append(...keyed.map(([body]) => body));
}

for (const table of document.querySelectorAll("table.numbers")) {
  if (table.tBodies.length < 3) continue;
  for (const head of table.tHead.rows[0].cells) {
    head.title = "Sort";
    head.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table, head.cellIndex, down);
    });
  }
  if (table.tBodies.length < 15) continue;
  const filter = Object.assign(document.createElement("input"), { type: "search", placeholder: "Filter the rows" });
  filter.setAttribute("aria-label", "Filter the rows");
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const body of table.tBodies) body.hidden = !body.textContent.toLowerCase().includes(wanted);
  });
  table.closest(".scroll").before(filter);
}
nameButton();

/* plotly is in the page, compressed; where the browser cannot inflate it, text and tables are there all the same. */
async function inflate() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  for (const id of Object.keys(figures)) near.observe(document.getElementById(id));
}
if (Object.keys(figures).length) inflate();
