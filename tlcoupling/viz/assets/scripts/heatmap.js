/* Heat maps: a raster of cells, and a pane with labelled axes around it that shows a window of the cells. */

/** Words for cells whose bases have nearly equal singular values. */
tlc.undeterminedBases = {
  readout: "; bases not determined: their singular values nearly coincide",
  swatch: ["dotted", "dot: bases not determined, singular values nearly coincide"],
};

/** The quantities of a comparison, in the order of their switch. */
tlc.quantities = { excess: "excess", coupling: "coupling", null: "null", z: "excess / null’s σ" };

/** Make a switch of quantities that calls choose(quantity). */
tlc.quantitySwitch = (name, choose) =>
  Object.entries(tlc.quantities).map(([value, text], i) => {
    const input = tlc.html("input", { type: "radio", name, value });
    input.checked = i === 0;
    input.addEventListener("change", () => choose(value));
    return tlc.html("label", {}, input, text);
  });

/** The four numbers of a cell of coupling; a number that is null is not defined. */
tlc.comparison = (coupling, random, std) => {
  const excess = coupling === null || random === null ? null : coupling - random;
  return { coupling, null: random, excess, z: excess === null || !std ? null : excess / std };
};

/**
 * The numbers of one quantity in a matrix of coupling whose rows have a null: (row, column) -> number, or null.
 * values, random and std are parts of arrays.
 */
tlc.quantityOf = (quantity, values, random, std) => {
  const n = random.length;
  const defined = (number) => (Number.isFinite(number) ? number : null);
  return {
    coupling: (r, c) => defined(values[r * n + c]),
    null: (r) => defined(random[r]),
    excess: (r, c) => defined(values[r * n + c] - random[r]),
    z: (r, c) => defined((values[r * n + c] - random[r]) / std[r]),
  }[quantity];
};

/** Format a quantity with the digits that the page has of it. */
tlc.quantity = (name, value, digits = 4) => tlc.number(value, name === "z" ? 1 : digits);

/** All numbers of a cell in words. */
tlc.inWords = (cell, digits) =>
  Object.keys(tlc.quantities)
    .filter((name) => name in cell)
    .map((name) => `${name} ${tlc.quantity(name, cell[name], digits)}`)
    .join(", ") + (cell.undetermined ? tlc.undeterminedBases.readout : "");

/** Collect numbers for one colour scale; a limit of at least a little keeps rounding white. */
tlc.range = () => {
  let [low, high, undefinedCells] = [0, 0, false];
  return {
    add(value) {
      if (value === undefined) return;
      undefinedCells ||= value === null;
      low = Math.min(low, value ?? 0);
      high = Math.max(high, value ?? 0);
    },
    result: () => ({ low, high, undefinedCells, limit: Math.max(-low, high) || 1 }),
  };
};

/**
 * Draw valueAt(row, column) of a window {row, column, size} in the colours of scale; return the image as a data URL.
 * Undefined cells are neutral. More than `most` cells a side are pooled: a pixel is the mean of its cells.
 * dotted(row, column): whether a cell has a dot.
 */
tlc.raster = (view, valueAt, scale, dotted = () => false, most = 512) => {
  const pooled = Math.ceil(view.size / most);
  const n = Math.ceil(view.size / pooled);
  const pixels = Math.max(1, Math.min(8, Math.floor(512 / n)));
  const side = n * pixels;
  const [neutral, border, centre] = tlc.outside();
  const canvas = tlc.html("canvas", { width: side, height: side });
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  const fill = (x, y, size, [red, green, blue]) => {
    for (let i = y; i < y + size; i += 1)
      for (let at = 4 * (i * side + x), end = at + 4 * size; at < end; at += 4) {
        image.data[at] = red;
        image.data[at + 1] = green;
        image.data[at + 2] = blue;
        image.data[at + 3] = 255;
      }
  };
  const meanOf = (r, c) => {
    if (pooled === 1) return valueAt(view.row + r, view.column + c);
    let sum = 0;
    let count = 0;
    for (let i = r * pooled; i < Math.min((r + 1) * pooled, view.size); i += 1)
      for (let j = c * pooled; j < Math.min((c + 1) * pooled, view.size); j += 1) {
        const value = valueAt(view.row + i, view.column + j);
        if (value === undefined || value === null) continue;
        sum += value;
        count += 1;
      }
    return count ? sum / count : undefined;
  };
  for (let r = 0; r < n; r += 1) {
    for (let c = 0; c < n; c += 1) {
      const value = meanOf(r, c);
      fill(c * pixels, r * pixels, pixels, value === undefined ? neutral : scale.channels(value));
      if (value === undefined || pixels < 8 || pooled > 1 || !dotted(view.row + r, view.column + c)) continue;
      [border, centre].forEach((color, i) => fill(c * pixels + 2 + i, r * pixels + 2 + i, 4 - 2 * i, color));
    }
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
};

/** The window of n rows and columns that several panes show: they zoom and move together. */
tlc.view = (n) => ({
  n,
  row: 0,
  column: 0,
  size: n,
  listeners: [],

  /** Show `size` rows and columns around a cell, or all of them. */
  zoom(size, [r, c]) {
    this.size = Math.max(Math.min(Math.round(size), n), Math.min(8, n));
    this.move(r - Math.floor(this.size / 2), c - Math.floor(this.size / 2));
  },

  move(row, column) {
    const within = (i) => Math.max(0, Math.min(i, n - this.size));
    [this.row, this.column] = [within(row), within(column)];
    this.listeners.forEach((listen) => listen());
  },

  /** Move so far that a cell is in sight. */
  reveal(r, c) {
    const to = (from, i) => (i < from ? i : i >= from + this.size ? i - this.size + 1 : from);
    const [row, column] = [to(this.row, r), to(this.column, c)];
    if (row !== this.row || column !== this.column) this.move(row, column);
  },
});

/** Make the buttons of a view; current() is the cell to zoom in on. */
tlc.viewButtons = (view, current) => {
  const middle = () => current() ?? [view.row + view.size / 2, view.column + view.size / 2].map(Math.floor);
  const button = (text, name, run) => tlc.html("button", { type: "button", "aria-label": name, title: name, onclick: run }, text);
  return tlc.html(
    "span",
    { class: "zooming", role: "group", "aria-label": "Zoom" },
    button("+", "Zoom in (key +)", () => view.zoom(view.size / 2, middle())),
    button("−", "Zoom out (key −)", () => view.zoom(view.size * 2, middle())),
    button("all", "Show all (key 0)", () => view.zoom(view.n, [0, 0])),
  );
};

/**
 * A square pane whose rows and columns have the same labels.
 * labels: of rows and columns; axes: {row, column} titles; turned: whether labels are long, and vertical below the columns;
 * view: the window that it shows; onpoint(row, column): called when the pointer or a key reaches a cell;
 * onchoose(row, column): on a click or Enter; kinds: a number for each row and column, which has a mark of that kind (none below 0).
 */
tlc.heatmap = ({ labels, axes, label, kinds = [], turned = false, side = 254, view = tlc.view(labels.length), onpoint, onchoose = () => {} }) => {
  const small = turned && innerWidth < 480; // a shrunk pane has fewer and larger labels
  const longest = labels.reduce((most, text) => Math.max(most, text.length), 0);
  const margin = turned ? Math.min(40 + (small ? 9.5 : 5.8) * longest, 150) : 46;
  const [left, top, width, height] = [margin, 4, margin + side + 4, side + margin + 4];
  const image = tlc.svg("image", { x: left, y: top, width: side, height: side, preserveAspectRatio: "none" });
  const cross = tlc.svg("g", { class: "cross", visibility: "hidden" });
  const [row, column, box] = ["band", "band", "box"].map((kind) => tlc.svg("rect", { class: kind }));
  cross.append(row, column, box);
  const [names, marks] = [tlc.svg("g"), tlc.svg("g")];
  const svg = tlc.svg("svg", { viewBox: `0 0 ${width} ${height}`, class: `heatmap${small ? " small" : ""}`, role: "img", "aria-label": label }, image);
  const middle = (from) => from + side / 2;
  svg.append(
    names,
    tlc.svg("text", { x: middle(left), y: height - 4, "text-anchor": "middle" }, axes.column),
    tlc.svg("text", { x: 12, y: middle(top), "text-anchor": "middle", transform: `rotate(-90 12 ${middle(top)})` }, axes.row),
    marks,
    cross,
  );
  const shown = { cell: null, chosen: -1, paint: null };
  const cellSide = () => side / view.size;

  const drawNames = () => {
    const cell = cellSide();
    const every = turned ? Math.ceil((small ? 19 : 11) / cell) : ([1, 2, 5, 10, 20, 50].find((step) => view.size / step <= 7) ?? 100);
    const texts = [];
    for (let i = 0; i < view.size; i += every) {
      const offset = (i + 0.5) * cell;
      texts.push(tlc.svg("text", { x: left - 5, y: top + offset + 4, "text-anchor": "end" }, labels[view.row + i]));
      const [x, y] = [left + offset + (turned ? 4 : 0), top + side + (turned ? 6 : 15)];
      const turn = turned ? { transform: `rotate(-90 ${x} ${y})`, "text-anchor": "end" } : { "text-anchor": "middle" };
      texts.push(tlc.svg("text", { x, y, ...turn }, labels[view.column + i]));
    }
    kinds.forEach((kind, i) => {
      if (kind < 0) return;
      const [r, c] = [i - view.row, i - view.column];
      const mark = (x, y, width, height) => texts.push(tlc.svg("rect", { class: `kind-${kind % 4}`, x, y, width, height }));
      if (r >= 0 && r < view.size) mark(left - 4, top + r * cell, 3, cell);
      if (c >= 0 && c < view.size) mark(left + c * cell, top + side + 1, cell, 3);
    });
    names.replaceChildren(...texts);
  };

  const locate = (event, then) => {
    const bounds = svg.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) / bounds.width) * width;
    const y = ((event.clientY - bounds.top) / bounds.height) * height;
    const [r, c] = [Math.floor((y - top) / cellSide()), Math.floor((x - left) / cellSide())];
    if (r >= 0 && r < view.size && c >= 0 && c < view.size) then(view.row + r, view.column + c);
  };

  let drag = null; // where a drag began, in cells; it moves the window
  svg.addEventListener("pointerdown", (event) => {
    locate(event, (r, c) => {
      drag = { r, c, moved: false };
      onpoint(r, c);
    });
  });
  svg.addEventListener("pointermove", (event) =>
    locate(event, (r, c) => {
      if (event.buttons === 1 && drag && view.size < view.n && (r !== drag.r || c !== drag.c)) {
        drag.moved = true;
        view.move(view.row + drag.r - r, view.column + drag.c - c);
      } else onpoint(r, c);
    }),
  );
  svg.addEventListener("click", (event) => locate(event, (r, c) => drag?.moved || onchoose(r, c)));
  svg.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return; // a plain wheel scrolls the page
      event.preventDefault();
      locate(event, (r, c) => view.zoom(view.size * (event.deltaY < 0 ? 0.5 : 2), [r, c]));
    },
    { passive: false },
  );

  const setRect = (rect, x, y, w, h) =>
    Object.entries({ x, y, width: w, height: h }).forEach(([name, value]) => rect.setAttribute(name, value));

  const drawMarks = () => {
    const cell = cellSide();
    const inside = (i, from) => i >= from && i < from + view.size;
    if (shown.cell) {
      const [r, c] = [shown.cell[0] - view.row, shown.cell[1] - view.column];
      setRect(row, left, top + r * cell, side, cell);
      setRect(column, left + c * cell, top, cell, side);
      setRect(box, left + c * cell, top + r * cell, cell, cell);
      const seen = inside(shown.cell[0], view.row) && inside(shown.cell[1], view.column);
      cross.setAttribute("visibility", seen ? "visible" : "hidden");
    }
    marks.replaceChildren();
    if (inside(shown.chosen, view.row)) {
      const mark = tlc.svg("rect", { class: "chosen" });
      setRect(mark, left - 3, top + (shown.chosen - view.row) * cell, 3, cell);
      marks.append(mark);
    }
    if (inside(shown.chosen, view.column)) {
      const mark = tlc.svg("rect", { class: "chosen" });
      setRect(mark, left + (shown.chosen - view.column) * cell, top + side, cell, 3);
      marks.append(mark);
    }
  };

  const draw = () => {
    drawNames();
    drawMarks();
    if (shown.paint) image.setAttribute("href", tlc.raster(view, ...shown.paint));
  };
  view.listeners.push(draw);
  drawNames();

  return {
    node: svg,

    paint(...paint) {
      shown.paint = paint;
      image.setAttribute("href", tlc.raster(view, ...paint));
    },

    /** Point at a cell. */
    point(r, c) {
      shown.cell = [r, c];
      drawMarks();
    },

    /** Mark the selected row and column; clear the mark if it is not on the axes. */
    mark(i) {
      shown.chosen = i;
      drawMarks();
    },
  };
};

/** Arrow keys move the current cell [row, column] of a view; Enter and the space bar select it; +, − and 0 zoom. */
tlc.cellKeys = (view, current, onpoint, onchoose) => (event) => {
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const within = (i) => Math.min(Math.max(i, 0), view.n - 1);
  const cell = current();
  const [r, c] = cell ?? [view.row, view.column + 1];
  if (event.key in arrows) {
    const [down, right] = arrows[event.key];
    const [row, column] = [within(r + down), within(c + right)];
    view.reveal(row, column);
    onpoint(row, column);
  } else if ((event.key === "Enter" || event.key === " ") && cell) onchoose(...cell);
  else if (event.key === "+" || event.key === "=") view.zoom(view.size / 2, [r, c]);
  else if (event.key === "-") view.zoom(view.size * 2, [r, c]);
  else if (event.key === "0") view.zoom(view.n, [0, 0]);
  else return;
  event.preventDefault();
};

/**
 * Make a colour bar for a scale that starts at 0 or below, with a title and samples of the colours outside the scale.
 * marks: pairs of value and text, drawn on the bar.
 */
tlc.scaleBar = ({ low, high, scale, title, swatches, marks = [] }) => {
  const span = high - low || 1;
  const labels = low < 0 && -low > 0.08 * span ? [[0, tlc.number(low, 3)]] : [];
  labels.push([-low / span, "0"], [1, tlc.number(high, 3)]);
  const bar = tlc.colorbar({ low, high, color: scale, labels, description: `Colour scale from ${tlc.number(low)} to ${tlc.number(high)}` });
  for (const [value, text] of marks) {
    const mark = tlc.html("b", { class: "null-mark", title: text }, text);
    mark.style.left = `${(100 * (value - low)) / span}%`;
    bar.append(mark);
  }
  return [
    tlc.html("span", { class: "label" }, title),
    bar,
    ...swatches.map(([kind, text]) => tlc.html("span", { class: "label" }, tlc.html("i", { class: `swatch ${kind}` }), text)),
  ];
};
