// Where the pages' names do not fit, the one of this page is brought into view.
document.addEventListener("DOMContentLoaded", () => {
  for (const here of document.querySelectorAll(".nav [aria-current], .side [aria-current]")) {
    const list = here.closest("ul");
    list.scrollLeft = here.offsetLeft - (list.clientWidth - here.offsetWidth) / 2;
  }
});
