tlc.sections.coupling = (section, data) => {
  const { sublayers, layers } = data;
  const n = layers.length;
  const quantities = ["coupling", "null", "excess"];
  const shown = { token: 0, k: 0, cell: null };

  const isOne = (l, m) => data.diagonal_is_one && l === m;

  /** Value of a quantity of sublayer s at row l, column m, for the chosen token and K; none where it is 1 by definition. */
  const valueOf = (quantity, s, l, m) => {
    if (isOne(l, m)) return undefined;
    const value = data.values[s][shown.token][shown.k][l][m];
    const random = data.null[s][shown.token][shown.k][l];
    if (quantity === "coupling") return value;
    if (quantity === "null") return random;
    return value === null || random === null ? null : value - random;
  };

  /** One colour scale for all panes and tokens at the chosen K, so that colours can be compared. */
  const range = () => {
    let [low, high, undefinedCells] = [0, 0, false];
    data.values.forEach((tokens, s) =>
      tokens.forEach((ks, t) =>
        ks[shown.k].forEach((row, l) =>
          row.forEach((value, m) => {
            if (isOne(l, m)) return;
            const random = data.null[s][t][shown.k][l];
            undefinedCells ||= value === null || random === null;
            if (value === null) return;
            low = Math.min(low, value, value - (random ?? 0));
            high = Math.max(high, value, value - (random ?? 0));
          }),
        ),
      ),
    );
    return { low, high, undefinedCells, limit: Math.max(-low, high) || 1 };
  };

  const point = (l, m) => {
    shown.cell = [Math.min(Math.max(l, 0), n - 1), Math.min(Math.max(m, 0), n - 1)];
    rows.forEach((row, s) => {
      row.maps.forEach((map) => map.point(...shown.cell));
      const [coupling, random, excess] = quantities.map((q) => tlc.number(valueOf(q, s, ...shown.cell)));
      const where = `Jacobian of layer ${layers[shown.cell[0]]}, bases of layer ${layers[shown.cell[1]]}: `;
      row.readout.textContent =
        isOne(...shown.cell)
          ? `${where}1 by definition`
          : `${where}coupling ${coupling}, null ${random}, excess ${excess}`;
    });
  };

  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const keydown = (event) => {
    if (!(event.key in arrows)) return;
    event.preventDefault();
    const [l, m] = shown.cell ?? [0, 1];
    point(l + arrows[event.key][0], m + arrows[event.key][1]);
  };

  const rows = sublayers.map((sublayer) => {
    const maps = quantities.map((quantity) =>
      tlc.heatmap({ layers, label: `${quantity} of ${sublayer}, ${n} by ${n} layers`, onpoint: point }),
    );
    const captions = quantities.map(() => tlc.html("figcaption"));
    const panes = maps.map((map, i) => tlc.html("figure", { class: quantities[i] }, captions[i], map.node));
    const readout = tlc.html("output", { class: "readout" }, "Point at a cell, or focus here and use the arrow keys.");
    const group = tlc.html(
      "div",
      { class: "panes", tabindex: 0, role: "group", "aria-label": `${sublayer}: coupling, null and excess`, onkeydown: keydown },
      ...panes,
    );
    tlc.part(section, "panes").append(tlc.html("div", { class: "sublayer" }, tlc.html("h3", {}, sublayer), readout, group));
    return { maps, captions, readout };
  });

  const swatch = (kind, text) => [
    tlc.html("i", { class: `swatch ${kind}` }),
    tlc.html("span", { class: "label" }, text),
  ];

  const drawMaps = () => {
    const { low, high, undefinedCells, limit } = range();
    const scale = tlc.scale(limit);
    rows.forEach(({ maps, captions }, s) =>
      maps.forEach((map, i) => {
        map.paint((l, m) => valueOf(quantities[i], s, l, m), scale);
        const mean = data.mean[["values", "null", "excess"][i]][s][shown.token][shown.k];
        captions[i].replaceChildren(quantities[i], tlc.html("small", {}, `mean ${tlc.number(mean)}`));
      }),
    );
    const labels = low < 0 && -low > 0.08 * (high - low) ? [[0, tlc.number(low, 3)]] : [];
    labels.push([-low / (high - low || 1), "0"], [1, tlc.number(high, 3)]);
    tlc.part(section, "colorbar").replaceChildren(
      tlc.html("span", { class: "label" }, `all ${3 * sublayers.length} panes`),
      tlc.colorbar({ low, high, color: scale, labels, description: `Colour scale from ${tlc.number(low)} to ${tlc.number(high)}` }),
      ...(data.diagonal_is_one ? swatch("diagonal", "diagonal, 1 by definition") : []),
      ...(undefinedCells ? swatch("undefined", "not defined") : []),
    );
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

  const choose = (name, label, options) => {
    if (options.length < 2) return;
    const select = tlc.html("select", {}, ...options.map((text, i) => tlc.html("option", { value: i }, text)));
    select.addEventListener("change", () => {
      shown[name] = Number(select.value);
      drawMaps();
      drawProfile();
      if (shown.cell) point(...shown.cell);
    });
    tlc.part(section, "selects").append(tlc.html("label", {}, `${label} `, select));
  };

  choose("token", "Token", data.tokens.map((text, i) => `${data.positions[i]} “${text}”`));
  choose("k", "K", data.ks.map(String));
  tlc.part(section, "formula").append(data.formula);
  tlc.part(section, "legend").append(...tlc.legend([["coupling", "coupling"], ["null", "null"]]));
  tlc.inScheme(drawMaps);
  drawProfile();
};
