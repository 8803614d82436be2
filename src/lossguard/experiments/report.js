"use strict";
// Draws each figure from the JSON behind it when it comes near the view, and again whenever a switch
// beside it changes.

const COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd",
                "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
const DASHES = ["none", "9px,4px", "9px,3px,2px,3px", "2px,3px"];
const AXES = {
  step: "Optimizer step",
  gradients: "Gradient evaluations of one seed",
  seconds: "Seconds of one seed (mean over seeds, in proportion to the step)",
};
// From 0.001 to 1000 what Plotly calls a power of ten is a plain number.
const PLAIN = {
  "10<sup>−3</sup>": "0.001", "10<sup>−2</sup>": "0.01", "10<sup>−1</sup>": "0.1",
  "10<sup>2</sup>": "100", "10<sup>3</sup>": "1000",
};
const BANDS = 5;  // of more methods they would hide each other
const color = (number) => COLORS[number % COLORS.length];
// Each line is thinner than the one before, which it may lie on.
const width = (number, all) => 3 - 2 * number / Math.max(all - 1, 1);
const dash = (number) => DASHES[Math.floor(number / COLORS.length) % DASHES.length];

function decode(text) {
  return new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

// Of the rows that go on where others end: seeds may have been taken further than others.
function over(rows, combine) {
  const longest = rows.reduce((a, b) => (b.length > a.length ? b : a));
  return longest.map((_, i) => combine(rows.filter((row) => i < row.length).map((row) => row[i])));
}

const mean = (values) => values.reduce((a, b) => a + b) / values.length;

function decodeMethod(method, number, { length }) {
  const many = (rows) => rows && rows.map((row) => row && decode(row));
  const step = decode(method.step);
  const flat = typeof method.gradients === "number";
  return {
    name: method.name,
    color: color(method.style),
    dash: dash(method.style),
    width: width(number, length),
    loss: many(method.loss),
    use: many(method.use),
    x: {
      step: method.loss.map(() => step),
      gradients: flat ? method.loss.map(() => step.map((k) => k * method.gradients)) : many(method.gradients),
      seconds: method.loss.map(() => step.map((k) => k * method.seconds)),
    },
  };
}

function line(method, x, y, more) {
  const style = { color: method.color, dash: method.dash, width: method.width ?? 1.5 };
  return { x, y, name: method.name, mode: "lines", line: style, ...more };
}

// From the highest loss along the curve and back along the lowest, where both can be drawn.
function band(method, x, rows) {
  const low = over(rows, (values) => Math.min(...values));
  const high = over(rows, (values) => Math.max(...values));
  const drawn = [...x.keys()].filter((i) => low[i] > 0 && isFinite(high[i]));
  const back = [...drawn].reverse();
  return {
    x: [...drawn.map((i) => x[i]), ...back.map((i) => x[i])],
    y: [...drawn.map((i) => high[i]), ...back.map((i) => low[i])],
    name: method.name, mode: "lines", line: { width: 0 }, fill: "toself",
    fillcolor: method.color + "33", hoverinfo: "skip",
  };
}

function tracesOf(method, { x, seeds: all, apart, bands }) {
  const seeds = all.filter((seed) => method.loss[seed]);  // it may have been run with fewer
  const chosen = (rows) => seeds.map((seed) => rows[seed].slice(0, method.loss[seed].length));
  const xs = chosen(method.x[x]);
  const traces = [];
  if (!seeds.length) return traces;
  if (apart) {
    seeds.forEach((seed, i) => {
      traces.push(line(method, xs[i], method.loss[seed], { meta: seed, opacity: 0.8 }));
    });
  } else {
    if (bands) traces.push(band(method, over(xs, mean), chosen(method.loss)));
    traces.push(line(method, over(xs, mean), over(chosen(method.loss), mean)));
  }
  if (method.use) {
    traces.push(line(method, over(xs, mean), over(chosen(method.use), mean), {
      yaxis: "y2", line: { color: method.color, dash: method.dash, width: 1.5 },
    }));
  }
  return traces;
}

// Of the loss axis at first, if lines leave at the top or the bottom: without it, the margin below is
// in proportion to what they span.
function limits(traces, { ceiling, floor }) {
  if (!ceiling) return floor ? { clipmin: floor } : {};
  const losses = traces.filter((trace) => !trace.yaxis).flatMap((trace) => [...trace.y]);
  const low = losses.reduce((least, loss) => (loss > 0 && loss < least ? loss : least), ceiling);
  return { clipmin: floor ?? low * (low / ceiling) ** 0.05, clipmax: ceiling };
}

function layout(more) {
  const front = getComputedStyle(document.body).color;
  const axes = Object.fromEntries(Object.entries(more).filter(([name]) => name.includes("axis")));
  for (const name in axes) {
    const format = name.startsWith("x") ? ",.7~g" : ".4~g";
    axes[name] = {
      gridcolor: "rgba(128,128,128,0.25)", zeroline: false, automargin: true, exponentformat: "power",
      labelalias: PLAIN, hoverformat: format,
      tickformatstops: [{ dtickrange: [null, "D0"], value: format }],  // within a power of ten
      ...axes[name],
    };
  }
  return {
    margin: { l: 60, r: 10, t: 32, b: 45 }, font: { color: front, family: "inherit" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "rgba(128,128,128,0.8)", activecolor: front },
    showlegend: false, ...more, ...axes,
  };
}

// Buttons by name: Plotly's own choice includes one that sends the data away.
const CONFIG = {
  responsive: true, displaylogo: false, displayModeBar: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
};

function draw(plot, traces, more) {
  Plotly.react(plot, traces, layout(more), CONFIG);
}

// A run of several methods: the form before the plot says what is shown.
function curves(plot, data) {
  const form = plot.previousElementSibling;
  const methods = data.methods.map(decodeMethod);
  const show = () => {
    const chosen = new FormData(form);
    const state = {
      x: chosen.get("x"), seeds: chosen.getAll("seed").map(Number), apart: chosen.has("apart"),
      bands: chosen.getAll("method").length <= BANDS,
    };
    const shown = state.seeds.length ? chosen.getAll("method").map((i) => methods[i]) : [];
    const nothing = {
      text: `Choose a ${state.seeds.length ? "method" : "seed"} above`, showarrow: false,
      xref: "paper", yref: "paper", x: 0.5, y: 0.6, font: { size: 18 },
    };
    const track = methods.some((method) => method.use);
    const traces = shown.flatMap((method) => tracesOf(method, state));
    draw(plot, traces, {
      uirevision: "kept", annotations: shown.length ? [] : [nothing],
      xaxis: {
        type: "log", title: { text: AXES[state.x] }, uirevision: state.x, anchor: track ? "y2" : "y",
      },
      yaxis: {
        type: "log", title: { text: "Training loss" }, domain: [track ? 0.25 : 0, 1],
        autorangeoptions: limits(traces, data), uirevision: state.x,
      },
      yaxis2: {
        title: { text: "use_l2o", standoff: 12 }, domain: [0, 0.2], range: [0.45, 1.05],
        tickvals: [0.5, 1], ticktext: ["fallback", "learned"], fixedrange: true, visible: track,
      },
    });
  };
  form.addEventListener("change", show);
  return show;
}

// A few lines with a legend: meta-training.
function lines(plot, data) {
  const traces = data.lines.map(({ name, x, y }, i) =>
    line({ name, color: color(i), dash: dash(i) }, decode(x), decode(y)));
  return () => draw(plot, traces, {
    showlegend: true, legend: { orientation: "h", y: -0.2, yanchor: "top" },
    xaxis: { type: data.log_x ? "log" : "linear", title: { text: data.x } },
    yaxis: { type: "log", title: { text: data.y.replace(", ", ",<br>") } },  // or it is cut off
  });
}

document.querySelectorAll(".switches").forEach((form) => {
  form.querySelectorAll(".line").forEach((sample, i, all) => {
    sample.style.stroke = color(sample.dataset.style);
    sample.style.strokeWidth = width(i, all.length);
    sample.style.strokeDasharray = dash(sample.dataset.style);
  });
  form.querySelectorAll("button").forEach((button) => button.addEventListener("click", () => {
    form.querySelectorAll("[name=method]").forEach((box) => { box.checked = button.value === "all"; });
    form.dispatchEvent(new Event("change"));
  }));
});

const shows = new Map();  // of the plots that have come near the view

function start(plot) {
  if (!shows.has(plot)) {
    const data = JSON.parse(plot.nextElementSibling.textContent);
    shows.set(plot, data.methods ? curves(plot, data) : lines(plot, data));
    shows.get(plot)();
  }
}

const near = new IntersectionObserver((entries) => {
  entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
    near.unobserve(target);
    start(target);
  });
}, { rootMargin: "100% 0%" });
const plots = document.querySelectorAll(".plot");
plots.forEach((plot) => near.observe(plot));
addEventListener("beforeprint", () => plots.forEach(start));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shows.forEach((show) => show()));
