"use strict";

// The score under the pointer, or under a cursor that arrow keys move. Its text is that of the lists.
const lists = [...document.querySelectorAll("ol.experts")];
const columns = Math.max(...lists.map((list) => list.children.length));
for (const map of document.querySelectorAll("[data-box]")) {
  const [left, top, right, bottom] = map.dataset.box.split(" ").map(Number);
  const output = map.closest("figure").querySelector("output");
  const cursor = map.appendChild(document.createElement("div"));
  cursor.className = "cursor";
  cursor.hidden = true;
  map.tabIndex = 0;
  map.setAttribute("role", "application");
  map.setAttribute("aria-label", "scores by layer and expert: arrow keys move from one to the next");
  let row = 0, column = 0;
  const show = () => {
    const list = lists[row];
    column = Math.min(column, list.children.length - 1);
    cursor.hidden = false;
    cursor.style.left = `${100 * (left + ((right - left) * column) / columns)}%`;
    cursor.style.top = `${100 * (top + ((bottom - top) * row) / lists.length)}%`;
    cursor.style.width = `${(100 * (right - left)) / columns}%`;
    cursor.style.height = `${(100 * (bottom - top)) / lists.length}%`;
    output.textContent = `layer ${list.dataset.label}, expert ${column}: ${list.children[column].textContent}`;
  };
  map.addEventListener("pointermove", (event) => {
    const area = map.getBoundingClientRect();
    const x = ((event.clientX - area.left) / area.width - left) / (right - left);
    const y = ((event.clientY - area.top) / area.height - top) / (bottom - top);
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return;
    row = Math.floor(y * lists.length);
    column = Math.floor(x * columns);
    show();
  });
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  map.addEventListener("keydown", (event) => {
    if (event.key === "Home") column = 0;
    else if (event.key === "End") column = columns - 1;
    else if (event.key in steps) {
      row = Math.min(lists.length - 1, Math.max(0, row + steps[event.key][0]));
      column = Math.min(columns - 1, Math.max(0, column + steps[event.key][1]));
    } else return;
    event.preventDefault();
    show();
  });
  map.addEventListener("focus", () => map.matches(":focus-visible") && show());
}

// Tables are sorted by the column whose heading is pressed, numbers as numbers.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, at) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[at];
        if (!("value" in cell.dataset)) return cell.textContent;
        const value = Number(cell.dataset.value);
        return Number.isNaN(value) ? -Infinity : value;
      };
      const order = (a, b) => {
        const [one, other] = [key(a), key(b)];
        if (typeof one === "string") return one.localeCompare(other, undefined, { numeric: true });
        return one === other ? 0 : one - other; // of two infinities
      };
      const rows = [...table.tBodies[0].rows].sort(order);
      table.tBodies[0].append(...(ascending ? rows : rows.reverse()));
    });
  });
}
