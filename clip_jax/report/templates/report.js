"use strict";
(() => {
  const split = (text) => (text ? text.split("|") : []);

  const charts = Array.from(document.querySelectorAll(".chart"), (figure) => ({
    plot: figure.querySelector(".plot"),
    cross: figure.querySelector(".cross"),
    at: figure.querySelector(".at"),
    xs: split(figure.dataset.xs).map(Number),
    steps: split(figure.dataset.steps),
    samples: split(figure.dataset.samples),
    outputs: Array.from(figure.querySelectorAll("output[data-values]"), (node) => (
      { node, rest: node.textContent, values: split(node.dataset.values) })),
  }));

  const nearest = (xs, x) => {
    let low = 0;
    let high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  };

  // All charts share their axis of samples seen, so one pointer reads all of them.
  const show = (x) => {
    for (const chart of charts) {
      const i = nearest(chart.xs, x);
      const left = `${chart.xs[i] / 20}%`;
      chart.cross.hidden = chart.at.hidden = false;
      chart.cross.style.left = chart.at.style.left = left;
      chart.at.style.transform = `translateX(-${left})`; // stays within the chart at both ends
      chart.at.textContent = `step ${chart.steps[i]} · ${chart.samples[i]} samples`;
      for (const { node, values } of chart.outputs) node.textContent = values[i] || "–";
    }
  };

  const rest = () => {
    for (const chart of charts) {
      chart.cross.hidden = chart.at.hidden = true;
      for (const output of chart.outputs) output.node.textContent = output.rest;
    }
  };

  for (const { plot } of charts) {
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      show(((event.clientX - box.left) / box.width) * 2000);
    });
    plot.addEventListener("pointerleave", rest);
  }

  const map = document.querySelector(".map");
  if (map) {
    const output = document.getElementById("cell");
    const heads = map.tHead.rows[0].cells;
    const unmark = () => {
      for (const node of map.querySelectorAll(".lit")) node.classList.remove("lit");
      output.textContent = "";
    };
    map.addEventListener("pointerover", (event) => {
      unmark();
      const cell = event.target.closest("tbody td");
      if (!cell) return;
      const caption = cell.parentNode.cells[0];
      const head = heads[cell.cellIndex];
      caption.classList.add("lit");
      head.classList.add("lit");
      output.textContent = `image ${cell.cellIndex} × ${caption.textContent}: ${cell.title}`;
    });
    map.addEventListener("pointerleave", unmark);
  }

  document.documentElement.dataset.ready = String(charts.length);
})();
