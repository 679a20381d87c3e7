// Upload with progress: bytes, rate and time left. Without this script the same form posts by itself.
(() => {
  const megabytes = (bytes) => (bytes / 1e6 < 10 ? (bytes / 1e6).toFixed(1) : Math.round(bytes / 1e6).toString());

  const duration = (seconds) => {
    const whole = Math.ceil(seconds);
    return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
  };

  // Attach to a form; called again for the form that comes back with an error.
  const attach = (form) => {
    const input = form.querySelector("input[type=file]");
    const drop = form.querySelector("[data-drop]");
    const box = form.querySelector("[data-progress]");
    const text = form.querySelector("[data-progress-text]");
    const bar = box.querySelector("progress");
    const cancel = form.querySelector("[data-cancel]");
    const submit = form.querySelector("button:not([type=button])");
    let request = null;

    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("border-primary");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("border-primary"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("border-primary");
      if (event.dataTransfer.files.length) input.files = event.dataTransfer.files;
    });

    const stop = (sentence) => {
      request = null;
      submit.disabled = false;
      cancel.hidden = true;
      text.textContent = sentence;
    };

    // The answer is a page: a dataset to go to, or this form again with its errors.
    const show = (answer) => {
      const page = new DOMParser().parseFromString(answer.responseText, "text/html");
      const fresh = page.getElementById(form.id);
      if (answer.status >= 200 && answer.status < 300 && !fresh) {
        window.location.assign(answer.responseURL);
      } else if (fresh) {
        form.replaceWith(document.adoptNode(fresh));
        attach(fresh);
        fresh.querySelector("[data-take-focus]")?.focus();
      } else {
        stop(`The studio answered with an error (${answer.status}). Nothing was stored. Try again.`);
      }
    };

    form.addEventListener("submit", (event) => {
      if (!input.files.length) return; // the browser or the server says that a file is missing
      event.preventDefault();
      if (request) return;
      const started = performance.now();
      request = new XMLHttpRequest();
      request.open("POST", form.action);
      request.upload.addEventListener("progress", (progress) => {
        const seconds = (performance.now() - started) / 1000;
        const rate = progress.loaded / Math.max(seconds, 0.001);
        const left = (progress.total - progress.loaded) / Math.max(rate, 1);
        bar.value = (100 * progress.loaded) / Math.max(progress.total, 1);
        text.textContent =
          progress.loaded < progress.total
            ? `${megabytes(progress.loaded)} of ${megabytes(progress.total)} MB, ${megabytes(rate)} MB/s, ${duration(left)} left`
            : `${megabytes(progress.total)} MB sent. Checking and storing the file.`;
      });
      request.addEventListener("load", (loaded) => show(loaded.target));
      request.addEventListener("error", () => stop("The connection broke. Nothing was stored. Try again."));
      request.addEventListener("abort", () => stop("Cancelled. Nothing was stored."));
      submit.disabled = true;
      cancel.hidden = false;
      box.hidden = false;
      text.textContent = "Starting.";
      request.send(new FormData(form));
    });
    cancel.addEventListener("click", () => request?.abort());
  };

  for (const form of document.querySelectorAll("form[data-upload]")) attach(form);
})();
