"use strict";

// -- sorting ------------------------------------------------------------------------------------

function sortValue(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value === undefined) return cell.textContent;
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // empty cells stay below
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const numeric = head.classList.contains("number");
  const direction = head.getAttribute("aria-sort");
  const ascending = direction === "none" ? !numeric : direction === "descending";
  for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("heading"));
    const key = (row) => sortValue(row, column);
    rows.sort((a, b) => compare(key(a), key(b), ascending ? 1 : -1));
    body.append(...rows);
  }
}

document.addEventListener("click", (event) => {
  const head = event.target.closest(".sortable th[aria-sort]");
  if (head && event.target.closest("button")) sortBy(head);
});
