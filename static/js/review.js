// Blind verdicts by keys: each presses the button that shows it, so without this script nothing is missing.
(() => {
  const isTyping = (target) => target.closest("input:not([type=hidden]), textarea, select, [contenteditable]");

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isTyping(event.target)) return event.target.blur();
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || isTyping(event.target)) return;
    const found = document.querySelector(`#blind [data-key="${CSS.escape(event.key.toLowerCase())}"]`);
    if (!found) return;
    event.preventDefault();
    if (found.matches("button")) found.click();
    else found.focus();
  });
})();
