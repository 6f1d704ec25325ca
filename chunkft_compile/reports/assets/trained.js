// What is trained when: blocks across, sorts of parameters down, the step as colour; below, the rows of one parameter.

const LINES = 12; // of the map, for one parameter: the rows of a matrix in a dozen parts
const APART = 6; // colours of so few steps are told apart without a mark
const sizeOf = (param) => param.rows[param.rows.length - 1][1];
const stepsOf = (param) => new Set(param.rows.map(([, , step]) => step)).size;

// Viridis, without the end that the paper would swallow: near black on dark, pale yellow on light.
function stepScale() {
  const anchors = [
    [68, 1, 84],
    [59, 82, 139],
    [33, 145, 140],
    [94, 201, 98],
    [253, 231, 37],
  ];
  const [low, high] = variable("--dark") ? [0.25, 1] : [0, 0.92];
  return Array.from({ length: 256 }, (_, i) => {
    const place = 4 * (low + ((high - low) * i) / 255),
      k = Math.min(3, Math.floor(place)),
      part = place - k;
    return `rgb(${anchors[k].map((value, c) => Math.round(value + part * (anchors[k + 1][c] - value))).join(",")})`;
  });
}
const stepColor = (scale, step) => scale[data.steps.length < 2 ? 90 : Math.round((255 * step) / (data.steps.length - 1))];

// A parameter of a block is named by what it is there: the same line in every column.
const sortOf = (param) => param.name.replace(/\.\d+\./, ".*.");
function arranged() {
  const sorts = [...new Set(data.params.map(sortOf))],
    numbers = new Map(sorts.map((sort, k) => [sort, k])),
    at = new Map();
  data.params.forEach((param, p) => {
    const key = `${param.segment},${numbers.get(sortOf(param))}`;
    at.set(key, [...(at.get(key) || []), p]);
  });
  return { sorts, at };
}

function drawMap() {
  const { sorts, at } = arranged(),
    z = [],
    hovertext = [],
    picked = [],
    marked = { x: [], y: [] },
    steps = data.steps.length;
  sorts.forEach((sort, k) => {
    for (let line = 0; line < LINES; line++) {
      const row = [],
        words = [],
        picks = [];
      data.segments.forEach((_, s) => {
        const found = at.get(`${s},${k}`);
        if (!found) {
          row.push(null);
          words.push("");
          picks.push(null);
          return;
        }
        const p = found[Math.min(found.length - 1, Math.floor((line * found.length) / LINES))],
          param = data.params[p];
        const place = ((line + 0.5) / LINES) * sizeOf(param);
        const [start, stop, step, nbytes] = param.rows.find(([first, last]) => first <= place && place < last) || param.rows[0];
        row.push(step);
        picks.push(p);
        words.push(
          `<b>${text(param.name)}</b><br>rows ${start} to ${stop - 1}: step ${step + 1} of ${steps}<br>gradient ${formatBytes(nbytes)}`,
        );
      });
      z.push(row);
      hovertext.push(words);
      picked.push(picks);
    }
  });
  // A dot in the middle of what the chosen step trains.
  for (let k = 0; k < sorts.length && steps > APART; k++) {
    data.segments.forEach((_, s) => {
      const lines = [...Array(LINES).keys()].map((line) => k * LINES + line).filter((line) => z[line][s] === chosen.step);
      if (lines.length) {
        marked.x.push(s);
        marked.y.push((lines[0] + lines[lines.length - 1]) / 2);
      }
    });
  }
  const scale = stepScale(),
    wide = byId("map").clientWidth / data.segments.length;
  const heat = {
    type: "heatmap",
    z,
    hovertext,
    hoverinfo: "text",
    zmin: 0,
    zmax: Math.max(1, steps - 1),
    showscale: false,
    colorscale:
      steps < 2
        ? [
            [0, stepColor(scale, 0)],
            [1, stepColor(scale, 0)],
          ]
        : scale.map((color, i) => [i / 255, color]),
    xgap: wide > 12 ? 1 : 0,
  };
  const dots = {
    type: "scatter",
    mode: "markers",
    ...marked,
    hoverinfo: "skip",
    marker: { color: variable("--paper"), size: Math.max(3, Math.min(7, wide / 2)), line: { color: variable("--ink"), width: 1 } },
  };
  const between = sorts.map((_, k) => k * LINES - 0.5);
  byId("map").style.height = `${Math.max(18, Math.min(60, 4 + 1.55 * sorts.length))}rem`;
  draw(
    "map",
    [heat, dots],
    {
      shapes: between.map((y) => ({
        type: "line",
        xref: "paper",
        x0: 0,
        x1: 1,
        y0: y,
        y1: y,
        line: { color: variable("--paper"), width: 2 },
      })),
      xaxis: {
        tickangle: -45,
        showgrid: false,
        zeroline: false,
        range: [-0.5, data.segments.length - 0.5],
        ...thinned(data.segments, byId("map").clientWidth / 34),
      },
      yaxis: {
        tickvals: between.map((y) => y + LINES / 2),
        ticktext: sorts.map((sort) =>
          text(
            sort
              .replace(/^.*\.\*\./, "")
              .replace(/^model\./, "")
              .replace(/\.weight$/, ""),
          ),
        ),
        range: [sorts.length * LINES - 0.5, -0.5],
        showgrid: false,
        zeroline: false,
        tickfont: { size: 11 },
      },
    },
    `The step in which each parameter is trained: ${plural(sorts.length, "sort")} of parameters in ` +
      `${plural(data.segments.length, "segment")}, ${plural(steps, "step")}.`,
  );
  onClick("map", (point) => {
    if (point.curveNumber !== 0) return;
    const p = picked[point.pointNumber[0]][point.pointNumber[1]];
    if (p !== null) chooseParam(p);
  });
  byId("map-note").textContent =
    steps < 2
      ? "All rows of all parameters are trained at every step. Each field is one parameter, its rows from top to bottom."
      : `Colour is the step, from 1 (dark) to ${steps} (light)${steps > APART ? `; dots mark what step ${chosen.step + 1} trains` : ""}. ` +
        "Each field is one parameter, its rows from top to bottom: drag to zoom, double click to go back, click to see its rows below.";
}

function chooseParam(p) {
  chosen.param = p;
  byId("param").value = p;
  drawRows();
}

function drawRows() {
  const param = data.params[chosen.param],
    size = sizeOf(param),
    scale = stepScale(),
    count = stepsOf(param);
  const traces = [
    {
      type: "bar",
      orientation: "h",
      y: param.rows.map(() => ""),
      x: param.rows.map(([start, stop]) => stop - start),
      base: param.rows.map(([start]) => start),
      textposition: "inside",
      insidetextanchor: "middle",
      textangle: 0,
      hoverinfo: "text",
      marker: {
        color: param.rows.map(([, , step]) => stepColor(scale, step)),
        line: { color: variable("--paper"), width: param.rows.length > 100 ? 0 : 1 },
      },
      text: param.rows.map(([start, stop, step]) => (((stop - start) / size) * byId("rows").clientWidth > 56 ? `step ${step + 1}` : "")),
      hovertext: param.rows.map(
        ([start, stop, step, nbytes]) => `rows ${start} to ${stop - 1}<br>step ${step + 1}<br>gradient ${formatBytes(nbytes)}`,
      ),
    },
  ];
  draw(
    "rows",
    traces,
    {
      barmode: "overlay",
      xaxis: { title: { text: "row" }, range: [0, size], showgrid: false, tickformat: "d", nticks: 8 },
      yaxis: { showticklabels: false },
    },
    `${param.name}, ${plural(size, "row")}: ` +
      (param.rows.length > 40
        ? `${param.rows.length} chunks in ${plural(count, "step")}, in the table below`
        : param.rows.map(([start, stop, step]) => `rows ${start} to ${stop - 1} in step ${step + 1}`).join(", ")),
  );
  onClick("rows", (point) => choose(param.rows[point.pointNumber][2]));
  rowsTable();
}

const rowsTable = tableOnDemand(
  "rows-table",
  () => ["first row", "last row", "step", "gradient"],
  () => data.params[chosen.param].rows.map(([start, stop, step, nbytes]) => [start, stop - 1, step + 1, formatBytes(nbytes)]),
);

// `1-3, 7`: numbers as ranges.
function ranges(numbers) {
  const found = [];
  for (const number of [...new Set(numbers)].sort((a, b) => a - b)) {
    const last = found[found.length - 1];
    if (last && last[1] === number - 1) last[1] = number;
    else found.push([number, number]);
  }
  return found.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
}
tableOnDemand(
  "map-table",
  () => ["parameter", "segment", "rows", "chunks", "steps"],
  () =>
    data.params.map((param) => [
      param.name,
      data.segments[param.segment],
      sizeOf(param),
      param.rows.length,
      ranges(param.rows.map(([, , step]) => step + 1)),
    ]),
);
