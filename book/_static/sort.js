// The tables of cells tagged `sortable`: the head of a column is a button that sorts by it. On a
// phone the rows of those tagged `stacked` become lists, in which each cell has its column's name.
document.addEventListener("DOMContentLoaded", () => {
  const text = (row, column) => row.cells[column].textContent.trim().replaceAll("−", "-");

  // Negative if a stands before b. Numbers count as numbers, also with a unit or a deviation.
  function order(a, b) {
    const [x, y] = [parseFloat(a), parseFloat(b)];
    return isNaN(x) || isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  }

  function sort(table, head) {
    const column = head.cellIndex;
    const up = head.ariaSort !== "ascending";
    const rows = [...table.tBodies[0].rows];
    const full = rows.filter((row) => text(row, column));
    const blank = rows.filter((row) => !text(row, column)); // last, whatever the direction
    full.sort((a, b) => (up ? 1 : -1) * order(text(a, column), text(b, column)));
    table.tBodies[0].append(...full, ...blank);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.ariaSort = up ? "ascending" : "descending";
  }

  for (const table of document.querySelectorAll(".tag_stacked table")) {
    const names = [...table.tHead.rows[0].cells].map((head) => head.textContent.trim());
    for (const row of table.tBodies[0].rows) {
      for (const cell of row.cells) cell.dataset.name = names[cell.cellIndex];
    }
  }

  for (const table of document.querySelectorAll(".tag_sortable table")) {
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, head));
      head.append(button);
    }
  }
});
