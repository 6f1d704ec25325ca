// Puts the page together: what is chosen, and what is drawn anew when it changes.

function choose(number) {
  chosen.step = Math.max(0, Math.min(data.steps.length - 1, number));
  const step = data.steps[chosen.step];
  chosen.instant = step.binding;
  byId("step").value = chosen.step;
  byId("previous").disabled = chosen.step === 0;
  byId("next").disabled = chosen.step === data.steps.length - 1;
  byId("what").textContent =
    `trains ${plural(step.chunks, "chunk")}, ${formatBytes(step.trained)} of gradients, backward to ${step.depth}, ` +
    `${step.update} updates, peak ${formatBytes(step.peak)}, ${formatTime(step.us)}`;
  for (const drawOne of [drawMemory, drawPeaks, drawMap, drawTimes, drawOptions]) drawOne();
}

function drawAll() {
  const instant = chosen.instant;
  choose(chosen.step);
  if (instant !== chosen.instant) {
    chosen.instant = instant;
    drawMemory();
  }
  drawRows();
  drawCurve();
}

function offer(id, labels) {
  byId(id).replaceChildren(
    ...labels.map((label, i) => {
      const made = element("option", label);
      made.value = i;
      return made;
    }),
  );
}

function listen() {
  byId("step").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("previous").addEventListener("click", () => choose(chosen.step - 1));
  byId("next").addEventListener("click", () => choose(chosen.step + 1));
  byId("instant").addEventListener("input", (event) => {
    chosen.instant = Number(event.target.value);
    drawMemory();
  });
  byId("zoom").addEventListener("change", drawMemory);
  byId("param").addEventListener("change", (event) => chooseParam(Number(event.target.value)));
  document.addEventListener("keydown", (event) => {
    // Where the arrows have a meaning of their own, they keep it.
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea, .scroll")) return;
    if (event.key === "ArrowLeft") choose(chosen.step - 1);
    if (event.key === "ArrowRight") choose(chosen.step + 1);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  printMedia.addEventListener("change", drawAll);
  // Before a page is printed the styles of the screen still hold: this attribute says that it will be.
  window.addEventListener("beforeprint", () => {
    document.documentElement.dataset.paper = "";
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    delete document.documentElement.dataset.paper;
    drawAll();
  });
}

async function begin() {
  data = await readData();
  const peaks = data.steps.map((step) => step.peak),
    pieces = data.params.map((param) => 1000 * stepsOf(param) + param.rows.length);
  chosen.step = peaks.indexOf(Math.max(...peaks));
  chosen.instant = data.steps[chosen.step].binding;
  chosen.param = pieces.indexOf(Math.max(...pieces)); // the one with the most to see
  offer(
    "step",
    data.steps.map((_, i) => `${i + 1} of ${data.steps.length}`),
  );
  offer(
    "param",
    data.params.map((param) => `${param.name} (${plural(param.rows.length, "chunk")})`),
  );
  byId("param").value = chosen.param;
  byId("zoom").checked = alwaysThere(chosen.step) > 0.8 * data.budget;
  listen();
  drawAll();
  document.documentElement.dataset.ready = Math.round(performance.now());
}

begin().catch((error) => {
  byId("failed").hidden = false;
  byId("failed").textContent = `The figures could not be drawn (${error}). The texts and tables around them need no script.`;
  throw error;
});
