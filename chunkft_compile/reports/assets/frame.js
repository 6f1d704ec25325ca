// What all figures share: the data of the page, what is chosen, colours, Plotly's settings, tables and legends.

let data; // see `make_page`
const chosen = { step: 0, instant: 0, param: 0 };
const PRINTED_PX = 680; // a page of paper is narrower than the window it is printed from
const printMedia = window.matchMedia("print");

const byId = (id) => document.getElementById(id);
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const onPaper = () => printMedia.matches || "paper" in document.documentElement.dataset;

async function readData() {
  const packed = Uint8Array.from(atob(byId("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// A category has one colour in every figure, and what goes with it the same: backward makes gradients, an update reads optimizer
// state, copies bring what is staged. page.css has the colours, for light and for dark.
const categoryColor = (name) => variable(`--${name.replace(/ /g, "-")}`);
const PARTS = {
  forward: "saved values",
  recompute: "workspace",
  backward: "gradients",
  update: "optimizer state",
  "exposed transfers": "staging",
  "hidden transfers": "", // diamonds, for these take no time
};
const OPTIONS = {
  "forward only": ["weights", "no backward comes back to it, so nothing is kept"],
  save: ["saved values", "keeps all that its backward reads"],
  cheap: ["workspace", "keeps results of heavy operators, computes the rest again"],
  inputs: ["gradients", "keeps only what comes in, computes all again"],
  offload: ["staging", "as inputs, and those wait beside the device"],
  tiled: ["optimizer state", "computes the loss in so many tiles of tokens"],
};
const optionOf = (name) => OPTIONS[name] || OPTIONS[name.split(" ")[0]] || ["optimizer state", ""]; // "tiled 8" is a tiled one

// Plotly reads labels as HTML: names of a plan are text.
const text = (value) => String(value).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

function element(tag, content, name) {
  const made = document.createElement(tag);
  made.textContent = content;
  if (name) made.className = name;
  return made;
}

// Draws a figure; `label` is what it shows, in words.
function draw(id, traces, more, label) {
  const axis = { gridcolor: variable("--grid"), zerolinecolor: variable("--grid"), linecolor: variable("--line"), automargin: true };
  const ink = { color: variable("--ink") };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    bargap: 0,
    margin: { l: 8, r: 8, t: 24, b: 8 },
    font: { ...ink, family: "system-ui, sans-serif", size: 13 },
    hoverlabel: { align: "left", bgcolor: variable("--raised"), bordercolor: variable("--line"), font: ink },
    ...(onPaper() ? { width: PRINTED_PX } : { autosize: true }),
    ...more,
    xaxis: { ...axis, zeroline: false, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
  byId(id).setAttribute("aria-label", label);
  Plotly.react(id, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}

function onClick(id, act) {
  byId(id).removeAllListeners("plotly_click");
  byId(id).on("plotly_click", (event) => act(event.points[0]));
}

// At most `most` of the numbers 1 to `count`, in steps that people count in.
function dtick(count, most) {
  for (let ten = 1; ; ten *= 10) for (const one of [1, 2, 5]) if (count / (one * ten) <= most) return one * ten;
}
const stepAxis = (id) => ({
  title: { text: "step" },
  range: [0.5, data.steps.length + 0.5],
  tick0: data.steps.length > 20 ? 0 : 1,
  tickformat: "d",
  tickangle: 0,
  dtick: dtick(data.steps.length, Math.max(4, byId(id).clientWidth / 45)),
  showgrid: false,
});
const chosenStep = () =>
  data.steps.length < 2
    ? []
    : [
        {
          type: "rect",
          yref: "paper",
          y0: 0,
          y1: 1,
          x0: chosen.step + 0.5,
          x1: chosen.step + 1.5,
          line: { color: variable("--ink"), width: 2 },
        },
      ];
const measuredMarks = (x, y, hovertext) => ({
  type: "scatter",
  mode: "markers",
  x,
  y,
  hovertext,
  hoverinfo: "text",
  marker: { symbol: "line-ew", size: Math.max(8, Math.min(26, 600 / data.steps.length)), line: { color: variable("--ink"), width: 3 } },
});

// As many of the names on an axis as there is room for, the first one always.
function thinned(names, room) {
  const every = Math.ceil(names.length / Math.max(2, Math.floor(room)));
  const shown = names.map((_, i) => i).filter((i) => i % every === 0);
  return { tickvals: shown, ticktext: shown.map((i) => text(names[i])) };
}

function legend(id, entries) {
  byId(id).replaceChildren(
    ...entries.map(([name, color, note]) => {
      const made = element("span", name),
        mark = document.createElement("i");
      mark.style.background = color;
      made.prepend(mark);
      if (note) made.append(element("small", ` ${note}`));
      return made;
    }),
  );
}

function fillTable(parent, head, rows) {
  const made = document.createElement("table"),
    top = made.createTHead().insertRow(),
    body = made.createTBody();
  const isNumber = (cell) => /^[-+]?\d[\d.]*( ([kMGT]?B|us|ms|s))?$/.test(String(cell));
  const kind = (cell) => (isNumber(cell) ? "number" : /\S{17}/.test(cell) ? "" : "short"); // only long names break inside a word
  head.forEach((name, i) => {
    const cell = element("th", name, rows.length && isNumber(rows[0][i]) ? "number" : "");
    cell.scope = "col";
    top.append(cell);
  });
  for (const row of rows) {
    const line = body.insertRow();
    for (const cell of row) line.append(element("td", cell, kind(cell)));
  }
  parent.replaceChildren(made);
}

// A table is made when it is opened: those of large models are long. Returns what to call when its rows have changed.
function tableOnDemand(id, head, rows) {
  const details = byId(id);
  const fill = () => {
    if (details.open) fillTable(details.querySelector(".scroll"), head(), rows());
  };
  details.addEventListener("toggle", fill);
  return fill;
}
