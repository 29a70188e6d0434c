tlc.sections.coupling = (section, data) => {
  const { sublayers, layers } = data;
  const n = layers.length;
  const view = tlc.view(n);
  const kindNames = [...new Set(data.kinds ?? [])];
  const named = (l) => `layer ${layers[l]}${data.kinds ? ` (${data.kinds[layers[l]]})` : ""}`;
  const shown = { token: -1, k: -1, cell: null, quantity: "excess" };
  const part = (name) => tlc.part(section, name);
  const unpack = (part) => ({ ...part, values: tlc.array(part.values), null: tlc.array(part.null), std: tlc.array(part.std) });
  const models = { trained: unpack(data), ...(data.fresh ? { "fresh weights": unpack(data.fresh) } : {}) };
  const undetermined = data.undetermined && tlc.array(data.undetermined);
  const digits = tlc.digits(data.values);
  const isOne = (l, m) => data.diagonal_is_one && l === m;

  /** All numbers of a model's sublayer s at row l and column m, for indices of token and K; undefined where it is 1 by definition. */
  const cellOf = (model, s, l, m, token = shown.token, k = shown.k) => {
    if (isOne(l, m)) return undefined;
    const at = [s, token, k, l];
    const cell = tlc.comparison(model.values.at(...at, m), model.null.at(...at), model.std.at(...at));
    return model === models.trained ? { ...cell, undetermined: Boolean(undetermined?.at(s, token, k, m)) } : cell;
  };
  const minus = (a, b) =>
    a && b && Object.fromEntries(["excess", "coupling"].map((q) => [q, a[q] === null || b[q] === null ? null : a[q] - b[q]]));
  /** A row of panes for each model, and for their difference. */
  const sets = Object.entries(models).map(([name, model]) => ({ name, model, cell: (...at) => cellOf(model, ...at) }));
  if (data.fresh) {
    const cell = (...at) => minus(...Object.values(models).map((model) => cellOf(model, ...at)));
    sets.push({ name: "difference", cell });
  }
  const valueOf = (set, s) => (l, m) => {
    const cell = set.cell(s, l, m);
    return cell && (cell[shown.quantity] === undefined ? cell.excess : cell[shown.quantity]);
  };

  const point = (l, m) => {
    shown.cell = [l, m];
    part("where").textContent = `Jacobian of ${named(l)}, bases of ${named(m)}`;
    for (const { map, readout, set, s } of panes) {
      map.point(l, m);
      const cell = set.cell(s, l, m);
      readout.textContent = cell ? tlc.inWords(cell, digits) : "1 by definition";
    }
  };
  const panel = tlc.sharedPanel(part("shared"), "What two layers share");
  // what was measured with the report is of blocks, at one token and the first K, whatever is chosen now
  const known = data.shared && { ...data.shared, of: tlc.array(data.shared.values) };
  const ofKnown = [sublayers.indexOf("block"), data.positions.indexOf(known?.position)];
  const showKnown = (l, m, note = "", cell = undefined) => {
    const [row, column] = [l, m].map((layer) => known.layers.indexOf(layer));
    if (row < 0 || column < 0) return panel.say(`Layers ${l} and ${m} are not both among those kept: ${known.layers.join(", ")}.`);
    panel.show(
      {
        ...known,
        title: `Jacobian of layer ${l}, bases of layer ${m}${note}`,
        row: `layer ${l}`,
        column: `layer ${m}`,
        entry: (i, j) => known.of.at(row, column, i, j),
        chance: known.chance[row],
        texts: known.texts[column],
        scores: known.scores[column],
      },
      cell,
    );
  };
  const choose = (s, l, m) => {
    tlc.choice.set("layer", layers[l]);
    const { token, k } = tlc.choice;
    const isKnown = known && sublayers[s] === "block" && token === known.position && k === data.ks[0] && [l, m].every((i) => known.layers.includes(layers[i]));
    if (tlc.kernel.there && !isKnown) {
      panel.say("Measuring what the two share …");
      tlc.kernel.ask({ what: "pair", of: "layer", sublayer: sublayers[s], k, pair: [l, m].map((i) => ({ layer: layers[i], dest: token, src: token })) });
    } else if (known) {
      const [block, at] = ofKnown;
      showKnown(layers[l], layers[m], "", block >= 0 && at >= 0 && cellOf(models.trained, block, l, m, at, 0));
    }
  };
  tlc.answeredPairs(
    panel,
    ({ of }) => of === "layer",
    ({ sublayer, pair: [row, column] }) => ({
      title: `${sublayer} at token ${row.dest}: Jacobian of layer ${row.layer}, bases of layer ${column.layer}`,
      row: `layer ${row.layer}`,
      column: `layer ${column.layer}`,
    }),
  );
  const keydown = tlc.cellKeys(view, () => shown.cell, point, (l, m) => choose(Math.max(0, sublayers.indexOf("block")), l, m));
  const panes = sets.flatMap((set) => {
    const row = sublayers.map((sublayer, s) => {
      const map = tlc.heatmap({
        labels: layers.map(String),
        kinds: layers.flatMap((layer) => (data.kinds ? [kindNames.indexOf(data.kinds[layer])] : [])),
        axes: { row: "Jacobian of layer", column: "bases of layer" },
        label: `${sublayer}, ${set.name}, ${n} by ${n} layers`,
        view,
        onpoint: point,
        onchoose: (l, m) => choose(s, l, m),
      });
      const [caption, readout] = [tlc.html("figcaption"), tlc.html("output", { class: "readout" })];
      return { map, caption, readout, set, s, node: tlc.html("figure", {}, caption, map.node, readout) };
    });
    const group = { class: "panes", tabindex: 0, role: "group", "aria-label": `${set.name}: ${sublayers.join(", ")}`, onkeydown: keydown };
    part("panes").append(
      tlc.html("div", { class: "sublayer" }, ...(data.fresh ? [tlc.html("h3", {}, set.name)] : []), tlc.html("div", group, ...row.map(({ node }) => node))),
    );
    return row;
  });

  /** One colour scale for all panes and tokens at the selected K and quantity, to make colours comparable. */
  const range = () => {
    const all = tlc.range();
    for (const { model } of sets.filter((set) => set.model))
      for (let s = 0; s < sublayers.length; s += 1)
        for (let t = 0; t < data.positions.length; t += 1) {
          const of = tlc.quantityOf(shown.quantity, ...[model.values, model.null, model.std].map((array) => array.part(s, t, shown.k)));
          for (let l = 0; l < n; l += 1) for (let m = 0; m < n; m += 1) if (!isOne(l, m)) all.add(of(l, m));
        }
    return all.result();
  };

  const drawMaps = () => {
    const { low, high, undefinedCells, limit } = range();
    const scale = tlc.scale(limit);
    let anyDots = false;
    const meanOf = (model, s) => model.mean[shown.quantity][s][shown.token][shown.k];
    for (const { map, caption, set, s } of panes) {
      const dotted = (l, m) => shown.quantity !== "null" && Boolean(set.cell(s, l, m)?.undetermined);
      for (let l = 0; l < n; l += 1) for (let m = 0; m < n; m += 1) anyDots ||= dotted(l, m);
      map.paint(valueOf(set, s), scale, dotted);
      const [a, b] = Object.values(models).map((model) => meanOf(model, s));
      const mean = set.model ? meanOf(set.model, s) : a === null || b === null ? null : a - b;
      caption.replaceChildren(sublayers[s], tlc.html("small", {}, `mean ${tlc.quantity(shown.quantity, mean)}`));
    }
    const swatches = data.diagonal_is_one ? [["diagonal", "diagonal, 1 by definition"]] : [];
    if (undefinedCells) swatches.push(["undefined", "not defined"]);
    if (anyDots) swatches.push(tlc.undeterminedBases.swatch);
    const nulls = shown.quantity === "coupling" ? [[Math.max(...sublayers.map((_, s) => models.trained.mean.null[s][shown.token][shown.k])), "null"]] : [];
    part("colorbar").replaceChildren(...tlc.scaleBar({ low, high, scale, title: tlc.quantities[shown.quantity], swatches, marks: nulls }));
  };

  const drawProfile = () => {
    const of = (model, name, s) => model.profile[name][s][shown.token][shown.k];
    const { trained, "fresh weights": fresh } = models;
    const band = (s, sign) => of(trained, "null", s).map((value, i) => value === null ? null : value + sign * 2 * of(trained, "std", s)[i]);
    const all = sublayers.flatMap((_, s) => [...of(trained, "values", s), ...band(s, 1), ...(fresh ? [...of(fresh, "values", s), ...of(fresh, "null", s)] : [])]);
    const { low, high } = tlc.extent(all, [0]);
    const pairs = (values) => values.map((value, i) => [i + 1, value]);
    const figures = sublayers.map((sublayer, s) => {
      const { svg, marks, at, onmove } = tlc.axes({
        width: 360,
        height: 240,
        x: { low: 1, high: Math.max(n - 1, 2), label: "distance |l − l′|" },
        y: { low, high: high || 1, label: s === 0 ? "coupling" : "" },
        description: `Coupling of ${sublayer}, its null and those of fresh weights by distance between layers`,
      });
      marks.append(
        tlc.area(at, pairs(band(s, -1)), pairs(band(s, 1))),
        tlc.line(at, pairs(of(trained, "null", s)), "null"),
        ...(fresh ? [tlc.line(at, pairs(of(fresh, "null", s)), "fresh-null"), tlc.line(at, pairs(of(fresh, "values", s)), "fresh")] : []),
        tlc.line(at, pairs(of(trained, "values", s)), "coupling"),
      );
      const readout = tlc.html("output", { class: "readout" });
      onmove((distance) => {
        const at = Math.round(Math.max(1, Math.min(distance, n - 1))) - 1;
        if (n < 2) return;
        const others = fresh ? `; fresh weights ${tlc.number(of(fresh, "values", s)[at])}, null ${tlc.number(of(fresh, "null", s)[at])}` : "";
        readout.textContent = `distance ${at + 1}: ${tlc.number(of(trained, "values", s)[at])}, null ${tlc.number(of(trained, "null", s)[at])}${others}`;
      });
      return tlc.html("figure", {}, tlc.html("figcaption", {}, sublayer), svg, readout);
    });
    part("profile").replaceChildren(...figures);
    const columns = sublayers.flatMap((sublayer) => [sublayer, "null", ...(fresh ? ["fresh", "fresh null"] : [])]);
    part("table").replaceChildren(
      tlc.table(
        ["distance", ...columns],
        Array.from({ length: Math.max(n - 1, 0) }, (_, i) => [
          `${i + 1}`,
          ...sublayers.flatMap((_, s) => [of(trained, "values", s)[i], of(trained, "null", s)[i], ...(fresh ? [of(fresh, "values", s)[i], of(fresh, "null", s)[i]] : [])].map((value) => tlc.number(value))),
        ]),
      ),
    );
  };

  /** Show the selected token and K, or a note if they were not measured. */
  const draw = () => {
    const { token, k } = tlc.choice;
    [shown.token, shown.k] = [data.positions.indexOf(token), data.ks.indexOf(k)];
    const missing = shown.token < 0 || shown.k < 0;
    part("measured").hidden = missing;
    part("missing").hidden = !missing;
    part("token").replaceChildren(...(token === null ? [] : [` at token ${token}`]));
    if (missing) {
      part("missing").textContent =
        `Coupling across depth was not measured at token ${token}. In Python: tlc.analyze(model, prompt, tokens=[${token}]). ` +
        `On the command line: tlcoupling report --tokens ${token}. "all" selects every token.`;
      return;
    }
    drawMaps();
    drawProfile();
    if (shown.cell) point(...shown.cell);
  };

  part("formula").append(data.formula);
  part("quantity").append(...tlc.quantitySwitch("depth-quantity", (quantity) => {
    shown.quantity = quantity;
    drawMaps();
  }));
  part("kinds").hidden = !data.kinds;
  part("kinds").append("Kinds of layers, on the axes:", ...tlc.legend(kindNames.map((name, i) => [`kind-${i % 4}`, name])));
  part("no-fresh").hidden = Boolean(data.fresh);
  part("precision").hidden = !tlc.isCoarse(data.values);
  part("precision").textContent = `Precision of a cell: ${tlc.precision(data.values)}. Means are not rounded.`;
  part("where").textContent = "Point at a cell, or focus a row of panes and use the arrow keys.";
  part("legend").append(
    ...tlc.legend([["coupling", "coupling"], ["null", "null, with two standard deviations of a single pair"], ...(data.fresh ? [["fresh", "fresh weights"], ["fresh-null", "their null"]] : [])]),
  );
  tlc.choice.on(["token", "k"], draw);
  const opened = tlc.opened?.some(({ asked }) => asked.of === "layer");
  if (known) {
    panel.bounds(
      `Measured with the report for blocks of ${known.layers.length === n ? `all ${n}` : `${known.layers.length} of ${n}`} layers at token ` +
        `${tlc.named(known.position, known.token)}, the first ${known.k} singular vectors (entries to ${tlc.precision(known.values)}).`,
    );
    if (!opened) showKnown(...known.start, ", the pair with the most excess");
  } else if (!opened) {
    panel.say("The matrices of single pairs were not kept. In Python: tlc.analyze(model, prompt, shared=True). On the command line: tlcoupling report --directions.", false);
    tlc.kernel.ready(() => panel.say(""));
  }
  tlc.choice.on(["layer"], (layer) => panes.forEach(({ map }) => map.mark(layers.indexOf(layer))));
  tlc.inScheme(() => {
    if (shown.token >= 0) drawMaps();
    panel.redraw();
  });
};
