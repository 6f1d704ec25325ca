// Memory over the instructions of the chosen step, what is there at one of them, and the peaks of all steps.

const HOVERED = 3,
  LISTED = 8; // of what is there, the largest

const stackCache = new Map();
// Bytes of each category at every instant of a step; the workspace is what is left of the peak.
function stacksOf(number) {
  if (stackCache.has(number)) return stackCache.get(number);
  const step = data.steps[number],
    count = step.instants.length,
    found = data.categories.map(() => new Array(count).fill(0));
  for (const [, category, nbytes, first, last] of step.lifetimes) for (let i = first; i <= last; i++) found[category][i] += nbytes;
  const workspace = found[found.length - 1];
  for (let i = 0; i < count; i++) workspace[i] = step.instants[i][3] - found.slice(0, -1).reduce((sum, stack) => sum + stack[i], 0);
  stackCache.set(number, found);
  return found;
}

// What is there at an instant, the largest first: [name, category, bytes].
function liveAt(number, i) {
  const step = data.steps[number],
    last = data.categories.length - 1,
    own = stacksOf(number)[last][i];
  const there = step.lifetimes.filter(([, , , from, to]) => from <= i && i <= to);
  const found = there.map(([name, category, nbytes]) => [step.names[name], data.categories[category], nbytes]);
  if (own) found.push([`workspace of ${step.instants[i][0]}`, data.categories[last], own]);
  return found.sort((a, b) => b[2] - a[2]);
}

// What is there at every instant of a step. Where that is nearly all, the axis may begin there, or the rest is a thin line on top.
function alwaysThere(number) {
  const step = data.steps[number],
    last = step.instants.length - 1;
  return step.lifetimes.reduce((sum, [, , nbytes, from, to]) => (from === 0 && to === last ? sum + nbytes : sum), 0);
}

const measuredOf = (number) => data.measured.find((one) => one.step === number);

function hoverAt(i) {
  const found = stacksOf(chosen.step),
    [name, us, , peak] = data.steps[chosen.step].instants[i];
  const categories = data.categories.map((category, c) => [category, found[c][i]]).filter(([, nbytes]) => nbytes);
  const largest = liveAt(chosen.step, i)
    .slice(0, HOVERED)
    .map(([what, , nbytes]) => `${formatBytes(nbytes)} ${shortened(what)}`);
  const lines = categories.map(([category, nbytes]) => `${formatBytes(nbytes)} ${category}`);
  return (
    `<b>${text(name)}</b>, ${formatTime(us)}<br>${formatBytes(peak)} of ${formatBytes(data.budget)}: <br>${lines.join("<br>")}` +
    `<br><i>the largest</i><br>${largest.map(text).join("<br>")}`
  );
}
const shortened = (name) => (name.length > 48 ? `${name.slice(0, 20)} ... ${name.slice(-24)}` : name);

function drawMemory() {
  const step = data.steps[chosen.step],
    found = stacksOf(chosen.step),
    [unit, unitName] = axisUnit(data.budget);
  const names = step.instants.map(([name]) => name),
    x = names.map((_, i) => i),
    ink = variable("--ink");
  const hovertext = x.map(hoverAt);
  const traces = found.map((stack, c) => ({
    type: "bar",
    x,
    y: stack.map((nbytes) => nbytes / unit),
    marker: { color: categoryColor(data.categories[c]), line: { width: 0 } },
    hovertext,
    hoverinfo: "text",
  }));
  const measured = measuredOf(chosen.step),
    measuredHere = measured && measured.instants.some((nbytes) => nbytes !== null);
  if (measuredHere) {
    traces.push({
      type: "scatter",
      mode: "lines",
      x,
      y: measured.instants.map((nbytes) => (nbytes === null ? null : nbytes / unit)),
      line: { color: ink, width: 2, shape: "hvh" },
      hoverinfo: "text",
      hovertext: measured.instants.map((nbytes) => (nbytes === null ? "not measured" : `measured ${formatBytes(nbytes)}`)),
    });
  }
  const budget = data.budget / unit,
    ends = [-0.5, x.length - 0.5];
  const floor = byId("zoom").checked ? (0.98 * alwaysThere(chosen.step)) / unit : 0;
  const top = floor + 1.08 * (Math.max(budget, step.peak / unit) - floor);
  draw(
    "memory",
    traces,
    {
      barmode: "stack",
      shapes: [
        { type: "line", x0: ends[0], x1: ends[1], y0: budget, y1: budget, line: { color: ink, dash: "dash", width: 1.5 } },
        {
          type: "rect",
          x0: chosen.instant - 0.5,
          x1: chosen.instant + 0.5,
          y0: floor,
          y1: step.instants[chosen.instant][3] / unit,
          line: { color: ink, width: 2 },
        },
      ],
      annotations: [
        {
          x: step.binding,
          y: step.peak / unit,
          text: "peak",
          showarrow: true,
          arrowhead: 2,
          arrowcolor: ink,
          ax: 0,
          ay: -18,
          font: { color: ink },
        },
        {
          x: step.binding < x.length / 3 ? ends[1] : ends[0],
          xanchor: step.binding < x.length / 3 ? "right" : "left",
          y: budget,
          yanchor: "bottom",
          text: `budget ${formatBytes(data.budget)}`,
          showarrow: false,
          font: { color: ink },
        },
      ],
      xaxis: { ...phases(names), range: ends, ticklabelposition: "outside right", tickangle: 0, showgrid: false, ticks: "outside" },
      yaxis: { title: { text: unitName }, range: [floor, top] },
    },
    `Bytes at the ${plural(names.length, "instruction")} of step ${chosen.step + 1}, by category. The most are ` +
      `${formatBytes(step.peak)} at ${names[step.binding]}, the budget is ${formatBytes(data.budget)}.`,
  );
  onClick("memory", (point) => {
    chosen.instant = point.pointNumber;
    drawMemory();
  });
  const there = data.categories.filter((_, c) => found[c].some(Boolean));
  legend("categories", [
    ...there.map((category) => [category, categoryColor(category)]),
    ...(measuredHere ? [["measured (line)", ink]] : []),
  ]);
  const said = data.steps.every((other) => other.peak <= step.peak) && !measured; // by the sentence above
  byId("binds").hidden = said;
  byId("binds").textContent =
    `In step ${chosen.step + 1}, ${names[step.binding]} needs the most: ${formatBytes(step.peak)}, ` +
    `${formatBytes(data.budget - step.peak)} below the budget` +
    (measured && measured.nbytes !== null ? `; measured ${formatBytes(measured.nbytes)}.` : ".");
  showInstant();
  instantsTable();
}

// Three words tell where one is: the first instants of forward, backward and update, as far as there is room to read them.
function phases(names) {
  const width = byId("memory").clientWidth - 60,
    at = (i) => (width * i) / names.length;
  const found = [];
  for (const word of ["forward", "backward", "update"]) {
    const i = names.findIndex((name) => name.startsWith(word));
    if (i >= 0 && at(names.length - i) > 60 && (!found.length || at(i - found[found.length - 1][0]) > 75)) found.push([i, word]);
  }
  return { tickvals: found.map(([i]) => i), ticktext: found.map(([, word]) => word) };
}

function showInstant() {
  const step = data.steps[chosen.step],
    i = chosen.instant,
    [name, us, waited, peak] = step.instants[i];
  const slider = byId("instant");
  slider.max = step.instants.length - 1;
  slider.value = i;
  slider.setAttribute("aria-valuetext", `${name}, ${formatBytes(peak)}`);
  const there = liveAt(chosen.step, i),
    waits = waited ? `, of which ${formatTime(waited)} wait for copies` : "";
  const title = element(
    "p",
    `${i + 1} of ${step.instants.length}: ${name}, ${formatBytes(peak)}, ${formatBytes(data.budget - peak)} ` +
      `below the budget; ${formatTime(us)}${waits}. ` +
      (there.length > LISTED ? `The largest ${LISTED} of ${there.length}:` : "All that is there:"),
  );
  const holder = element("div", "", "scroll");
  fillTable(
    holder,
    ["bytes", "what", "category"],
    there.slice(0, LISTED).map(([what, category, nbytes]) => [formatBytes(nbytes), what, category]),
  );
  byId("there").replaceChildren(title, holder);
}

// The peaks of all steps: which of them are tight. A plan of one step has said so already.
function drawPeaks() {
  byId("peaks-part").hidden = data.steps.length < 2;
  if (data.steps.length < 2) return;
  const [unit, unitName] = axisUnit(data.budget),
    ink = variable("--ink"),
    x = data.steps.map((_, i) => i + 1);
  const peaks = data.steps.map((step) => step.peak),
    measured = data.measured.filter((one) => one.nbytes !== null);
  const least = Math.min(...peaks, ...measured.map((one) => one.nbytes)),
    tightest = peaks.indexOf(Math.max(...peaks));
  const floor = Math.max(0, least - 0.25 * (data.budget - least)) / unit,
    budget = data.budget / unit;
  const traces = [
    {
      type: "scatter",
      mode: "markers",
      x,
      y: peaks.map((nbytes) => nbytes / unit),
      hoverinfo: "text",
      marker: { color: variable("--accent"), size: data.steps.length > 100 ? 5 : 9 },
      hovertext: data.steps.map(
        (step, i) =>
          `<b>step ${i + 1}</b>: ${formatBytes(step.peak)}, ${formatBytes(data.budget - step.peak)} below the budget<br>` +
          text(step.instants[step.binding][0]),
      ),
    },
  ];
  if (measured.length) {
    traces.push(
      measuredMarks(
        measured.map((one) => one.step + 1),
        measured.map((one) => one.nbytes / unit),
        measured.map((one) => `measured ${formatBytes(one.nbytes)}`),
      ),
    );
  }
  draw(
    "peaks",
    traces,
    {
      shapes: [
        ...chosenStep(),
        { type: "line", xref: "paper", x0: 0, x1: 1, y0: budget, y1: budget, line: { color: ink, dash: "dash", width: 1.5 } },
      ],
      xaxis: stepAxis("peaks"),
      yaxis: { title: { text: unitName }, range: [floor, floor + 1.15 * (budget - floor)], nticks: 4 },
    },
    `Peaks of ${x.length} steps, from ${formatBytes(Math.min(...peaks))} to ${formatBytes(peaks[tightest])} in step ${tightest + 1}; ` +
      `the budget is ${formatBytes(data.budget)}.`,
  );
  onClick("peaks", (point) => choose(point.x - 1));
  byId("peaks-note").textContent =
    `The axis begins at ${formatBytes(Math.round(floor * unit))}; the dashed line is the budget` +
    `${measured.length ? "; a bar is what was measured" : ""}.`;
}

const instantsTable = tableOnDemand(
  "memory-table",
  () => ["", "instruction", "peak", ...data.categories, "time"],
  () =>
    data.steps[chosen.step].instants.map(([name, us, , peak], i) => [
      i + 1,
      name,
      formatBytes(peak),
      ...stacksOf(chosen.step).map((stack) => formatBytes(stack[i])),
      formatTime(us),
    ]),
);
