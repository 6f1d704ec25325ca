// The time of every step by what it is spent on, the options of every segment, and what other budgets buy.

function drawTimes() {
  const steps = data.steps,
    x = steps.map((_, i) => i + 1),
    [unit, name] = steps.some((step) => step.us >= 1e6) ? [1e6, "s"] : [1e3, "ms"];
  const beside = "hidden transfers",
    used = Object.keys(PARTS).filter((part) => part !== beside && steps.some((step) => step.split[part]));
  const hovertext = steps.map((step, i) => {
    const parts = Object.keys(PARTS)
      .filter((part) => step.split[part])
      .map((part) => `${formatTime(step.split[part])} ${part}`);
    return `<b>step ${i + 1}</b>, ${formatTime(step.us)}<br>${parts.join("<br>")}`;
  });
  const traces = used.map((part) => ({
    type: "bar",
    x,
    y: steps.map((step) => step.split[part] / unit),
    marker: { color: categoryColor(PARTS[part]), line: { width: 0 } },
    hovertext,
    hoverinfo: "text",
  }));
  const hidden = steps.some((step) => step.split[beside]);
  if (hidden) {
    const marker = {
      symbol: "diamond",
      size: x.length > 60 ? 5 : 9,
      color: variable("--paper"),
      line: { color: variable("--ink"), width: 1 },
    };
    traces.push({
      type: "scatter",
      mode: "markers",
      x,
      y: steps.map((step) => step.split[beside] / unit),
      marker,
      hovertext,
      hoverinfo: "text",
    });
  }
  if (data.measured.length) {
    const measured = data.measured;
    traces.push(
      measuredMarks(
        measured.map((one) => one.step + 1),
        measured.map((one) => one.us / unit),
        measured.map((one) => `measured ${formatTime(one.us)}`),
      ),
    );
  }
  legend("parts", [
    ...used.map((part) => [part, categoryColor(PARTS[part])]),
    ...(hidden ? [[`${beside} (diamonds: they run beside compute)`, variable("--paper")]] : []),
    ...(data.measured.length ? [["measured (bars across)", variable("--ink")]] : []),
  ]);
  draw(
    "time",
    traces,
    {
      barmode: "stack",
      bargap: x.length > 60 ? 0 : x.length > 3 ? 0.15 : 0.5,
      shapes: chosenStep(),
      xaxis: stepAxis("time"),
      yaxis: { title: { text: name }, rangemode: "tozero" },
    },
    `Time of ${plural(x.length, "step")} by what it is spent on; step ${chosen.step + 1} takes ${formatTime(steps[chosen.step].us)}.`,
  );
  onClick("time", (point) => choose(point.x - 1));
}

tableOnDemand(
  "time-table",
  () => ["step", "chunks", "gradients", "backward to", "updates", "peak", "time", ...Object.keys(PARTS)],
  () =>
    data.steps.map((step, i) => [
      i + 1,
      step.chunks,
      formatBytes(step.trained),
      step.depth,
      step.update,
      formatBytes(step.peak),
      formatTime(step.us),
      ...Object.keys(PARTS).map((part) => formatTime(step.split[part])),
    ]),
);

function drawOptions() {
  const names = Object.keys(OPTIONS).flatMap((option) =>
    [...new Set(data.steps.flatMap((step) => step.options))].filter((name) => optionOf(name) === OPTIONS[option]).sort(),
  );
  const others = [...new Set(data.steps.flatMap((step) => step.options))].filter((name) => !names.includes(name)),
    all = [...names, ...others];
  const number = new Map(all.map((name, i) => [name, i])),
    steps = data.steps.length;
  const heat = {
    type: "heatmap",
    z: data.segments.map((_, s) => data.steps.map((step) => number.get(step.options[s]))),
    x: data.steps.map((_, i) => i + 1),
    colorscale: all.flatMap((name, i) => [
      [i / all.length, categoryColor(optionOf(name)[0])],
      [(i + 1) / all.length, categoryColor(optionOf(name)[0])],
    ]),
    zmin: -0.5,
    zmax: all.length - 0.5,
    showscale: false,
    hoverinfo: "text",
    xgap: steps < 60 ? 2 : 0,
    ygap: data.segments.length < 50 ? 1 : 0,
    hovertext: data.segments.map((segment, s) =>
      data.steps.map((step, i) => {
        const trained = trainedIn().get(`${i},${s}`);
        const trains = trained ? `trains ${formatBytes(trained)} of gradients` : "trains nothing";
        return `${text(segment)}, step ${i + 1}: <b>${text(step.options[s])}</b><br>${trains}`;
      }),
    ),
  };
  const active = steps < 2 ? [] : [...trainedIn().keys()].map((key) => key.split(",").map(Number));
  const dots = {
    type: "scatter",
    mode: "markers",
    x: active.map(([i]) => i + 1),
    y: active.map(([, s]) => s),
    hoverinfo: "skip",
    marker: { color: variable("--paper"), size: steps > 60 ? 3 : 6, line: { color: variable("--ink"), width: steps > 60 ? 0.5 : 1 } },
  };
  legend(
    "names",
    all.map((name) => [name, categoryColor(optionOf(name)[0]), optionOf(name)[1]]),
  );
  byId("options-note").textContent = steps < 2 ? "" : "Dots are where a step trains something: backward goes down to the lowest of them.";
  byId("options").style.height = `${Math.max(16, Math.min(40, 4 + 0.6 * data.segments.length))}rem`;
  draw(
    "options",
    [heat, dots],
    {
      shapes: chosenStep(),
      xaxis: stepAxis("options"),
      yaxis: { ...thinned(data.segments, 24), showgrid: false, zeroline: false, range: [-0.5, data.segments.length - 0.5] },
    },
    `The option of ${plural(data.segments.length, "segment")} in ${plural(steps, "step")}: ${all.join(", ")}.`,
  );
  onClick("options", (point) => choose(point.x - 1));
  optionsTable();
}

let trainedCache;
// Bytes of gradients by "step,segment".
function trainedIn() {
  if (trainedCache) return trainedCache;
  trainedCache = new Map();
  for (const param of data.params) {
    for (const [, , step, nbytes] of param.rows) {
      const key = `${step},${param.segment}`;
      trainedCache.set(key, (trainedCache.get(key) || 0) + nbytes);
    }
  }
  return trainedCache;
}

const optionsTable = tableOnDemand(
  "options-table",
  () => ["segment", "option", "trains"],
  () =>
    data.segments.map((segment, s) => [
      segment,
      data.steps[chosen.step].options[s],
      formatBytes(trainedIn().get(`${chosen.step},${s}`) || 0),
    ]),
);

const sweepUs = () => data.steps.reduce((sum, step) => sum + step.us, 0);
const allPoints = () =>
  [...data.points.map((point) => [...point, ""]), [data.budget, sweepUs(), data.steps.length, "this plan"]].sort((a, b) => a[0] - b[0]);

function drawCurve() {
  byId("curve-section").hidden = !data.points.length;
  if (!data.points.length) return;
  const [unit, name] = axisUnit(data.budget),
    points = allPoints(),
    times = points.map(([, us]) => us);
  const words = ([budget, us, steps]) => `${formatBytes(budget)}: ${formatTime(us)} a sweep of ${plural(steps, "step")}`;
  const own = points.find(([, , , note]) => note),
    steep = Math.max(...times) > 20 * Math.min(...times);
  // A logarithmic axis says all its numbers in full.
  const decades = [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((one) => Number(`${one}e${power}`)));
  const labelled = decades.filter(
    (value, i) => decades[i + 1] * 1e6 >= Math.min(...times) && (decades[i - 1] || 0) * 1e6 <= Math.max(...times),
  );
  const ink = variable("--ink"),
    accent = variable("--accent");
  draw(
    "curve",
    [
      {
        type: "scatter",
        mode: "lines+markers",
        x: points.map(([budget]) => budget / unit),
        y: times.map((us) => us / 1e6),
        line: { color: accent, shape: "hv" },
        marker: { size: 7, color: accent },
        hovertext: points.map(words),
        hoverinfo: "text",
      },
      {
        type: "scatter",
        mode: "markers+text",
        x: [own[0] / unit],
        y: [own[1] / 1e6],
        text: ["this plan"],
        textposition: "top right",
        textfont: { color: ink },
        marker: { size: 14, symbol: "circle-open", color: ink, line: { width: 3 } },
        hovertext: words(own),
        hoverinfo: "text",
      },
    ],
    {
      xaxis: { title: { text: `budget, ${name}` } },
      yaxis: {
        title: { text: "s per sweep" },
        ...(steep ? { type: "log", tickvals: labelled, ticktext: labelled.map(String) } : { rangemode: "tozero" }),
      },
    },
    points.map(words).join("; "),
  );
}

tableOnDemand(
  "curve-table",
  () => ["budget", "time of a sweep", "steps", ""],
  () => allPoints().map(([budget, us, steps, note]) => [formatBytes(budget), formatTime(us), steps, note]),
);
