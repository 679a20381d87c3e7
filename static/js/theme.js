// Light, dark or like the system. The choice is this browser's own; without one the style sheet asks the system.
(() => {
  const KEY = "studio-theme";

  const chosen = () => {
    try {
      return localStorage.getItem(KEY) || "auto";
    } catch {
      return "auto"; // storage can be forbidden; the system's theme is then right
    }
  };

  const apply = (theme) => {
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    for (const button of document.querySelectorAll("[data-theme-choice]"))
      button.setAttribute("aria-pressed", String(button.dataset.themeChoice === theme));
    document.dispatchEvent(new CustomEvent("studio:theme"));
  };

  apply(chosen());

  document.addEventListener("DOMContentLoaded", () => {
    for (const element of document.querySelectorAll("[data-needs-script]")) element.hidden = false;
    apply(chosen());
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-theme-choice]");
    if (!button) return;
    try {
      localStorage.setItem(KEY, button.dataset.themeChoice);
    } catch {
      // The theme still changes, for this page.
    }
    apply(button.dataset.themeChoice);
    button.closest("details")?.removeAttribute("open");
  });

  window.addEventListener("storage", (event) => {
    if (event.key === KEY) apply(chosen());
  });
})();
