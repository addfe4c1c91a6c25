"""Tables that sort themselves on a click: one short script inside the page, which asks for nothing from outside."""

from __future__ import annotations

STYLE = """
th button { all: unset; cursor: pointer; font: inherit; white-space: nowrap; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th button::after { content: "\\2195"; opacity: .35; margin-left: .3em; }
th[aria-sort="ascending"] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\2193"; opacity: 1; }
body { max-width: 96rem; }
table.tries td { max-width: 30rem; }
table.tries th, table.tries td { padding: .3rem .45rem; }
table.tries td:nth-child(-n+5), td:first-child { white-space: nowrap; }
tr.theirs td { color: var(--soft); font-style: italic; }
"""
# A number sorts as one, and starts with the largest, as one wants to see scores; an empty cell is last both ways.
SCRIPT = """
document.querySelectorAll("table").forEach((table) => {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const whose = heads.findIndex((head) => head.textContent.trim() === "whose");
  table.classList.toggle("tries", whose >= 0);
  for (const row of body.rows)
    row.classList.toggle("theirs", whose >= 0 && row.cells[whose].textContent.trim() === "theirs");
  if (body.rows.length < 3) return;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const numeric = head.classList.contains("number");
    const value = (row) => {
      const text = row.cells[column].textContent.trim();
      return numeric && text !== "" ? parseFloat(text) : text.toLowerCase();
    };
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
});
"""


def sortable(page: str) -> str:
    """A page of `html.page` whose tables of three rows and more sort by a click on a column's name; without scripts it
    is as before.
    """
    head, _, rest = page.partition("</style>")
    body, _, end = rest.rpartition("</body>")
    return f"{head}{STYLE}</style>{body}<script>{SCRIPT}</script>\n</body>{end}"
