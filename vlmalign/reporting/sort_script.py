"""The one script of the completions pages: a click on a column's heading sorts the completions of every prompt by it.

Without it the page is whole, in the order of sampling. The page's security policy allows this script alone, by its hash.
"""

from __future__ import annotations

from markupsafe import Markup

from vlmalign.reporting.pages import allowed

# Headings become buttons only here: without the script they would be buttons that do nothing. Numbers that are not
# there (data-value="") go last in both directions.
_SOURCE = """
(() => {
  const tables = [...document.querySelectorAll("table.answers")];
  const said = document.getElementById("sorted");
  const orders = { descending: "highest first", ascending: "lowest first" };
  const state = { column: -1, order: "none" };

  function value(row, column) {
    const text = row.cells[column].dataset.value;
    return text === "" ? null : Number(text);
  }

  function compare(first, second) {
    const [a, b] = [value(first, state.column), value(second, state.column)];
    if (a === null || b === null) return (a === null) - (b === null);
    return state.order === "ascending" ? a - b : b - a;
  }

  function sort(column, name) {
    const next = { none: "descending", descending: "ascending", ascending: "none" };
    state.order = column === state.column ? next[state.order] : "descending";
    state.column = column;
    for (const table of tables) {
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => a.dataset.place - b.dataset.place);
      if (state.order !== "none") rows.sort(compare);
      body.append(...rows);
      for (const heading of table.tHead.rows[0].cells) {
        if (heading.cellIndex === column && state.order !== "none") heading.setAttribute("aria-sort", state.order);
        else heading.removeAttribute("aria-sort");
      }
    }
    said.textContent = state.order === "none"
      ? "Completions are in the order of sampling."
      : "Completions of every prompt are sorted by " + name + ", " + orders[state.order] + ".";
  }

  for (const table of tables) {
    for (const heading of table.querySelectorAll("th[data-sort]")) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      const name = button.textContent;
      const column = heading.cellIndex;
      button.addEventListener("click", () => sort(column, name));
      heading.append(button);
    }
  }
  if (tables.length) {
    said.textContent = "Click a heading to sort by it.";
    said.hidden = false;
  }
})();
"""

SCRIPT = Markup(_SOURCE)
ALLOWED = allowed(_SOURCE)
