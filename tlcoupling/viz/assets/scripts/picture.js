/* The image whose patches are the tokens: a grid of cells over its pixels, in the colours of some numbers. */

/**
 * data: {shape: [row, column, channel], data, patches: [position, row, column] of each}; onpoint(position) and
 * onchoose(position) are called as those of a heat map. Return {node, paint(valueAt(position), scale), point, mark}.
 */
tlc.picture = (data, { onpoint, onchoose }) => {
  const [height, width, channels] = data.shape;
  const bytes = tlc.bytes(data.data);
  const canvas = tlc.html("canvas", { width, height });
  const image = canvas.getContext("2d").createImageData(width, height);
  for (let i = 0; i < height * width; i += 1)
    for (let c = 0; c < 4; c += 1) image.data[4 * i + c] = c === 3 ? 255 : bytes[channels * i + (channels === 1 ? 0 : c)];
  canvas.getContext("2d").putImageData(image, 0, 0);

  const size = (axis) => Math.max(...data.patches.map((patch) => patch[axis])) + 1;
  const [rows, columns] = [size(1), size(2)];
  const svg = tlc.svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "picture", role: "img", "aria-label": `The image, ${rows} by ${columns} patches` });
  svg.append(tlc.svg("image", { width, height, preserveAspectRatio: "none", href: canvas.toDataURL() }));
  const cells = new Map(
    data.patches.map(([position, row, column]) => [
      position,
      tlc.svg("rect", { class: "patch", x: (column * width) / columns, y: (row * height) / rows, width: width / columns, height: height / rows }),
    ]),
  );
  const marks = tlc.svg("g");
  svg.append(...cells.values(), marks);
  const shown = { pointed: null, chosen: null };
  const drawMarks = () => {
    const outlines = ["chosen", "pointed"].flatMap((kind) => {
      const cell = cells.get(shown[kind])?.cloneNode();
      cell?.setAttribute("class", `outline ${kind}`);
      cell?.removeAttribute("style");
      return cell ? [cell] : [];
    });
    marks.replaceChildren(...outlines);
  };
  for (const [position, cell] of cells) {
    cell.addEventListener("pointerenter", () => onpoint(position));
    cell.addEventListener("click", () => onchoose(position));
  }
  const keydown = (event) => {
    const step = { ArrowUp: -columns, ArrowDown: columns, ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") onchoose(shown.pointed ?? shown.chosen);
    else if (!step) return;
    else {
      const from = [shown.pointed, shown.chosen, data.patches[0][0]].find((position) => cells.has(position));
      if (cells.has(from + step)) onpoint(from + step);
    }
    event.preventDefault();
  };
  const label = "The image: arrow keys move between patches, Enter selects one";
  return {
    node: tlc.html("div", { class: "zoom", tabindex: 0, role: "group", "aria-label": label, onkeydown: keydown }, svg),

    /** Lay the colours of numbers over the patches; a patch without a number stays bare. */
    paint(valueAt, scale) {
      for (const [position, cell] of cells) {
        const value = valueAt(position);
        cell.style.fill = value === undefined ? "transparent" : scale(value);
      }
    },

    point(position) {
      shown.pointed = position;
      drawMarks();
    },

    mark(position) {
      shown.chosen = position;
      drawMarks();
    },
  };
};
