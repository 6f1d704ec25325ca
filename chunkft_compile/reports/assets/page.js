"use strict";
// Draws the figures of the report with Plotly. All bytes and times come from the data in the page; nothing is computed anew but sums.
(async () => {
  const byId = (id) => document.getElementById(id);
  const packed = Uint8Array.from(atob(byId("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(stream).text());

  // Okabe and Ito's colours, which people with any colour vision tell apart; a category has the same one everywhere.
  const CATEGORY = ["#8a94a6", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"];
  const PART = { forward: "#56b4e9", recompute: "#e69f00", backward: "#0072b2", update: "#009e73", "exposed transfers": "#d55e00", "hidden transfers": "#cc79a7" };
  const OPTION = { "forward only": "#b9c0cb", save: "#0072b2", cheap: "#56b4e9", inputs: "#e69f00", offload: "#cc79a7", tiled: "#009e73" };
  const state = { step: 0, instant: data.steps[0].binding, param: 0 };
  const printing = window.matchMedia("print");

  const bytes = (n) => {
    const sign = n < 0 ? "-" : "", size = Math.abs(n);
    for (const [unit, name, digits] of [[1e12, "TB", 3], [1e9, "GB", 3], [1e6, "MB", 1], [1e3, "kB", 1]]) if (size >= unit) return `${sign}${(size / unit).toFixed(digits)} ${name}`;
    return `${sign}${size} B`;
  };
  const time = (us) => us < 1e3 ? `${us} us` : us < 1e5 ? `${(us / 1e3).toFixed(1)} ms` : us < 1e6 ? `${(us / 1e3).toFixed(0)} ms` : `${(us / 1e6).toFixed(2)} s`;
  const scaleOf = (most) => [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]].find(([unit]) => most >= unit) || [1, "B"];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const text = (value) => String(value).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`); // Plotly reads labels as HTML
  const element = (tag, content, name) => { const made = document.createElement(tag); made.textContent = content; if (name) made.className = name; return made; };

  function layout(more) {
    const axis = { gridcolor: css("--grid"), zerolinecolor: css("--grid"), linecolor: css("--line"), automargin: true, fixedrange: false };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), family: "system-ui, sans-serif", size: 13 },
      margin: { l: 8, r: 8, t: 24, b: 8 }, showlegend: false, bargap: 0, hoverlabel: { align: "left", bgcolor: css("--raised"), font: { color: css("--ink") } },
      ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
    };
  }
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const draw = (id, traces, more, label) => { byId(id).setAttribute("aria-label", label); return Plotly.react(id, traces, layout(more), config); };

  function table(parent, head, rows) {
    const made = document.createElement("table"), top = made.createTHead().insertRow(), body = made.createTBody();
    const isNumber = (cell) => /^[-+]?[\d.]/.test(cell);
    head.forEach((name, i) => { const cell = element("th", name, rows.length && isNumber(String(rows[0][i])) ? "number" : ""); cell.scope = "col"; top.append(cell); });
    for (const row of rows) { const line = body.insertRow(); row.forEach((cell) => line.append(element("td", cell, isNumber(String(cell)) ? "number" : ""))); }
    parent.replaceChildren(made);
  }
  // A table is made when it is opened: those of large models are long.
  function tableOnDemand(id, make) {
    const details = byId(id), fill = () => { if (details.open) table(details.querySelector(".scroll"), ...make()); };
    details.addEventListener("toggle", fill);
    return fill;
  }
  const legend = (id, pairs) => byId(id).replaceChildren(...pairs.map(([name, color]) => { const made = element("span", name), mark = document.createElement("i"); mark.style.background = color; made.prepend(mark); return made; }));

  // Bytes of each category at every instant of a step; the workspace is what is left of the peak.
  const stacks = new Map();
  function stacksOf(number) {
    if (stacks.has(number)) return stacks.get(number);
    const step = data.steps[number], count = step.instants.length, found = data.categories.map(() => new Array(count).fill(0));
    for (const [, category, nbytes, first, last] of step.lifetimes) for (let i = first; i <= last; i++) found[category][i] += nbytes;
    const workspace = found[found.length - 1];
    for (let i = 0; i < count; i++) workspace[i] = step.instants[i][3] - found.slice(0, -1).reduce((sum, stack) => sum + stack[i], 0);
    stacks.set(number, found);
    return found;
  }

  // What is there at every instant of a step: the axis may begin there, or the rest is a thin line on top of the weights.
  const constantOf = (number) => { const step = data.steps[number]; return step.lifetimes.filter(([, , , first, last]) => first === 0 && last === step.instants.length - 1).reduce((sum, one) => sum + one[2], 0); };

  function drawMemory() {
    const step = data.steps[state.step], found = stacksOf(state.step), [unit, unitName] = scaleOf(data.budget);
    const names = step.instants.map(([name]) => name), x = names.map((_, i) => i);
    const hover = names.map((name, i) => `<b>${text(name)}</b><br>${bytes(step.instants[i][3])} of ${bytes(data.budget)}<br>` + data.categories.map((category, c) => found[c][i] ? `${category} ${bytes(found[c][i])}` : "").filter(Boolean).join("<br>"));
    const traces = found.map((stack, c) => ({ type: "bar", x, y: stack.map((n) => n / unit), name: data.categories[c], marker: { color: CATEGORY[c] }, hovertext: hover, hoverinfo: "text" }));
    const measured = data.measured.find((one) => one.step === state.step);
    if (measured && measured.instants.some((n) => n !== null)) traces.push({ type: "scatter", mode: "lines", x, y: measured.instants.map((n) => n === null ? null : n / unit), line: { color: css("--ink"), width: 2, shape: "hvh" }, name: "measured", hovertext: measured.instants.map((n) => n === null ? "not measured" : `measured ${bytes(n)}`), hoverinfo: "text" });
    const budget = data.budget / unit, ends = [-0.5, x.length - 0.5], zoomed = byId("zoom").checked;
    const floor = zoomed ? 0.98 * constantOf(state.step) / unit : 0;
    const shapes = [
      { type: "line", x0: ends[0], x1: ends[1], y0: budget, y1: budget, line: { color: css("--ink"), dash: "dash", width: 1.5 } },
      { type: "rect", x0: state.instant - 0.5, x1: state.instant + 0.5, y0: floor, y1: step.instants[state.instant][3] / unit, line: { color: css("--ink"), width: 2 } },
    ];
    const peak = { x: step.binding, y: step.peak / unit, text: "peak", showarrow: true, arrowhead: 2, ay: -18, ax: 0, font: { color: css("--ink") } };
    const label = { x: ends[0], y: budget, text: `budget ${bytes(data.budget)}`, showarrow: false, xanchor: "left", yanchor: "bottom", font: { color: css("--ink") } };
    // Three words tell where one is: the first instant of forward, backward and update.
    const first = (word) => names.findIndex((name) => name.startsWith(word));
    const ticks = ["forward", "backward", "update"].map((word) => [first(word), word]).filter(([at], i) => at >= 0 && (i === 0 || at < 0.85 * x.length));
    draw("memory", traces, {
      barmode: "stack", shapes, annotations: [peak, label],
      xaxis: { tickvals: ticks.map(([at]) => at), ticktext: ticks.map(([, word]) => word), range: ends, ticklabelposition: "outside right", tickangle: 0 },
      yaxis: { title: { text: unitName }, range: [floor, floor + 1.08 * (Math.max(budget, step.peak / unit) - floor)] },
    }, `Bytes at the ${names.length} instructions of step ${state.step + 1}, by category. The most are ${bytes(step.peak)} at ${names[step.binding]}, the budget is ${bytes(data.budget)}.`);
    legend("categories", [...data.categories.map((category, c) => [category, CATEGORY[c]]).filter((_, c) => found[c].some(Boolean)), ...(measured ? [["measured (line)", css("--ink")]] : [])]);
    showInstant();
  }

  function showInstant() {
    const step = data.steps[state.step], i = state.instant, [name, us, waited, peak] = step.instants[i];
    const slider = byId("instant");
    slider.max = step.instants.length - 1;
    slider.value = i;
    slider.setAttribute("aria-valuetext", `${name}, ${bytes(peak)}`);
    const there = step.lifetimes.filter(([, , , first, last]) => first <= i && i <= last).map(([which, category, nbytes]) => [step.names[which], data.categories[category], nbytes]);
    const own = stacksOf(state.step)[data.categories.length - 1][i];
    if (own) there.push([`workspace of ${name}`, "workspace", own]);
    there.sort((a, b) => b[2] - a[2]);
    const title = element("p", `${i + 1} of ${step.instants.length}: ${name}, ${bytes(peak)}, ${bytes(data.budget - peak)} below the budget; ${time(us)}${waited ? `, of which ${time(waited)} wait for copies` : ""}. The largest of ${there.length}:`);
    const holder = element("div", "", "scroll");
    table(holder, ["bytes", "what", "category"], there.slice(0, 6).map(([what, category, nbytes]) => [bytes(nbytes), what, category]));
    byId("there").replaceChildren(title, holder);
  }

  // Steps have colours along one scale that gets lighter, so that neighbours look alike and many can be told apart; two or three are far apart.
  const stepColor = (n) => { const t = data.steps.length < 2 ? 0.35 : n / (data.steps.length - 1); return SCALE[Math.round(t * (SCALE.length - 1))]; };
  const SCALE = (() => { const anchors = [[0, [68, 1, 84]], [0.25, [59, 82, 139]], [0.5, [33, 145, 140]], [0.75, [94, 201, 98]], [1, [253, 231, 37]]]; return Array.from({ length: 256 }, (_, i) => { const t = i / 255, k = Math.min(3, Math.floor(t * 4)), [t0, a] = anchors[k], [t1, b] = anchors[k + 1], u = (t - t0) / (t1 - t0); return `rgb(${a.map((v, c) => Math.round(v + u * (b[c] - v))).join(",")})`; }); })();
  const LINES = 12; // of the map, for one parameter: the rows of a matrix in a dozen parts

  // A parameter of a block is named by what it is there: the same line in every column.
  const kindOf = (param) => param.name.replace(/\.\d+\./, ".*.");
  const kinds = [...new Set(data.params.map(kindOf))];
  const kindIndex = new Map(kinds.map((kind, i) => [kind, i]));
  const at = new Map();
  data.params.forEach((param, p) => { const key = `${param.segment},${kindIndex.get(kindOf(param))}`; if (!at.has(key)) at.set(key, []); at.get(key).push(p); });
  const sizeOf = (param) => param.rows[param.rows.length - 1][1];

  function drawMap() {
    const z = [], hover = [], pick = [], steps = data.steps.length;
    kinds.forEach((kind, k) => {
      for (let line = 0; line < LINES; line++) {
        const row = [], words = [], picks = [];
        data.segments.forEach((segment, s) => {
          const found = at.get(`${s},${k}`);
          if (!found) { row.push(null); words.push(""); picks.push(null); return; }
          const p = found[Math.min(found.length - 1, Math.floor(line * found.length / LINES))], param = data.params[p];
          const place = (line + 0.5) / LINES * sizeOf(param), piece = param.rows.find(([start, stop]) => start <= place && place < stop) || param.rows[0];
          row.push(piece[2]); picks.push(p);
          words.push(`<b>${text(param.name)}</b><br>rows ${piece[0]} to ${piece[1] - 1}: step ${piece[2] + 1} of ${steps}<br>gradient ${bytes(piece[3])}`);
        });
        z.push(row); hover.push(words); pick.push(picks);
      }
    });
    const colorscale = steps < 2 ? [[0, stepColor(0)], [1, stepColor(0)]] : SCALE.map((color, i) => [i / 255, color]);
    const trace = { type: "heatmap", z, hovertext: hover, hoverinfo: "text", colorscale, zmin: 0, zmax: Math.max(1, steps - 1), xgap: data.segments.length < 60 ? 1 : 0, showscale: false };
    const lines = kinds.map((_, k) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: k * LINES - 0.5, y1: k * LINES - 0.5, line: { color: css("--paper"), width: 2 } }));
    const short = kinds.map((kind) => text(kind.replace(/^.*\.\*\./, "").replace(/^model\./, "").replace(/\.weight$/, "")));
    byId("map").style.height = `${Math.max(18, Math.min(60, 4 + 1.55 * kinds.length))}rem`;
    draw("map", [trace], {
      shapes: lines,
      xaxis: { tickvals: data.segments.map((_, i) => i), ticktext: data.segments.map(text), tickangle: -45, nticks: 20, showgrid: false, ...thinned(data.segments) },
      yaxis: { tickvals: kinds.map((_, k) => (k + 0.5) * LINES - 0.5), ticktext: short, autorange: "reversed", showgrid: false, tickfont: { size: 11 } },
    }, `The step in which each parameter is trained: ${kinds.length} sorts of parameters in ${data.segments.length} segments, ${steps} steps.`);
    const shades = steps < 2 ? "All rows of all parameters are trained at every step." : `Colour is the step, from 1 (dark) to ${steps} (light). Each field is one parameter, its rows from top to bottom; drag to zoom, double click to go back, click to see its rows below.`;
    byId("map-note").textContent = shades;
    byId("map").removeAllListeners?.("plotly_click");
    byId("map").on("plotly_click", (event) => { const point = event.points[0], p = pick[point.pointNumber[0]][point.pointNumber[1]]; if (p !== null) { state.param = p; byId("param").value = p; drawRows(); } });
  }
  // As many labels as there is room for.
  function thinned(names) { const every = Math.ceil(names.length / Math.max(4, Math.floor(byId("map").clientWidth / 34))); const shown = names.map((_, i) => i).filter((i) => i % every === 0 || i === names.length - 1 && i % every > every / 2); return { tickvals: shown, ticktext: shown.map((i) => text(names[i])) }; }

  function drawRows() {
    const param = data.params[state.param];
    const traces = param.rows.map(([start, stop, step, nbytes]) => ({ type: "bar", orientation: "h", y: [""], x: [stop - start], base: [start], marker: { color: stepColor(step), line: { color: css("--paper"), width: 1 } }, text: [stop - start > 0.04 * sizeOf(param) ? `step ${step + 1}` : ""], textposition: "inside", insidetextanchor: "middle", hovertext: `rows ${start} to ${stop - 1}<br>step ${step + 1}<br>gradient ${bytes(nbytes)}`, hoverinfo: "text" }));
    draw("rows", traces, { barmode: "overlay", xaxis: { title: { text: "row" }, range: [0, sizeOf(param)], showgrid: false }, yaxis: { showticklabels: false } }, `${param.name}: ${param.rows.map(([start, stop, step]) => `rows ${start} to ${stop - 1} in step ${step + 1}`).join(", ")}`);
    rowsTable();
  }

  function drawTime() {
    const x = data.steps.map((_, i) => i + 1), parts = Object.keys(PART).filter((part) => part !== "hidden transfers"), [unit, name] = data.steps.some((step) => step.us >= 1e6) ? [1e6, "s"] : [1e3, "ms"];
    const hover = data.steps.map((step, i) => `<b>step ${i + 1}</b>, ${time(step.us)}<br>` + Object.entries(step.split).map(([part, us]) => us ? `${part} ${time(us)}` : "").filter(Boolean).join("<br>"));
    const traces = parts.map((part) => ({ type: "bar", x, y: data.steps.map((step) => step.split[part] / unit), marker: { color: PART[part], line: { width: 0 } }, hovertext: hover, hoverinfo: "text" }));
    const used = parts.filter((part) => data.steps.some((step) => step.split[part]));
    const hidden = data.steps.some((step) => step.split["hidden transfers"]);
    if (hidden) traces.push({ type: "scatter", mode: "markers", x, y: data.steps.map((step) => step.split["hidden transfers"] / unit), marker: { symbol: "diamond", size: 9, color: PART["hidden transfers"], line: { color: css("--ink"), width: 1 } }, hovertext: hover, hoverinfo: "text" });
    if (data.measured.length) traces.push({ type: "scatter", mode: "markers", x: data.measured.map((one) => one.step + 1), y: data.measured.map((one) => one.us / unit), marker: { symbol: "line-ew", size: 26, line: { color: css("--ink"), width: 3 } }, hovertext: data.measured.map((one) => `measured ${time(one.us)}`), hoverinfo: "text" });
    legend("parts", [...used.map((part) => [part, PART[part]]), ...(hidden ? [["hidden transfers (beside compute)", PART["hidden transfers"]]] : []), ...(data.measured.length ? [["measured", css("--ink")]] : [])]);
    const chosen = { type: "rect", yref: "paper", y0: 0, y1: 1, x0: state.step + 0.5, x1: state.step + 1.5, line: { color: css("--ink"), width: 2 } };
    draw("time", traces, { barmode: "stack", bargap: x.length > 3 ? 0.15 : 0.5, shapes: data.steps.length > 1 ? [chosen] : [], xaxis: { title: { text: "step" }, range: [0.5, x.length + 0.5], tickformat: "d", dtick: Math.ceil(x.length / 20), tick0: 1, showgrid: false }, yaxis: { title: { text: name }, rangemode: "tozero" } }, `Time of each of ${x.length} steps by what it is spent on; step ${state.step + 1} takes ${time(data.steps[state.step].us)}.`);
    byId("time").removeAllListeners?.("plotly_click");
    byId("time").on("plotly_click", (event) => choose(event.points[0].x - 1));
  }

  const optionColor = (name) => OPTION[name] || OPTION[name.split(" ")[0]] || "#f0e442"; // "tiled 8" is one of the tiled
  function drawOptions() {
    const names = [...new Set(data.steps.flatMap((step) => step.options))].sort(), n = names.length;
    const z = data.segments.map((_, s) => data.steps.map((step) => names.indexOf(step.options[s])));
    const colorscale = names.flatMap((name, i) => [[i / n, optionColor(name)], [(i + 1) / n, optionColor(name)]]);
    const hover = data.segments.map((segment, s) => data.steps.map((step, t) => `${text(segment)}, step ${t + 1}: <b>${text(step.options[s])}</b>`));
    byId("options").style.height = `${Math.max(16, Math.min(40, 4 + 0.6 * data.segments.length))}rem`;
    legend("names", names.map((name) => [name, optionColor(name)]));
    const every = Math.ceil(data.segments.length / 24), shown = data.segments.map((_, i) => i).filter((i) => i % every === 0);
    const chosen = { type: "rect", yref: "paper", y0: 0, y1: 1, x0: state.step + 0.5, x1: state.step + 1.5, line: { color: css("--ink"), width: 2 } };
    draw("options", [{ type: "heatmap", z, x: data.steps.map((_, i) => i + 1), colorscale, zmin: -0.5, zmax: n - 0.5, hovertext: hover, hoverinfo: "text", showscale: false, xgap: data.steps.length < 60 ? 2 : 0, ygap: data.segments.length < 50 ? 1 : 0 }], {
      shapes: data.steps.length > 1 ? [chosen] : [],
      xaxis: { title: { text: "step" }, tickformat: "d", dtick: Math.ceil(data.steps.length / 20), tick0: 1, showgrid: false },
      yaxis: { tickvals: shown, ticktext: shown.map((i) => text(data.segments[i])), showgrid: false },
    }, `The option of each of ${data.segments.length} segments in each step: ${names.join(", ")}.`);
  }

  function drawCurve() {
    if (!data.points.length) { byId("curve-section").hidden = true; return; }
    const [unit, name] = scaleOf(data.budget), own = [data.budget, data.steps.reduce((sum, step) => sum + step.us, 0), data.steps.length];
    const all = [...data.points, own].sort((a, b) => a[0] - b[0]), word = ([budget, us, steps]) => `${bytes(budget)}: ${time(us)} a sweep of ${steps} step${steps > 1 ? "s" : ""}`;
    const times = all.map(([, us]) => us), steep = Math.max(...times) > 20 * Math.min(...times);
    draw("curve", [
      { type: "scatter", mode: "lines+markers", x: all.map(([budget]) => budget / unit), y: all.map(([, us]) => us / 1e6), line: { color: css("--accent") }, marker: { size: 7, color: css("--accent") }, hovertext: all.map(word), hoverinfo: "text" },
      { type: "scatter", mode: "markers+text", x: [own[0] / unit], y: [own[1] / 1e6], text: ["this plan"], textposition: "top right", marker: { size: 14, symbol: "circle-open", color: css("--ink"), line: { width: 3 } }, hovertext: word(own), hoverinfo: "text" },
    ], { xaxis: { title: { text: `budget, ${name}` } }, yaxis: { title: { text: "s per sweep" }, ...(steep ? { type: "log", dtick: "D2" } : { rangemode: "tozero" }) } }, all.map(word).join("; "));
    return all;
  }

  const rowsTable = tableOnDemand("rows-table", () => [["first row", "last row", "step", "gradient"], data.params[state.param].rows.map(([start, stop, step, nbytes]) => [start, stop - 1, step + 1, bytes(nbytes)])]);
  tableOnDemand("time-table", () => [["step", "chunks", "time", ...Object.keys(PART)], data.steps.map((step, i) => [i + 1, step.chunks, time(step.us), ...Object.keys(PART).map((part) => time(step.split[part]))])]);
  const optionsTable = tableOnDemand("options-table", () => [["segment", "option"], data.segments.map((segment, s) => [segment, data.steps[state.step].options[s]])]);
  tableOnDemand("curve-table", () => [["budget", "time of a sweep", "steps"], [...data.points].map(([budget, us, steps]) => [bytes(budget), time(us), steps])]);

  function choose(number) {
    state.step = Math.max(0, Math.min(data.steps.length - 1, number));
    state.instant = data.steps[state.step].binding;
    const step = data.steps[state.step];
    byId("step").value = state.step;
    byId("previous").disabled = state.step === 0;
    byId("next").disabled = state.step === data.steps.length - 1;
    byId("what").textContent = `trains ${step.chunks} chunks, ${bytes(step.trained)} of gradients, backward to ${step.depth}, ${step.update} updates, peak ${bytes(step.peak)}, ${time(step.us)}`;
    drawMemory(); drawTime(); drawOptions(); optionsTable();
  }

  byId("step").replaceChildren(...data.steps.map((_, i) => { const made = element("option", `${i + 1} of ${data.steps.length}`); made.value = i; return made; }));
  byId("step").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("previous").addEventListener("click", () => choose(state.step - 1));
  byId("next").addEventListener("click", () => choose(state.step + 1));
  byId("instant").addEventListener("input", (event) => { state.instant = Number(event.target.value); drawMemory(); });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "ArrowLeft") choose(state.step - 1);
    if (event.key === "ArrowRight") choose(state.step + 1);
  });
  byId("zoom").checked = constantOf(0) > 0.8 * data.budget;
  byId("zoom").addEventListener("change", drawMemory);
  byId("param").replaceChildren(...data.params.map((param, p) => { const made = element("option", param.name); made.value = p; return made; }));
  byId("param").addEventListener("change", (event) => { state.param = Number(event.target.value); drawRows(); });

  const fullest = data.steps.reduce((best, step, i) => step.peak > data.steps[best].peak ? i : best, 0);
  state.param = data.params.reduce((best, param, p) => param.rows.length > data.params[best].rows.length ? p : best, 0);
  byId("param").value = state.param;
  const drawAll = () => { choose(state.step); drawMap(); drawRows(); drawCurve(); };
  state.step = fullest;
  drawAll();
  byId("memory").on("plotly_click", (event) => { state.instant = event.points[0].pointNumber; drawMemory(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  printing.addEventListener("change", drawAll);
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
