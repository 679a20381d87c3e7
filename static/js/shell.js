// What every page shares: menus close, error summaries take the focus, a failed request says so, forms outlive a session.
(() => {
  const closeMenus = (except) => {
    for (const menu of document.querySelectorAll("details[data-menu][open]"))
      if (menu !== except) menu.removeAttribute("open");
  };

  document.addEventListener("click", (event) => closeMenus(event.target.closest("details[data-menu]")));

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    const open = document.querySelector("details[data-menu][open]");
    if (!open) return;
    closeMenus(null);
    open.querySelector("summary").focus();
  });

  const takeFocus = (root) => root.querySelector?.("[data-take-focus]")?.focus();

  document.addEventListener("DOMContentLoaded", () => takeFocus(document));
  document.addEventListener("htmx:after:swap", (event) => takeFocus(event.target));

  const say = (text) => {
    const region = document.getElementById("messages");
    if (!region) return;
    const alert = document.createElement("div");
    alert.className = "alert alert-soft alert-error";
    alert.textContent = text;
    alert.dataset.connection = "";
    region.querySelector("[data-connection]")?.remove();
    region.append(alert);
  };

  // Signing in in another tab changes the token that this page's forms carry: take the new one from the cookie.
  const token = () => document.cookie.match(/(?:^|; )csrftoken=([^;]+)/)?.[1];

  document.addEventListener(
    "submit",
    (event) => {
      const field = event.target.querySelector("input[name=csrfmiddlewaretoken]");
      if (field && token()) field.value = token();
    },
    { capture: true },
  );

  document.addEventListener("htmx:config:request", (event) => {
    const { request } = event.detail.ctx;
    if (!token()) return;
    if (request.headers["X-CSRFToken"]) request.headers["X-CSRFToken"] = token();
    if (request.body?.has("csrfmiddlewaretoken")) request.body.set("csrfmiddlewaretoken", token());
  });

  // A 503 is not swapped in (see the configuration in base.html): what is shown stays, and says why it is old.
  document.addEventListener("htmx:response:error", (event) => {
    if (event.detail.ctx.response.status !== 503) return;
    say("The studio's database does not answer at this moment. What you see may be out of date; try again in a few seconds.");
  });

  document.addEventListener("htmx:error", () =>
    say("The studio did not answer. What you see may be out of date: check your connection and reload the page."),
  );
})();
