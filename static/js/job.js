// The job page: curves from the server, newer points from its stream, the title of the tab.
document.addEventListener("DOMContentLoaded", () => {
  const section = document.getElementById("job-charts");
  if (!section) return;
  const curves = new Curves(section);

  const slider = document.getElementById("smoothing");
  slider?.addEventListener("input", () => {
    curves.smoothing = Number(slider.value);
    curves.draw();
  });

  const load = async () => {
    const answer = await fetch(section.dataset.points, { headers: { Accept: "application/json" } });
    if (answer.ok) curves.add((await answer.json()).points);
  };
  load().catch(() => {
    const empty = section.querySelector("[data-chart-empty]");
    if (empty) empty.textContent = "The curves could not be loaded. Reload the page to try again.";
  });

  // A reset says that points were missed: the whole curve follows, and what is drawn stays until it is there.
  const stream = document.getElementById("job-stream");
  stream?.addEventListener("reset", () => curves.forget());
  stream?.addEventListener("points", (event) => curves.add(JSON.parse(event.detail.data).points));
  // What the live curve may have missed is in the database now.
  stream?.addEventListener("end", () => {
    curves.forget();
    load().catch(() => {});
  });

  // The progress fragment says what the tab is called; it is replaced while the job runs.
  const name = () => {
    const title = document.getElementById("job-progress")?.dataset.title;
    if (title) document.title = `${title} · PEFT Studio`;
  };
  new MutationObserver(name).observe(document.getElementById("job-page"), {
    subtree: true,
    attributeFilter: ["data-title"],
  });
});
