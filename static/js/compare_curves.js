// The loss curves of several adapters' jobs in one chart: training as a thin line, validation as a dashed one.
document.addEventListener("DOMContentLoaded", () => {
  const section = document.getElementById("compare-curves");
  if (!section) return;
  const { axes, figure, STEP } = ChartParts;
  const box = section.querySelector("[data-chart]");
  const empty = section.querySelector("[data-chart-empty]");
  let curves = [];
  let plot = null;

  const isDark = () => getComputedStyle(section).colorScheme.includes("dark");
  // Neighbours in the list are far apart on the colour wheel; each is light on dark and dark on light.
  const hue = (index) => (index * 137.5 + 250) % 360;
  const colour = (index, alpha = 1) => `oklch(${isDark() ? 0.78 : 0.52} 0.14 ${hue(index)} / ${alpha})`;

  // One column per curve and kind over the steps of all of them.
  const data = () => {
    const steps = [...new Set(curves.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, index) => [step, index]));
    const columns = curves.flatMap((one) =>
      [1, 2].map((kind) => {
        const column = new Array(steps.length).fill(null);
        for (const point of one.points) column[place.get(point[0])] = point[kind];
        return column;
      }),
    );
    return [steps, ...columns];
  };

  const draw = () => {
    plot?.destroy();
    const value = (_plot, found) => figure(found);
    const series = curves.flatMap((one, index) => [
      { label: `${one.label}, training`, stroke: colour(index, 0.4), width: 1.25, spanGaps: true, points: { show: false }, value },
      { label: `${one.label}, validation`, stroke: colour(index), width: 2, dash: [6, 4], spanGaps: true, points: { show: true, size: 6, fill: colour(index) }, value },
    ]);
    plot = new uPlot(
      {
        width: Math.max(200, box.clientWidth),
        height: 320,
        scales: { x: { time: false } },
        cursor: { drag: { x: true, y: false } },
        series: [STEP, ...series],
        axes: axes(box),
      },
      data(),
      box,
    );
  };

  const load = async () => {
    const answer = await fetch(section.dataset.curves, { headers: { Accept: "application/json" } });
    if (!answer.ok) throw new Error(String(answer.status));
    curves = (await answer.json()).curves.filter((one) => one.points.length > 0);
    if (curves.length === 0) return;
    empty.hidden = true;
    for (const found of section.querySelectorAll("[data-needs-chart]")) found.hidden = false;
    draw();
    new ResizeObserver(() => plot.setSize({ width: Math.max(200, box.clientWidth), height: 320 })).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme", "class"] });
  };
  load().catch(() => {
    empty.textContent = "The curves could not be loaded. Reload the page to try again, or read them as a table.";
  });
});
