tlc.sections.growth = (section, data) => {
  const depth = data.median.length;

  const drawNorms = () => {
    const { low, high } = tlc.extent(data.log_norms.flat());
    const { svg, marks, at } = tlc.axes({
      x: { low: 0, high: depth - 1, label: "depth l" },
      y: { low: Math.min(low, 0), high, label: "ln ‖xˡ‖" },
      description: "Logarithm of each token’s residual norm against depth, and the median over tokens",
    });
    const along = (values) => values.map((value, i) => [i, value]);
    const lines = data.log_norms.map((values, i) => {
      const line = tlc.line(at, along(values), "token");
      line.append(tlc.svg("title", {}, `${i} “${data.tokens[i]}”`));
      return line;
    });
    marks.append(...lines, tlc.line(at, along(data.median), "median"));
    tlc.token.listeners.push((position) =>
      lines.forEach((line, i) => line.classList.toggle("pointed", i === position)),
    );
    tlc.choice.on(["token"], (position) =>
      lines.forEach((line, i) => line.classList.toggle("chosen", i === position)),
    );
    tlc.part(section, "norms").append(svg);
    tlc.part(section, "norm-legend").append(
      ...tlc.legend([["token", "each token"], ["chosen", "selected token"], ["median", "median"]]),
    );
  };

  const names = { attn: "attention", mlp: "MLP" };
  const shares = Object.keys(data.shares).length ? data.shares : { alpha: data.alpha };

  const drawShares = () => {
    const columns = Object.values(shares);
    const sum = (l, sign) => columns.reduce((total, share) => total + Math.max(sign * (share[l] ?? 0), 0), 0);
    const tops = data.alpha.map((_, l) => sum(l, 1));
    const bottoms = data.alpha.map((_, l) => -sum(l, -1));
    const { low, high } = tlc.extent([...tops, ...bottoms], [0]);
    const { svg, marks, at } = tlc.axes({
      x: { low: -0.5, high: depth - 1.5, label: "layer l" },
      y: { low, high, label: "growth of ln ‖x‖" },
      description: "Growth of the logarithm of the norm in each layer, by attention and MLP",
    });
    const width = Math.max((at.x(1) - at.x(0)) * 0.8, 1);
    data.alpha.forEach((alpha, l) => {
      const ends = { up: 0, down: 0 };
      for (const [name, share] of Object.entries(shares)) {
        if (share[l] === null) continue;
        const side = share[l] >= 0 ? "up" : "down";
        const [from, to] = [ends[side], ends[side] + share[l]];
        ends[side] = to;
        const text = `layer ${l}: ${names[name] ?? "growth"} ${tlc.number(share[l])}, total ${tlc.number(alpha)}`;
        const y = at.y(Math.max(from, to));
        marks.append(
          tlc.svg(
            "rect",
            { class: `bar ${name}`, x: at.x(l) - width / 2, width, y, height: at.y(Math.min(from, to)) - y },
            tlc.svg("title", {}, text),
          ),
        );
      }
    });
    marks.append(
      tlc.svg("line", { class: "axis", x1: at.x(-0.5), x2: at.x(depth - 1.5), y1: at.y(0), y2: at.y(0) }),
    );
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
