// A key while it is typed: <input data-reveal> gets a button that shows it, and a form with
// data-busy says so once it is sent.
document.addEventListener("DOMContentLoaded", () => {
  for (const input of document.querySelectorAll("input[data-reveal]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    const say = (shown) => {
      input.type = shown ? "text" : "password";
      button.textContent = shown ? "Hide" : "Show";
      button.setAttribute("aria-label", `${shown ? "Hide" : "Show"} the key`);
    };
    button.addEventListener("click", () => say(input.type === "password"));
    // What the browser remembers of text fields it must not remember of this one.
    input.form.addEventListener("submit", () => say(false));
    const box = document.createElement("div");
    box.className = "reveal";
    input.replaceWith(box);
    box.append(input, button);
    say(false);
  }
});
document.addEventListener("submit", (event) => {
  const button = event.target.querySelector("button[data-busy]");
  if (!button || event.defaultPrevented) return;
  button.textContent = button.dataset.busy;
  button.setAttribute("aria-disabled", "true");
  event.target.addEventListener("submit", (again) => again.preventDefault());
});
