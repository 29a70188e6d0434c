/* Small line and bar charts in SVG. */

/** Round numbers from low to high, with at most `count` steps, and the number of decimals that they need. */
tlc.ticks = (low, high, count) => {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((candidate) => span / candidate <= count);
  const [first, last] = [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step === 2.5 * power ? 1 : 0));
  return { ticks: Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step), digits };
};

/** Make axes; x (whole numbers) and y are {low, high, label}. y has a margin, except that it starts at 0 if low is 0. */
tlc.axes = ({ width = 480, height = 280, x, y, description }) => {
  const [left, right, top, bottom] = [66, width - 10, 10, height - 40];
  const margin = 0.04 * (y.high - y.low || 1);
  const [floor, ceiling] = [y.low === 0 ? 0 : y.low - margin, y.high + margin];
  const vertical = tlc.ticks(floor, ceiling, 6);
  const at = {
    x: (value) => left + ((value - x.low) / (x.high - x.low || 1)) * (right - left),
    y: (value) => bottom - ((value - floor) / (ceiling - floor)) * (bottom - top),
  };
  const svg = tlc.svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": description });
  const marks = tlc.svg("g");
  for (const value of vertical.ticks) {
    svg.append(
      tlc.svg("line", { class: "grid", x1: left, x2: right, y1: at.y(value), y2: at.y(value) }),
      tlc.svg("text", { x: left - 7, y: at.y(value) + 4, "text-anchor": "end" }, tlc.number(value, vertical.digits)),
    );
  }
  const horizontal = tlc.ticks(x.low, x.high, 7).ticks.filter(Number.isInteger);
  for (const value of horizontal) {
    svg.append(tlc.svg("text", { x: at.x(value), y: bottom + 17, "text-anchor": "middle" }, `${value}`));
  }
  const middle = (top + bottom) / 2;
  svg.append(
    marks,
    tlc.svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    tlc.svg("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, x.label),
    tlc.svg("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, y.label),
  );
  /** Call move(x, y) in the chart's numbers where the pointer goes, and click(x, y) where it clicks. */
  const onmove = (move, click = () => {}) => {
    const inNumbers = (event, then) => {
      const bounds = svg.getBoundingClientRect();
      const [px, py] = [((event.clientX - bounds.left) / bounds.width) * width, ((event.clientY - bounds.top) / bounds.height) * height];
      if (px < left || px > right || py < top || py > bottom) return;
      then(x.low + ((px - left) / (right - left)) * (x.high - x.low), floor + ((bottom - py) / (bottom - top)) * (ceiling - floor));
    };
    svg.addEventListener("pointermove", (event) => inNumbers(event, move));
    svg.addEventListener("pointerdown", (event) => inNumbers(event, move));
    svg.addEventListener("click", (event) => inNumbers(event, click));
  };
  const clip = `clip-${(tlc.axes.serial = (tlc.axes.serial ?? 0) + 1)}`;
  svg.prepend(tlc.svg("clipPath", { id: clip }, tlc.svg("rect", { x: left, y: top, width: right - left, height: bottom - top })));
  marks.setAttribute("clip-path", `url(#${clip})`);
  return { svg, marks, at, onmove };
};

/** Make an area between two lines of [x, y] points. */
tlc.area = (at, low, high) => {
  const corners = [...high, ...[...low].reverse()].filter(([, y]) => y !== null);
  return tlc.svg("polygon", { class: "area", points: corners.map(([x, y]) => `${at.x(x).toFixed(1)},${at.y(y).toFixed(1)}`).join(" ") });
};

/** Make a line through [x, y] points, with a gap where y is undefined. */
tlc.line = (at, points, kind) => {
  let pen = "M";
  let path = "";
  for (const [x, y] of points) {
    if (y === null) pen = "M";
    else {
      path += `${pen}${at.x(x).toFixed(1)} ${at.y(y).toFixed(1)}`;
      pen = "L";
    }
  }
  return tlc.svg("path", { class: `line ${kind}`, d: path });
};

/** The lowest and highest of the defined numbers and `include`. */
tlc.extent = (values, include = []) => {
  const defined = values.filter((value) => value !== null).concat(include);
  return defined.length ? { low: Math.min(...defined), high: Math.max(...defined) } : { low: 0, high: 1 };
};
