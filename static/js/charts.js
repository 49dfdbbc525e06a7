// Draws the chart of each figure from the table beside it, and again when the table changes.
"use strict";
(() => {
  const OTHER = "Other models", CORRECTIONS = "Corrections";
  const charts = new Map();
  const palette = new Map(); // a model's colour in the chart that had it first
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const usd = (value) => {
    if (value === 0) return "$0";
    if (value < 0) return "−" + usd(-value);
    if (Math.abs(value) < 0.01) return "$" + Number(value.toPrecision(2)).toString();
    return "$" + value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  };
  // The ticks of an axis have as many decimals as the finest of them, cents at least.
  const decimals = (value) => value.toFixed(10).replace(/0+$/, "").split(".")[1].length;
  const tick = (value, _, ticks) => {
    const places = Math.max(2, ...ticks.map((one) => decimals(one.value)));
    return (value < 0 ? "−$" : "$") + Math.abs(value).toFixed(places);
  };

  // No two models of a chart share a colour; one that another chart has keeps its own if it can.
  function colours(labels) {
    const models = labels.filter((label) => label !== OTHER && label !== CORRECTIONS);
    const taken = new Map();
    for (const label of models) {
      const known = palette.get(label);
      if (known && ![...taken.values()].includes(known)) taken.set(label, known);
    }
    for (const label of models) {
      if (taken.has(label)) continue;
      const used = [...taken.values()];
      const free = [1, 2, 3, 4, 5].find((number) => !used.includes(number)) ?? 5;
      taken.set(label, free);
      if (!palette.has(label)) palette.set(label, free);
    }
    return (label) => style(label === OTHER ? "--series-other"
      : label === CORRECTIONS ? "--soft" : `--series-${taken.get(label)}`);
  }

  function read(table) {
    const rows = [...table.tBodies[0].rows];
    const series = [...table.querySelectorAll("th[data-series]")].map((head) => head.textContent.trim());
    const colour = colours(series);
    return {
      labels: rows.map((row) => row.cells[0].textContent.trim()),
      datasets: series.map((label, column) => ({
        label,
        data: rows.map((row) => Number(row.cells[column + 1].dataset.usd)),
        backgroundColor: colour(label),
        borderColor: style("--card"),
        borderWidth: { top: 1 },
        maxBarThickness: 28,
      })),
    };
  }

  function options() {
    const ink = style("--soft"), line = style("--line");
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    return {
      maintainAspectRatio: false,
      animation: matchMedia("(prefers-reduced-motion: reduce)").matches ? false : { duration: 300 },
      interaction: { mode: "index", intersect: false },
      scales: {
        x: { stacked: true, grid: { display: false }, border: { color: line },
             ticks: { color: ink, maxRotation: 0, autoSkipPadding: 12 } },
        y: { stacked: true, beginAtZero: true, border: { display: false }, grid: { color: line },
             ticks: { color: ink, maxTicksLimit: 5, callback: tick } },
      },
      plugins: {
        legend: { position: "bottom", align: "start",
                  labels: { color: ink, boxWidth: 10, boxHeight: 10, padding: 14 } },
        tooltip: {
          filter: (item) => item.raw !== 0,
          itemSort: (a, b) => b.raw - a.raw,
          callbacks: {
            label: (item) => ` ${item.dataset.label}: ${usd(item.raw)}`,
            footer: (items) => "Total: " + usd(items.reduce((sum, item) => sum + item.raw, 0)),
          },
        },
      },
    };
  }

  function draw(figure) {
    const data = read(figure.querySelector("table"));
    const chart = charts.get(figure);
    figure.classList.toggle("blank", !data.datasets.length);
    if (!chart) {
      charts.set(figure, new Chart(figure.querySelector("canvas"), { type: "bar", data, options: options() }));
      return;
    }
    // Data sets are kept by name, so that bars grow and shrink in place.
    chart.data.labels = data.labels;
    chart.data.datasets = data.datasets.map((fresh) => {
      const known = chart.data.datasets.find((old) => old.label === fresh.label);
      return known ? Object.assign(known, fresh) : fresh;
    });
    chart.update();
  }

  const drawAll = () => document.querySelectorAll("figure[data-chart]").forEach(draw);
  document.addEventListener("DOMContentLoaded", drawAll);
  document.addEventListener("htmx:oobAfterSwap", (event) => {
    const figure = event.target.closest("figure[data-chart]");
    if (figure && event.target.matches("table")) draw(figure);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    charts.forEach((chart) => { chart.options = options(); });
    drawAll();
  });
})();
