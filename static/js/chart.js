// Curves of a job: raw and smoothed line, validation as dots; colours follow the theme, the width its box.
(() => {
  // The order of the numbers in a row that the server sends (jobs/series.py, COLUMNS).
  const COLUMNS = ["step", "loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second"];
  const MOST_DRAWN = 1600;

  const colour = (element, name, alpha = 1) => {
    const probe = document.createElement("span");
    probe.className = name;
    element.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return alpha === 1 ? found : `color-mix(in oklab, ${found} ${alpha * 100}%, transparent)`;
  };

  // Exponential moving average, corrected for its start, so that the first values are not pulled to zero.
  const smooth = (values, factor) => {
    let sum = 0;
    let weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = sum * factor + value * (1 - factor);
      weight = weight * factor + (1 - factor);
      return sum / weight;
    });
  };

  const figure = (value) => {
    if (value === null || value === undefined) return "–";
    return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(4)).toString();
  };

  // The axes of a chart over steps, in the colours of its box.
  const axes = (box) => {
    const grid = { stroke: colour(box, "text-base-content", 0.12), width: 1 };
    const axis = { stroke: colour(box, "text-base-content", 0.75), grid, ticks: grid, font: "12px system-ui, sans-serif" };
    return [
      { ...axis, values: (_plot, splits) => splits.map((at) => (Number.isInteger(at) ? at.toLocaleString("en") : "")) },
      { ...axis, size: 58, values: (_plot, splits) => splits.map(figure) },
    ];
  };

  // Of the plot alone. The legend below it has as many lines as the width asks for, and the box grows with them.
  const LEGEND_LINE = 30;
  const sizeIn = (box) => ({
    width: Math.max(200, box.clientWidth),
    height: Math.max(160, parseFloat(getComputedStyle(box).minHeight) - LEGEND_LINE),
  });

  const STEP = { label: "Step", value: (_plot, found) => (found === null ? "–" : String(found)) };

  class Curves {
    constructor(root) {
      this.root = root;
      this.bySteps = new Map();
      this.smoothing = 0.6;
      this.charts = [];
      for (const box of root.querySelectorAll("[data-chart]")) this.charts.push({ box, name: box.dataset.chart });
      new ResizeObserver(() => this.resize()).observe(root);
      const redraw = () => this.rebuild();
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
      new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme", "class"] });
    }

    // Rows in the order of COLUMNS. A step that comes again replaces what is known of it, so nothing is drawn twice.
    add(rows) {
      for (const row of rows) {
        const known = this.bySteps.get(row[0]);
        this.bySteps.set(row[0], known ? row.map((value, i) => (value === null ? known[i] : value)) : row);
      }
      this.draw();
    }

    // The next rows are the whole curve; until then the old one stays on the screen.
    forget() {
      this.bySteps.clear();
    }

    column(rows, name) {
      const index = COLUMNS.indexOf(name);
      return rows.map((row) => row[index]);
    }

    rows() {
      const rows = [...this.bySteps.values()].sort((a, b) => a[0] - b[0]);
      if (rows.length <= MOST_DRAWN) return rows;
      const every = Math.ceil(rows.length / MOST_DRAWN);
      return rows.filter((row, i) => i % every === 0 || row[2] !== null || i === rows.length - 1);
    }

    dataOf(name) {
      const rows = this.rows();
      const steps = this.column(rows, "step");
      const values = this.column(rows, name);
      if (name !== "loss") return [steps, values];
      return [steps, values, smooth(values, this.smoothing), this.column(rows, "validation_loss")];
    }

    series(box, name) {
      const line = colour(box, "text-primary");
      const value = (_plot, found) => figure(found);
      if (name !== "loss") return [STEP, { label: "Value", stroke: line, width: 2, spanGaps: true, points: { show: false }, value }];
      const dot = colour(box, "text-warning");
      return [
        STEP,
        { label: "Loss", stroke: colour(box, "text-primary", 0.35), width: 1, spanGaps: true, points: { show: false }, value },
        { label: "Smoothed", stroke: line, width: 2, spanGaps: true, points: { show: false }, value },
        { label: "Validation", stroke: dot, width: 1.5, dash: [4, 4], spanGaps: true, points: { show: true, size: 7, fill: dot }, value },
      ];
    }

    build(chart) {
      const { box, name } = chart;
      const options = {
        ...sizeIn(box),
        scales: { x: { time: false } },
        legend: { live: true },
        cursor: { sync: { key: "job" }, drag: { x: true, y: false } },
        series: this.series(box, name),
        axes: axes(box),
      };
      chart.plot = new uPlot(options, this.dataOf(name), box);
    }

    draw() {
      if (this.bySteps.size === 0) return;
      this.root.querySelector("[data-chart-empty]")?.setAttribute("hidden", "");
      for (const found of this.root.querySelectorAll("[data-needs-chart]")) found.hidden = false;
      for (const chart of this.charts) {
        if (chart.plot) chart.plot.setData(this.dataOf(chart.name));
        else this.build(chart);
      }
    }

    rebuild() {
      for (const chart of this.charts) {
        chart.plot?.destroy();
        chart.plot = null;
      }
      this.draw();
    }

    resize() {
      for (const { box, plot } of this.charts) plot?.setSize(sizeIn(box));
    }
  }

  window.Curves = Curves;
  window.ChartParts = { axes, figure, STEP };
})();
