// Small repairs of the theme, for keyboards and screen readers.
document.addEventListener("DOMContentLoaded", () => {
  // A label that hides a button's visible text confuses voice control: let the text be the label.
  for (const button of document.querySelectorAll(":is(button, summary)[aria-label]")) {
    for (const icon of button.querySelectorAll("i")) {
      icon.removeAttribute("title");
      icon.ariaHidden = "true";
    }
    if (button.innerText.trim()) button.removeAttribute("aria-label");
  }
  const sidebar = document.querySelector("#pst-primary-sidebar, .bd-sidebar-primary");
  sidebar?.setAttribute("role", "navigation");
  sidebar?.setAttribute("aria-label", "Chapters and search");

  // The bibliography's entries: list roles that their contents do not fit.
  for (const entry of document.querySelectorAll(".citation-list, .citation")) {
    entry.removeAttribute("role");
  }

  // What scrolls sideways must be reachable from the keyboard.
  const boxes = ".katex-display > .katex, .output.text_html, .pst-scrollable-table-container, pre";
  const mark = () => {
    const wide = [...document.querySelectorAll(boxes)].filter((b) => b.scrollWidth > b.clientWidth);
    for (const box of wide) box.tabIndex = 0; // after all are measured: one layout, not many
  };
  mark();
  window.addEventListener("resize", mark);
});

// Pages opened from a disk may not fetch others: show search results without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
