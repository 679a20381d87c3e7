// Copy buttons: shown only where the browser can copy, and they say that they did.
(() => {
  const prepare = (root) => {
    if (!navigator.clipboard && !document.queryCommandSupported?.("copy")) return;
    for (const button of root.querySelectorAll?.("[data-copy]") ?? []) button.hidden = false;
  };

  // The clipboard interface exists on HTTPS and localhost only; a studio in a lab is often plain HTTP.
  const copy = async (element) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(element.textContent);
    const range = document.createRange();
    range.selectNodeContents(element);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    if (!document.execCommand("copy")) throw new Error("copying was refused");
    selection.removeAllRanges();
  };

  document.addEventListener("DOMContentLoaded", () => prepare(document));
  document.addEventListener("htmx:after:swap", (event) => prepare(event.target));

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const label = button.querySelector("[data-copy-label]");
    try {
      await copy(document.getElementById(button.dataset.copy));
      label.textContent = "Copied";
    } catch {
      label.textContent = "Select the text and copy it";
    }
    setTimeout(() => (label.textContent = "Copy"), 2000);
  });
})();
