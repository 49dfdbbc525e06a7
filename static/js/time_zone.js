// Offers the device's own time zone beside the list of all of them.
document.addEventListener("DOMContentLoaded", () => {
  const list = document.getElementById("id_time_zone");
  const here = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (!list || !here || list.value === here) return;
  if (![...list.options].some((option) => option.value === here)) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.textContent = `Use this device's: ${here.replaceAll("_", " ")}`;
  button.addEventListener("click", () => {
    list.value = here;
    button.remove();
    list.focus();
  });
  list.after(button);
});
