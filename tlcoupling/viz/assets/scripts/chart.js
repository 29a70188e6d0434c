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
  const [left, right, top, bottom] = [52, width - 10, 10, height - 40];
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
  return { svg, marks, at };
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
