tlc.sections.coupling = (section, data) => {
  const { sublayers, layers } = data;
  const n = layers.length;
  const [values, nulls] = [tlc.array(data.values), tlc.array(data.null)];
  const undetermined = data.undetermined && tlc.array(data.undetermined);
  const quantities = ["coupling", "null", "excess"];
  const shown = { token: -1, k: -1, cell: null };

  const isOne = (l, m) => data.diagonal_is_one && l === m;

  /** A quantity of sublayer s at row l, column m, for a token index; undefined where it is 1 by definition. */
  const valueOf = (quantity, s, l, m, token = shown.token) => {
    if (isOne(l, m)) return undefined;
    const value = values.at(s, token, shown.k, l, m);
    const random = nulls.at(s, token, shown.k, l);
    if (quantity === "coupling") return value;
    if (quantity === "null") return random;
    return value === null || random === null ? null : value - random;
  };

  /** Whether the singular vectors of the bases of layer m are undetermined; the null does not depend on them. */
  const isUndetermined = (s, l, m) => Boolean(undetermined?.at(s, shown.token, shown.k, m)) && !isOne(l, m);
  const undeterminedCells = () =>
    sublayers.some((_, s) => layers.some((_, l) => layers.some((_, m) => isUndetermined(s, l, m))));

  /** One colour scale for all panes and tokens at the selected K, to make colours comparable. */
  const range = () => {
    let [low, high, undefinedCells] = [0, 0, false];
    for (let s = 0; s < sublayers.length; s += 1)
      for (let t = 0; t < data.positions.length; t += 1)
        for (let l = 0; l < n; l += 1)
          for (let m = 0; m < n; m += 1)
            for (const quantity of quantities) {
              const value = valueOf(quantity, s, l, m, t);
              undefinedCells ||= value === null;
              low = Math.min(low, value ?? 0);
              high = Math.max(high, value ?? 0);
            }
    return { low, high, undefinedCells, limit: Math.max(-low, high) || 1 };
  };

  const point = (l, m) => {
    shown.cell = [l, m];
    rows.forEach((row, s) => {
      row.maps.forEach((map) => map.point(l, m));
      const [coupling, random, excess] = quantities.map((q) => tlc.number(valueOf(q, s, l, m)));
      const where = `Jacobian of layer ${layers[l]}, bases of layer ${layers[m]}: `;
      row.readout.textContent = isOne(l, m)
        ? `${where}1 by definition`
        : `${where}coupling ${coupling}, null ${random}, excess ${excess}${isUndetermined(s, l, m) ? tlc.undeterminedBases.readout : ""}`;
    });
  };
  const choose = (l) => tlc.choice.set("layer", layers[l]);
  const keydown = tlc.cellKeys(n, () => shown.cell, point, choose);

  const rows = sublayers.map((sublayer) => {
    const maps = quantities.map((quantity) =>
      tlc.heatmap({
        labels: layers.map(String),
        axes: { row: "Jacobian of layer", column: "bases of layer" },
        label: `${quantity} of ${sublayer}, ${n} by ${n} layers`,
        onpoint: point,
        onchoose: choose,
      }),
    );
    const captions = quantities.map(() => tlc.html("figcaption"));
    const panes = maps.map((map, i) => tlc.html("figure", { class: quantities[i] }, captions[i], map.node));
    const readout = tlc.html("output", { class: "readout" }, "Point at a cell, or focus this pane and use the arrow keys.");
    const group = tlc.html(
      "div",
      { class: "panes", tabindex: 0, role: "group", "aria-label": `${sublayer}: coupling, null and excess`, onkeydown: keydown },
      ...panes,
    );
    tlc.part(section, "panes").append(tlc.html("div", { class: "sublayer" }, tlc.html("h3", {}, sublayer), readout, group));
    return { maps, captions, readout };
  });

  const drawMaps = () => {
    const { low, high, undefinedCells, limit } = range();
    const scale = tlc.scale(limit);
    rows.forEach(({ maps, captions }, s) =>
      maps.forEach((map, i) => {
        const dotted = (l, m) => quantities[i] !== "null" && isUndetermined(s, l, m);
        map.paint((l, m) => valueOf(quantities[i], s, l, m), scale, dotted);
        const mean = data.mean[["values", "null", "excess"][i]][s][shown.token][shown.k];
        captions[i].replaceChildren(quantities[i], tlc.html("small", {}, `mean ${tlc.number(mean)}`));
      }),
    );
    const swatches = data.diagonal_is_one ? [["diagonal", "diagonal, 1 by definition"]] : [];
    if (undefinedCells) swatches.push(["undefined", "not defined"]);
    if (undeterminedCells()) swatches.push(tlc.undeterminedBases.swatch);
    const title = `all ${3 * sublayers.length} panes`;
    tlc.part(section, "colorbar").replaceChildren(...tlc.scaleBar({ low, high, scale, title, swatches }));
  };

  const drawProfile = () => {
    const of = (name, s) => data.profile[name][s][shown.token][shown.k];
    const all = sublayers.flatMap((_, s) => [...of("values", s), ...of("null", s)]);
    const { low, high } = tlc.extent(all, [0]);
    const figures = sublayers.map((sublayer, s) => {
      const { svg, marks, at } = tlc.axes({
        width: 360,
        height: 240,
        x: { low: 1, high: Math.max(n - 1, 2), label: "distance |l − l′|" },
        y: { low, high: high || 1, label: s === 0 ? "coupling" : "" },
        description: `Coupling of ${sublayer} and its null by distance between layers`,
      });
      const points = of("values", s).map((value, i) => [i + 1, value]);
      marks.append(tlc.line(at, of("null", s).map((value, i) => [i + 1, value]), "null"), tlc.line(at, points, "coupling"));
      for (const [distance, value] of points) {
        if (value === null) continue;
        const text = `distance ${distance}: ${tlc.number(value)}, null ${tlc.number(of("null", s)[distance - 1])}`;
        marks.append(
          tlc.svg("circle", { class: "dot", cx: at.x(distance), cy: at.y(value), r: 2.2 }, tlc.svg("title", {}, text)),
        );
      }
      return tlc.html("figure", {}, tlc.html("figcaption", {}, sublayer), svg);
    });
    tlc.part(section, "profile").replaceChildren(...figures);
    const columns = sublayers.flatMap((sublayer) => [sublayer, "null"]);
    const distances = Array.from({ length: n - 1 }, (_, i) => i);
    tlc.part(section, "table").replaceChildren(
      tlc.table(
        ["distance", ...columns],
        distances.map((i) => [
          `${i + 1}`,
          ...sublayers.flatMap((_, s) => [tlc.number(of("values", s)[i]), tlc.number(of("null", s)[i])]),
        ]),
      ),
    );
  };

  /** Show the selected token and K, or a note if they were not measured. */
  const draw = () => {
    const { token, k } = tlc.choice;
    [shown.token, shown.k] = [data.positions.indexOf(token), data.ks.indexOf(k)];
    const missing = shown.token < 0 || shown.k < 0;
    tlc.part(section, "measured").hidden = missing;
    tlc.part(section, "missing").hidden = !missing;
    tlc.part(section, "token").replaceChildren(...(token === null ? [] : [` at token ${token}`]));
    if (missing) {
      tlc.part(section, "missing").textContent =
        `Coupling across depth was not measured at token ${token}. In Python: tlc.analyze(model, prompt, tokens=[${token}]). ` +
        `On the command line: tlcoupling report --tokens ${token}. "all" selects every token.`;
      return;
    }
    drawMaps();
    drawProfile();
    if (shown.cell) point(...shown.cell);
  };

  tlc.part(section, "formula").append(data.formula);
  tlc.part(section, "legend").append(...tlc.legend([["coupling", "coupling"], ["null", "null"]]));
  tlc.choice.on(["token", "k"], draw);
  tlc.choice.on(["layer"], (layer) =>
    rows.forEach(({ maps }) => maps.forEach((map) => map.mark(layers.indexOf(layer)))),
  );
  tlc.inScheme(() => {
    if (shown.token >= 0) drawMaps();
  });
};
