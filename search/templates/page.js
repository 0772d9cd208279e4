"use strict";
// Draws the charts of a page in its colours, light or dark, and lets its code be copied.
const colours = () => {
  const style = getComputedStyle(document.documentElement);
  return { "font.color": style.getPropertyValue("--ink").trim() };
};
const charts = [...document.querySelectorAll(".chart")];
const config = { responsive: true, displaylogo: false, displayModeBar: false };
for (const chart of charts) {
  const figure = JSON.parse(chart.querySelector("script").textContent);
  figure.layout.font = { ...figure.layout.font, color: colours()["font.color"] };
  Plotly.newPlot(chart, figure.data, figure.layout, config);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of charts) Plotly.relayout(chart, colours());
});
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "Copied";
  });
}
