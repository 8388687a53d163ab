// Small repairs of the theme, for keyboards and screen readers.
document.addEventListener("DOMContentLoaded", () => {
  // A label that hides a button's visible text confuses voice control: let the text be the label.
  for (const button of document.querySelectorAll(":is(button, summary)[aria-label]")) {
    for (const icon of button.querySelectorAll("i")) {
      icon.removeAttribute("title");
      icon.ariaHidden = "true";
    }
    if (button.textContent.trim()) button.removeAttribute("aria-label");
  }
  const sidebar = document.querySelector("#pst-primary-sidebar, .bd-sidebar-primary");
  sidebar?.setAttribute("role", "navigation");
  sidebar?.setAttribute("aria-label", "Chapters and search");

  // The bibliography's entries: list roles that their contents do not fit.
  for (const entry of document.querySelectorAll(".citation-list, .citation")) {
    entry.removeAttribute("role");
  }

  // What scrolls sideways must be reachable from the keyboard, wherever it stands on the page.
  const boxes = ".katex-display > .katex, .output, .pst-scrollable-table-container, pre";
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    }
  }, { rootMargin: "1000000px" });
  for (const box of document.querySelectorAll(boxes)) watch.observe(box);
});

// Pages opened from a disk may not fetch others: show search results without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
