tlc.sections.growth = (section, data) => {
  const depth = data.depth;
  const logNorms = tlc.array(data.log_norms); // [depth, token]
  const n = data.tokens.length;
  const sinks = new Set(data.sinks);
  const readout = tlc.part(section, "readout");
  const shown = { layer: 0, token: 0, sinks: false, mark: () => {} };

  const pointNorm = (l, i) => {
    [shown.depth, shown.token] = [l, i];
    const value = logNorms.at(l, i);
    const norm = value === null ? "–" : tlc.number(Math.exp(value), 1);
    readout.textContent = `depth ${l}, token ${tlc.named(i, data.tokens[i])}: ln ‖x‖ ${tlc.number(value, 3)}, norm ${norm}${sinks.has(i) ? "; a sink" : ""}`;
    tlc.token.point(i);
  };

  const drawNorms = () => {
    const inSight = Array.from({ length: n }, (_, i) => i).filter((i) => shown.sinks || !sinks.has(i));
    const columns = Array.from({ length: n }, (_, i) => Array.from({ length: depth }, (_, l) => logNorms.at(l, i)));
    const { low, high } = tlc.extent(inSight.flatMap((i) => columns[i]));
    const { svg, marks, at, onmove } = tlc.axes({
      x: { low: 0, high: depth - 1, label: "depth l" },
      y: { low: Math.min(low, 0), high, label: "ln ‖xˡ‖" },
      description: "Logarithm of each token’s residual norm against depth, and the median over tokens",
    });
    const along = (values) => values.map((value, l) => [l, value]);
    const lines = columns.map((values, i) => tlc.line(at, along(values), `token${sinks.has(i) ? " sink" : ""}`));
    marks.append(...lines, tlc.line(at, along(data.median), "median"));
    shown.mark = (kind, position) => lines.forEach((line, i) => line.classList.toggle(kind, i === position));
    shown.mark("chosen", tlc.choice.token);
    const nearest = (x, y) => {
      const l = Math.max(0, Math.min(depth - 1, Math.round(x)));
      return [l, inSight.reduce((best, i) => (Math.abs(columns[i][l] - y) < Math.abs(columns[best][l] - y) ? i : best), inSight[0])];
    };
    onmove((x, y) => pointNorm(...nearest(x, y)), (x, y) => tlc.choice.set("token", nearest(x, y)[1]));
    tlc.part(section, "norms").replaceChildren(svg);
  };
  tlc.token.listeners.push((position) => shown.mark("pointed", position));
  tlc.choice.on(["token"], (position) => shown.mark("chosen", position));
  tlc.part(section, "norms").addEventListener("keydown", (event) => {
    const [l, i] = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key] ?? [0, 0];
    if (event.key === "Enter" || event.key === " ") tlc.choice.set("token", shown.token);
    else if (!l && !i) return;
    event.preventDefault();
    pointNorm(Math.max(0, Math.min(depth - 1, (shown.depth ?? depth - 1) + l)), Math.max(0, Math.min(n - 1, shown.token + i)));
  });
  const box = tlc.part(section, "sinks");
  box.parentElement.hidden = !sinks.size || sinks.size === n;
  box.addEventListener("change", () => {
    shown.sinks = box.checked;
    drawNorms();
  });
  if (sinks.size === n) shown.sinks = true;
  tlc.part(section, "norm-legend").append(
    ...tlc.legend([["token", "each token"], ["chosen", "selected token"], ["median", "median"]]),
  );

  const names = { attn: "attention", mlp: "MLP" };
  const shares = Object.keys(data.shares).length ? data.shares : { alpha: data.alpha };

  const drawShares = () => {
    const columns = Object.values(shares);
    const sum = (l, sign) => columns.reduce((total, share) => total + Math.max(sign * (share[l] ?? 0), 0), 0);
    const tops = data.alpha.map((_, l) => sum(l, 1));
    const bottoms = data.alpha.map((_, l) => -sum(l, -1));
    const { low, high } = tlc.extent([...tops, ...bottoms], [0]);
    const { svg, marks, at, onmove } = tlc.axes({
      x: { low: -0.5, high: depth - 1.5, label: "layer l" },
      y: { low, high, label: "growth of ln ‖x‖" },
      description: "Growth of the logarithm of the norm in each layer, by attention and MLP",
    });
    const width = Math.max((at.x(1) - at.x(0)) * 0.8, 1);
    data.alpha.forEach((_, l) => {
      const ends = { up: 0, down: 0 };
      for (const [name, share] of Object.entries(shares)) {
        if (share[l] === null) continue;
        const side = share[l] >= 0 ? "up" : "down";
        const [from, to] = [ends[side], ends[side] + share[l]];
        ends[side] = to;
        const y = at.y(Math.max(from, to));
        marks.append(
          tlc.svg("rect", { class: `bar ${name}`, x: at.x(l) - width / 2, width, y, height: at.y(Math.min(from, to)) - y }),
        );
      }
    });
    marks.append(
      tlc.svg("line", { class: "axis", x1: at.x(-0.5), x2: at.x(depth - 1.5), y1: at.y(0), y2: at.y(0) }),
    );
    const pointLayer = (l) => {
      shown.layer = l;
      const parts = Object.entries(shares).map(([name, share]) => `${names[name] ?? "growth"} ${tlc.number(share[l])}`);
      readout.textContent = `layer ${l}: ${parts.join(", ")}, total ${tlc.number(data.alpha[l])}`;
    };
    const layerAt = (x) => Math.max(0, Math.min(depth - 2, Math.round(x)));
    onmove((x) => pointLayer(layerAt(x)), (x) => tlc.choice.set("layer", layerAt(x)));
    tlc.part(section, "shares").addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") tlc.choice.set("layer", shown.layer);
      else if (step) pointLayer(layerAt(shown.layer + step));
      else return;
      event.preventDefault();
    });
    const band = tlc.svg("rect", { class: "band", y: at.y(high), height: at.y(low) - at.y(high), width: at.x(1) - at.x(0) });
    tlc.choice.on(["layer"], (layer) => {
      band.setAttribute("x", at.x(layer - 0.5));
      marks.prepend(band);
    });
    tlc.part(section, "shares").append(svg);
    tlc.part(section, "share-legend").append(
      ...tlc.legend(Object.keys(shares).map((name) => [name, names[name] ?? "both sublayers"])),
    );
  };

  drawNorms();
  drawShares();
  readout.textContent = "Point at a chart, or focus one and use the arrow keys. A click or Enter selects the token or the layer.";
  const split = Object.entries(data.shares);
  tlc.part(section, "table").append(
    tlc.table(
      ["layer", "growth", ...split.map(([name]) => names[name]), "median ln ‖x‖ after"],
      data.alpha.map((alpha, l) => [
        `${l}`,
        tlc.number(alpha),
        ...split.map(([, share]) => tlc.number(share[l])),
        tlc.number(data.median[l + 1], 3),
      ]),
    ),
  );
};
