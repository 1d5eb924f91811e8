// A field filters what its data-filters names; a click on a heading sorts its table.
for (const field of document.querySelectorAll("input[data-filters]")) {
  const items = [...document.querySelectorAll(field.dataset.filters)];
  const count = document.getElementById(field.getAttribute("aria-describedby"));
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    let shown = 0;
    for (const item of items) {
      item.hidden = !item.textContent.toLowerCase().includes(wanted);
      shown += !item.hidden;
    }
    count.textContent = wanted ? `${shown} of ${items.length}` : "";
  });
}
for (const heading of document.querySelectorAll("th")) {
  const button = heading.querySelector("button");
  if (!button) continue;
  button.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const place = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent;
    const order = (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
    const byNumber = (a, b) => Number(value(a)) - Number(value(b));
    const numeric = [...body.rows].every((row) => !Number.isNaN(Number(value(row))));
    const rows = [...body.rows].sort(numeric ? byNumber : order);
    body.append(...(down ? rows.reverse() : rows));
  });
}
