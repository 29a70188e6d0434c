/* One pane of a layer x layer heat map: row, the layer that gives the Jacobian; column, the layer that gives the bases. */

tlc.heatmap = ({ layers, label, onpoint }) => {
  const [left, top, side, width, height] = [42, 4, 254, 300, 300];
  const [n, cell] = [layers.length, side / layers.length];
  const every = [1, 2, 5, 10, 20, 50].find((step) => n / step <= 7) ?? 100;
  const image = tlc.svg("image", { x: left, y: top, width: side, height: side, preserveAspectRatio: "none" });
  const cross = tlc.svg("g", { class: "cross", visibility: "hidden" });
  const [row, column, box] = ["band", "band", "box"].map((kind) => tlc.svg("rect", { class: kind }));
  cross.append(row, column, box);
  const svg = tlc.svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "heatmap", role: "img", "aria-label": label }, image);
  const middle = (from) => from + side / 2;
  for (let i = 0; i < n; i += every) {
    const offset = (i + 0.5) * cell;
    svg.append(
      tlc.svg("text", { x: left - 5, y: top + offset + 4, "text-anchor": "end" }, `${layers[i]}`),
      tlc.svg("text", { x: left + offset, y: top + side + 15, "text-anchor": "middle" }, `${layers[i]}`),
    );
  }
  svg.append(
    tlc.svg("text", { x: middle(left), y: height - 6, "text-anchor": "middle" }, "bases of layer"),
    tlc.svg("text", { x: 14, y: middle(top), "text-anchor": "middle", transform: `rotate(-90 14 ${middle(top)})` }, "Jacobian of layer"),
    cross,
  );

  const locate = (event) => {
    const bounds = svg.getBoundingClientRect();
    const [x, y] = [
      ((event.clientX - bounds.left) / bounds.width) * width,
      ((event.clientY - bounds.top) / bounds.height) * height,
    ];
    const [l, m] = [Math.floor((y - top) / cell), Math.floor((x - left) / cell)];
    if (l >= 0 && l < n && m >= 0 && m < n) onpoint(l, m);
  };
  svg.addEventListener("pointermove", locate);
  svg.addEventListener("pointerdown", locate);

  return {
    node: svg,

    /** Paint valueAt(row, column) in the colours of scale; what it leaves undefined is neutral. */
    paint(valueAt, scale) {
      const [pixels, neutral] = [8, tlc.neutral()];
      const canvas = tlc.html("canvas", { width: n * pixels, height: n * pixels });
      const context = canvas.getContext("2d");
      for (let l = 0; l < n; l += 1) {
        for (let m = 0; m < n; m += 1) {
          const value = valueAt(l, m);
          context.fillStyle = value === undefined ? neutral : scale(value);
          context.fillRect(m * pixels, l * pixels, pixels, pixels);
        }
      }
      image.setAttribute("href", canvas.toDataURL());
    },

    /** Mark a cell. */
    point(l, m) {
      const place = (rect, x, y, w, h) =>
        Object.entries({ x, y, width: w, height: h }).forEach(([name, value]) => rect.setAttribute(name, value));
      place(row, left, top + l * cell, side, cell);
      place(column, left + m * cell, top, cell, side);
      place(box, left + m * cell, top + l * cell, cell, cell);
      cross.setAttribute("visibility", "visible");
    },
  };
};
