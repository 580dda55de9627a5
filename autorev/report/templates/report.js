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

/* A place that is marked lazy is drawn when it comes near the window, which it does not while it is folded away. */
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
  for (const id of Object.keys(figures)) draw(id, false, widthOnPaper(id));
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
  // What is folded away again has no width to be drawn in.
  for (const place of document.querySelectorAll("details:not([open]) .plot.lazy")) {
    Plotly.purge(place);
    drawn.delete(place.id);
    near.observe(place);
  }
  paint();
});

for (const id of Object.keys(figures)) {
  const place = document.getElementById(id);
  if (place.classList.contains("lazy")) near.observe(place);
  else draw(id, isDark());
}
nameButton();
