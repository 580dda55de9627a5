"use strict";
const { figures, dark: darkForLight } = JSON.parse(document.getElementById("data").textContent);
const page = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");
const paperWidth = 690; // CSS pixels between the margins of an A4 page

const isDark = () => (page.dataset.theme ? page.dataset.theme === "dark" : prefersDark.matches);

/* A figure is drawn in light colours; on dark paper each has its counterpart. */
function inColors(figure, dark) {
  return JSON.parse(JSON.stringify(figure), (key, value) => (dark && darkForLight[value]) || value);
}

function draw(dark, width) {
  for (const [id, figure] of Object.entries(figures)) {
    const { data, layout } = inColors(figure, dark);
    Plotly.react(id, data, { ...layout, width }, { displayModeBar: false, responsive: true });
  }
}

function paint() {
  draw(isDark());
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-pressed", String(isDark()));
}

button.addEventListener("click", () => {
  page.dataset.theme = isDark() ? "light" : "dark";
  paint();
});
prefersDark.addEventListener("change", paint);

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
  draw(false, paperWidth);
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
  paint();
});
paint();
