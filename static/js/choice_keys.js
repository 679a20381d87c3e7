// One key per button: a key that a button names presses it, except while somebody types.
(() => {
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
    const key = event.key.toLowerCase();
    const button = [...document.querySelectorAll("[data-choice-key]")].find((one) => one.dataset.choiceKey === key);
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
  });
})();
