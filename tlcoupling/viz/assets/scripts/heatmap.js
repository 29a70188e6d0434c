/* Heat maps: a raster of cells, and a pane with labelled axes around it. */

/** Words for cells whose bases have nearly equal singular values. */
tlc.undeterminedBases = {
  readout: "; the bases are not determined: their singular values nearly coincide",
  swatch: ["dotted", "dot: bases not determined, singular values nearly coincide"],
};

/**
 * Draw valueAt(row, column) in the colours of scale; return the image as a data URL. Undefined cells are neutral.
 * dotted(row, column): whether a cell has a dot.
 */
tlc.raster = (rows, columns, valueAt, scale, dotted = () => false) => {
  const [pixels, neutral, dot] = [8, tlc.neutral(), tlc.dot()];
  const canvas = tlc.html("canvas", { width: columns * pixels, height: rows * pixels });
  const context = canvas.getContext("2d");
  for (let r = 0; r < rows; r += 1) {
    for (let c = 0; c < columns; c += 1) {
      const value = valueAt(r, c);
      context.fillStyle = value === undefined ? neutral : scale(value);
      context.fillRect(c * pixels, r * pixels, pixels, pixels);
      if (value === undefined || !dotted(r, c)) continue;
      dot.forEach((color, i) => {
        context.fillStyle = color;
        context.fillRect(c * pixels + 2 + i, r * pixels + 2 + i, 4 - 2 * i, 4 - 2 * i);
      });
    }
  }
  return canvas.toDataURL();
};

/**
 * A square pane whose rows and columns have the same labels.
 * labels: of rows and columns; axes: {row, column} titles; turned: whether labels are long, and vertical below the columns;
 * onpoint(row, column): called when the pointer or a key reaches a cell; onchoose(row, column): on a click or Enter.
 */
tlc.heatmap = ({ labels, axes, label, turned = false, side = 254, onpoint, onchoose = () => {} }) => {
  const small = turned && innerWidth < 480; // a shrunk pane has fewer and larger labels
  const longest = Math.max(...labels.map((text) => text.length));
  const margin = turned ? Math.min(34 + (small ? 9.5 : 5.8) * longest, 150) : 42;
  const [left, top, width, height] = [margin, 4, margin + side + 4, side + margin + 4];
  const [n, cell] = [labels.length, side / labels.length];
  const every = turned ? Math.ceil((small ? 19 : 11) / cell) : ([1, 2, 5, 10, 20, 50].find((step) => n / step <= 7) ?? 100);
  const image = tlc.svg("image", { x: left, y: top, width: side, height: side, preserveAspectRatio: "none" });
  const cross = tlc.svg("g", { class: "cross", visibility: "hidden" });
  const [row, column, box] = ["band", "band", "box"].map((kind) => tlc.svg("rect", { class: kind }));
  cross.append(row, column, box);
  const marks = tlc.svg("g");
  const svg = tlc.svg("svg", { viewBox: `0 0 ${width} ${height}`, class: `heatmap${small ? " small" : ""}`, role: "img", "aria-label": label }, image);
  const middle = (from) => from + side / 2;
  const text = (attributes, content) => svg.append(tlc.svg("text", attributes, content));
  for (let i = 0; i < n; i += every) {
    const offset = (i + 0.5) * cell;
    text({ x: left - 5, y: top + offset + 4, "text-anchor": "end" }, labels[i]);
    const [x, y] = [left + offset + (turned ? 4 : 0), top + side + (turned ? 6 : 15)];
    const turn = turned ? { transform: `rotate(-90 ${x} ${y})`, "text-anchor": "end" } : { "text-anchor": "middle" };
    text({ x, y, ...turn }, labels[i]);
  }
  text({ x: middle(left), y: height - 6, "text-anchor": "middle" }, axes.column);
  text({ x: 14, y: middle(top), "text-anchor": "middle", transform: `rotate(-90 14 ${middle(top)})` }, axes.row);
  svg.append(marks, cross);

  const locate = (event, then) => {
    const bounds = svg.getBoundingClientRect();
    const [x, y] = [
      ((event.clientX - bounds.left) / bounds.width) * width,
      ((event.clientY - bounds.top) / bounds.height) * height,
    ];
    const [r, c] = [Math.floor((y - top) / cell), Math.floor((x - left) / cell)];
    if (r >= 0 && r < n && c >= 0 && c < n) then(r, c);
  };
  svg.addEventListener("pointermove", (event) => locate(event, onpoint));
  svg.addEventListener("pointerdown", (event) => locate(event, onpoint));
  svg.addEventListener("click", (event) => locate(event, onchoose));

  const setRect = (rect, x, y, w, h) =>
    Object.entries({ x, y, width: w, height: h }).forEach(([name, value]) => rect.setAttribute(name, value));

  return {
    node: svg,

    paint(valueAt, scale, dotted) {
      image.setAttribute("href", tlc.raster(n, n, valueAt, scale, dotted));
    },

    /** Point at a cell. */
    point(r, c) {
      setRect(row, left, top + r * cell, side, cell);
      setRect(column, left + c * cell, top, cell, side);
      setRect(box, left + c * cell, top + r * cell, cell, cell);
      cross.setAttribute("visibility", "visible");
    },

    /** Mark the selected row and column; clear the mark if it is not on the axes. */
    mark(i) {
      marks.replaceChildren();
      if (i < 0 || i >= n) return;
      const [across, down] = [tlc.svg("rect", { class: "chosen" }), tlc.svg("rect", { class: "chosen" })];
      setRect(across, left - 3, top + i * cell, 3, cell);
      setRect(down, left + i * cell, top + side, cell, 3);
      marks.append(across, down);
    },
  };
};

/** Arrow keys move the current cell [row, column] of n rows; Enter and the space bar select it. */
tlc.cellKeys = (n, current, onpoint, onchoose) => (event) => {
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const within = (i) => Math.min(Math.max(i, 0), n - 1);
  const cell = current();
  if (event.key in arrows) {
    const [r, c] = cell ?? [0, 1];
    onpoint(within(r + arrows[event.key][0]), within(c + arrows[event.key][1]));
  } else if ((event.key === "Enter" || event.key === " ") && cell) onchoose(...cell);
  else return;
  event.preventDefault();
};

/** Make a colour bar for a scale that starts at 0 or below, with a title and samples of the colours outside the scale. */
tlc.scaleBar = ({ low, high, scale, title, swatches }) => {
  const labels = low < 0 && -low > 0.08 * (high - low) ? [[0, tlc.number(low, 3)]] : [];
  labels.push([-low / (high - low || 1), "0"], [1, tlc.number(high, 3)]);
  return [
    tlc.html("span", { class: "label" }, title),
    tlc.colorbar({ low, high, color: scale, labels, description: `Colour scale from ${tlc.number(low)} to ${tlc.number(high)}` }),
    ...swatches.map(([kind, text]) => tlc.html("span", { class: "label" }, tlc.html("i", { class: `swatch ${kind}` }), text)),
  ];
};
