/* Elements, numbers and tables. Text enters the document as text, never as markup. */
"use strict";

const tlc = { sections: {} };

{
  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };

  tlc.html = (name, attributes = {}, ...children) =>
    fill(document.createElement(name), attributes, children);

  tlc.svg = (name, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

/** The element of a section with data-part="name". */
tlc.part = (section, name) => section.querySelector(`[data-part="${name}"]`);

/** Format a number; an undefined one (null in the data) is a dash. */
tlc.number = (value, digits = 4) =>
  value === null || value === undefined ? "–" : value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");

/** The mean of the numbers that are defined; null where none is. */
tlc.mean = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};

/** Text whose direction, right to left or left to right, does not leak into what stands beside it. */
tlc.isolated = (text) => `\u2068${text}\u2069`;

/** A token as it is named everywhere: its position and its text. */
tlc.named = (position, text) => `${position} “${tlc.isolated(text)}”`;

/** Make a table from rows of cells. The first cell names the row, the others are numbers. */
tlc.table = (columns, rows) => {
  const head = columns.map((name) => tlc.html("th", { scope: "col" }, name));
  const body = rows.map(([name, ...cells]) =>
    tlc.html(
      "tr",
      {},
      tlc.html("th", { scope: "row" }, name),
      ...cells.map((cell) => tlc.html("td", {}, cell)),
    ),
  );
  return tlc.html(
    "table",
    {},
    tlc.html("thead", {}, tlc.html("tr", {}, ...head)),
    tlc.html("tbody", {}, ...body),
  );
};

/** Make a legend with one sample per line or bar; entries are pairs of class and text. */
tlc.legend = (entries) =>
  entries.map(([kind, text]) => tlc.html("span", {}, tlc.html("i", { class: kind }), text));
