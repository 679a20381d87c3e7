// An upload in pieces (tus): progress with rate and time left, pause, resume, cancel. It goes on after a broken
// connection and a restarted server by itself, and after a reload when the same file is chosen again.
// Without this script the same form posts the whole file at once.
(() => {
  const RETRY_MILLISECONDS = [0, 1000, 2000, 4000, 8000, 15000, 15000, 15000, 30000, 30000, 60000, 60000, 60000];
  const RATE_SECONDS = 5;
  // A connection that carries nothing any more is often not told to be broken for minutes.
  const STALL_SECONDS = 10;

  const size = (bytes) => {
    // In units of 1024, as the pages say sizes.
    const [unit, value] = bytes >= 1024 ** 3 ? ["GB", bytes / 1024 ** 3] : ["MB", bytes / 1024 ** 2];
    return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${unit}`;
  };

  const duration = (seconds) => {
    const whole = Math.ceil(seconds);
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
    return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  };

  // Bytes per second over the last moments, so that a pause or a slow beginning is soon forgotten.
  class Rate {
    samples = [];

    of(bytes) {
      const now = performance.now() / 1000;
      this.samples.push([now, bytes]);
      while (this.samples.length > 2 && now - this.samples[0][0] > RATE_SECONDS) this.samples.shift();
      const [then, before] = this.samples[0];
      return now > then ? Math.max(0, (bytes - before) / (now - then)) : 0;
    }
  }

  const statusOf = (error) => error.originalResponse?.getStatus() ?? 0;

  // What the server says in its own words, and which field it means.
  const refusal = (error) => {
    try {
      const said = JSON.parse(error.originalResponse.getBody()).error;
      return { field: said.field, sentence: [said.message, said.help].filter(Boolean).join(" ") };
    } catch {
      const status = statusOf(error);
      return { sentence: status ? `The studio answered with an error (${status}).` : "The studio does not answer." };
    }
  };

  const mayRetry = (error) => {
    const status = statusOf(error);
    return status === 0 || [408, 409, 423].includes(status) || (status >= 500 && status !== 507);
  };

  const attach = (form) => {
    const part = (name) => form.querySelector(`[data-${name}]`);
    const input = form.querySelector("input[type=file]");
    const bar = form.querySelector("progress");
    const [drop, box, text, complaint] = ["drop", "progress", "progress-text", "complaint"].map(part);
    const [submit, pause, resume, cancel] = ["submit", "pause", "resume", "cancel"].map(part);
    const token = form.querySelector("[name=csrfmiddlewaretoken]").value;
    const value = (name) => form.elements[name]?.value ?? "";
    let upload = null;
    let isWaiting = false;
    // When bytes last went out, or are to at the latest, in seconds; null while none are expected to.
    let movedAt = null;

    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("border-primary");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("border-primary"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("border-primary");
      if (event.dataTransfer.files.length && !input.disabled) input.files = event.dataTransfer.files;
    });

    // idle, sending, paused or failed: which buttons there are, and whether the form may be changed.
    const enter = (state, sentence) => {
      form.dataset.state = state;
      isWaiting = false;
      movedAt = state === "sending" ? performance.now() / 1000 : null;
      submit.hidden = state !== "idle";
      pause.hidden = state !== "sending";
      resume.hidden = !["paused", "failed"].includes(state);
      cancel.hidden = state === "idle" || state === "finishing";
      for (const field of form.querySelectorAll("input:not([type=hidden]), select")) field.disabled = state !== "idle";
      bar.classList.toggle("progress-warning", state === "paused");
      bar.classList.toggle("progress-error", state === "failed");
      text.textContent = sentence;
    };

    const complain = (sentence, field) => {
      complaint.textContent = sentence;
      complaint.hidden = !sentence;
      if (!sentence) return;
      const control = field && form.elements[field];
      if (control) control.setAttribute("aria-invalid", "true");
      (control || complaint).focus();
    };

    const finish = () => {
      enter("finishing", `${size(upload.file.size)} sent. Checking and storing the file.`);
      window.location.assign(upload.url);
    };

    const fail = (error) => {
      const { sentence, field } = refusal(error);
      if (statusOf(error) === 422) {
        // Nothing that is sent again would help: a name is changed here, and a file that cannot be read is over.
        const url = upload.url;
        upload = null;
        enter("idle", "");
        box.hidden = true;
        if (field === "name" && url) window.location.assign(url);
        else complain(sentence, field);
      } else if ([401, 403, 404, 410, 413, 429].includes(statusOf(error))) {
        upload = null;
        enter("idle", "");
        box.hidden = true;
        complain(sentence, field);
      } else {
        enter("failed", `${sentence} ${upload.url ? "What was sent is kept." : ""}`.trim());
      }
    };

    const start = (file) => {
      let rate = new Rate();
      upload = new tus.Upload(file, {
        endpoint: form.dataset.uploadEndpoint,
        retryDelays: RETRY_MILLISECONDS,
        removeFingerprintOnSuccess: true,
        // As it is by then: whoever signs in again in another tab gets a new one.
        onBeforeRequest: (request) =>
          request.setHeader("X-CSRFToken", /(?:^|; )csrftoken=([^;]+)/.exec(document.cookie)?.[1] ?? token),
        metadata: { filename: file.name, name: value("name"), licence: value("licence"), dataset: value("dataset") },
        fingerprint: async () => ["studio", value("dataset"), file.name, file.size, file.lastModified].join("-"),
        onProgress: (sent, total) => {
          if (form.dataset.state !== "sending") return;
          isWaiting = false;
          // When all is sent the studio checks and stores it, which takes as long as it takes.
          movedAt = sent < total ? performance.now() / 1000 : null;
          const speed = rate.of(sent);
          bar.value = total ? (100 * sent) / total : 100;
          text.textContent =
            sent < total
              ? `${size(sent)} of ${size(total)}, ${size(speed)}/s${speed ? `, ${duration((total - sent) / speed)} left` : ""}`
              : `${size(total)} sent. Checking and storing the file.`;
        },
        onShouldRetry: (error, attempt) => {
          if (!mayRetry(error)) return false;
          rate = new Rate();
          isWaiting = true;
          movedAt = (performance.now() + RETRY_MILLISECONDS[attempt]) / 1000;
          text.textContent = "The connection broke. What was sent is kept; trying again.";
          return true;
        },
        onError: fail,
        onSuccess: finish,
      });
      return upload;
    };

    // What was typed beside a file that is half here already counts, and not what was typed then.
    const retarget = async (url) => {
      if (value("dataset")) return true;
      const fields = new URLSearchParams({ name: value("name"), licence: value("licence"), csrfmiddlewaretoken: token });
      const answer = await fetch(`${url}target/`, { method: "POST", body: fields, redirect: "manual" });
      if (answer.status !== 422) return true;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      enter("idle", "");
      box.hidden = true;
      complain(page.getElementById("name-problem")?.textContent ?? "This name cannot be used.", "name");
      return false;
    };

    // Before it has an address, trying again would begin another upload beside it.
    const lookForStall = async () => {
      if (!upload?.url || movedAt === null || performance.now() / 1000 - movedAt < STALL_SECONDS) return;
      const stalled = upload;
      movedAt = performance.now() / 1000;
      isWaiting = true;
      text.textContent = `No bytes for ${STALL_SECONDS} s, trying again. What was sent is kept.`;
      await stalled.abort();
      if (upload === stalled && form.dataset.state === "sending") stalled.start();
    };
    setInterval(lookForStall, 1000);

    const go = async () => {
      const [earlier] = await upload.findPreviousUploads();
      if (earlier) {
        if (!(await retarget(earlier.uploadUrl))) return;
        upload.resumeFromPreviousUpload(earlier);
      }
      if (form.dataset.state === "sending") upload.start();
    };

    form.addEventListener("submit", (event) => {
      if (!input.files.length) return; // the browser or the server says that a file is missing
      event.preventDefault();
      if (upload) return;
      complain("");
      for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
      box.hidden = false;
      bar.value = 0;
      start(input.files[0]);
      enter("sending", "Starting.");
      go().catch((error) => fail(error));
    });
    pause.addEventListener("click", async () => {
      const shown = size((bar.value / 100) * upload.file.size);
      enter("paused", `Paused at ${shown} of ${size(upload.file.size)}. What was sent is kept.`);
      resume.focus();
      await upload.abort();
    });
    resume.addEventListener("click", () => {
      enter("sending", "Going on.");
      pause.focus();
      upload.start();
    });
    cancel.addEventListener("click", async () => {
      const ended = upload;
      upload = null;
      enter("idle", "Cancelled. Nothing was stored.");
      submit.focus();
      bar.value = 0;
      // Where the studio cannot be told it forgets the upload by itself, a day later.
      await ended.abort(true).catch(() => {});
    });
    window.addEventListener("online", async () => {
      if (form.dataset.state === "failed") resume.click();
      else if (form.dataset.state === "sending" && isWaiting) {
        await upload.abort();
        upload.start();
      }
    });
    enter("idle", "");
  };

  for (const form of document.querySelectorAll("form[data-upload]")) attach(form);
})();
