// Curves of pipeline/compare/curves.py: one uPlot per metric, made when its part is first opened; all share zoom, axis and runs.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("curves").textContent);
  const state = { axis: "x", log: false, smooth: 0, shown: data.runs.map(() => true), range: null };
  const plots = new Map();
  window.geoloomPlots = plots; // for tests and for the curious
  const WIDTH = 380, HEIGHT = 230, DASHES = { untrained: [2, 3], pixels: [7, 4] };
  const element = (id) => document.getElementById(id);

  // exponential smoothing without the start's bias: the weights of what has been seen so far sum to 1
  function smoothed(values) {
    if (!state.smooth) return values;
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value == null) return null;
      sum = state.smooth * sum + (1 - state.smooth) * value;
      weight = state.smooth * weight + (1 - state.smooth);
      return sum / weight;
    });
  }

  // per run: its curve, two ends of the interval, one line per level; all on one common x
  function series(plot) {
    const tables = [], made = [{ label: state.axis === "x" ? "samples" : "hours" }], bands = [];
    plot.curves.forEach((curve, run) => {
      const x = state.axis === "x" ? curve.x : curve.h;
      if (!x.length || x.some((value) => value == null)) return;
      const { name, colour } = data.runs[run], show = state.shown[run];
      const add = (values, options) => {
        tables.push([x, values]);
        made.push({ show, stroke: colour, spanGaps: true, points: { show: false }, ...options });
      };
      add(smoothed(curve.y), { label: name, width: 1.6, points: { show: x.length < 12, size: 4, fill: colour } });
      if (curve.low) {
        add(curve.high, { label: name + " high", width: 0, class: "aux" });
        add(curve.low, { label: name + " low", width: 0, class: "aux" });
        bands.push({ series: [made.length - 2, made.length - 1], fill: colour + "26" });
      }
      for (const [row, height] of Object.entries(curve.levels))
        add(x.map(() => height), { label: name + " " + row, width: 1, dash: DASHES[row], class: "aux" });
    });
    return { made, bands, table: tables.length ? uPlot.join(tables.map(([x, y]) => dedupe(x, y))) : [[]] };
  }

  // uPlot wants rising x: of equal ones the last stands
  function dedupe(x, y) {
    const keep = x.map((value, i) => i + 1 === x.length || x[i + 1] > value);
    return [x.filter((_, i) => keep[i]), y.filter((_, i) => keep[i])];
  }

  function draw(plot, place) {
    const { made, bands, table } = series(plot);
    const positive = table.slice(1).every((values) => values.every((value) => value == null || value > 0));
    const options = {
      width: WIDTH, height: HEIGHT, series: made, bands,
      scales: { x: { time: false }, y: { distr: state.log && positive ? 3 : 1 } },
      axes: [{ values: (_, ticks) => ticks.map(short) }, { size: 60, values: (_, ticks) => ticks.map((t) => (t == null ? "" : short(t))) }],
      cursor: { drag: { x: true, y: false }, sync: { key: "curves", scales: ["x", null] } },
      legend: { live: true },
      hooks: { setScale: [(self, scale) => scale === "x" && zoomed(self)] },
    };
    plots.get(plot.key)?.destroy();
    const chart = new uPlot(options, table, place);
    plots.set(plot.key, chart);
    if (state.range) chart.setScale("x", { min: state.range[0], max: state.range[1] });
  }

  const short = (value) => (Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1).replace("e+", "e") : String(+value.toPrecision(4)));

  let following = false;
  function zoomed(source) {
    if (following) return;
    const { min, max } = source.scales.x, all = source.data[0];
    const whole = !all.length || (min <= all[0] && max >= all[all.length - 1]);
    const range = whole ? null : [min, max];
    if (String(range) === String(state.range)) return;
    state.range = range;
    following = true;
    for (const chart of plots.values())
      if (chart !== source && chart.data[0].length)
        chart.setScale("x", range ? { min, max } : { min: chart.data[0][0], max: chart.data[0][chart.data[0].length - 1] });
    following = false;
  }

  function fill(part) {
    const place = part.querySelector(".plots");
    if (!part.open || place.childElementCount) return;
    for (const plot of data.plots.filter((one) => one.part === part.dataset.part)) {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      caption.textContent = plot.key;
      figure.dataset.key = plot.key;
      figure.append(caption);
      place.append(figure);
      draw(plot, figure);
    }
  }

  function redraw() {
    for (const plot of data.plots) {
      const figure = document.querySelector(`figure[data-key="${CSS.escape(plot.key)}"]`);
      if (figure) draw(plot, figure);
    }
  }

  document.querySelectorAll("details.part").forEach((part) => {
    part.addEventListener("toggle", () => fill(part));
    fill(part);
  });
  document.querySelectorAll("#runs input").forEach((box) =>
    box.addEventListener("change", () => { state.shown[+box.value] = box.checked; redraw(); }));
  element("axis").addEventListener("change", (event) => { state.axis = event.target.value; state.range = null; redraw(); });
  element("log").addEventListener("change", (event) => { state.log = event.target.checked; redraw(); });
  element("smooth").addEventListener("input", (event) => { state.smooth = +event.target.value; redraw(); });
  element("reset").addEventListener("click", () => { state.range = null; redraw(); });
})();
