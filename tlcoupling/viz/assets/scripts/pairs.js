tlc.sections.pairs = (section, data) => {
  const { tokens, first } = data;
  const n = tokens.length;
  const labels = tokens.map((text, i) => `${text} ${first + i}`);
  const shown = { layer: null, pane: 0, quantity: "coupling", cell: null };
  const part = (name) => tlc.part(section, name);

  const attention = data.attention && { layers: data.attention.layers, patterns: tlc.array(data.attention.patterns) };
  /** Attention [head][dest][src] of a layer; the data has only src <= dest. */
  const patternsOf = (layer) => {
    const l = attention.layers.indexOf(layer);
    return Array.from({ length: attention.patterns.shape[1] }, (_, head) => {
      const row = attention.patterns.row(l, head).map((value) => value === null ? null : Math.round(value * 1e4) / 1e4);
      return tokens.map((_, dest) => tokens.map((_, src) => (src > dest ? 0 : row[(dest * (dest + 1)) / 2 + src])));
    });
  };

  /** A pane per kind of coupling and sublayer. */
  const panes = data.kinds.flatMap((kind) => {
    const [values, nulls] = [tlc.array(kind.values), tlc.array(kind.null)];
    const undetermined = kind.undetermined && tlc.array(kind.undetermined);
    const indices = new Map(kind.positions.map((position, i) => [position - first, i]));
    return kind.sublayers.map((sublayer, s) => ({
      kind,
      sublayer,
      measured: (layer) => kind.layers.includes(layer) && kind.ks.includes(tlc.choice.k),
      /** Coupling, null and excess at a row and column; undefined on a diagonal of ones and outside the context. */
      at: (layer, r, c) => {
        const [row, column] = [indices.get(r), indices.get(c)];
        if (row === undefined || column === undefined || (data.diagonal_is_one && r === c)) return undefined;
        const [l, k] = [kind.layers.indexOf(layer), kind.ks.indexOf(tlc.choice.k)];
        const [coupling, random] = [values.at(s, l, k, row, column), nulls.at(s, l, k, row)];
        const excess = coupling === null || random === null ? null : coupling - random;
        return { coupling, null: random, excess, undetermined: Boolean(undetermined?.at(s, l, k, column)) };
      },
    }));
  });
  const valueAt = (pane) => (r, c) => {
    const cell = pane.at(shown.layer, r, c);
    return cell && cell[shown.quantity];
  };
  const dotted = (pane) => (r, c) => shown.quantity !== "null" && Boolean(pane.at(shown.layer, r, c)?.undetermined);
  const cells = Array.from({ length: n * n }, (_, i) => [Math.floor(i / n), i % n]);

  /** One colour scale for all panes and layers at the selected K and quantity. */
  const range = () => {
    let [low, high, undefinedCells] = [0, 0, false];
    for (const pane of panes)
      for (const layer of pane.kind.layers.filter(pane.measured))
        for (const [r, c] of cells) {
          const cell = pane.at(layer, r, c);
          if (!cell) continue;
          const value = cell[shown.quantity];
          undefinedCells ||= value === null;
          low = Math.min(low, value ?? 0);
          high = Math.max(high, value ?? 0);
        }
    return { low, high, undefinedCells, limit: Math.max(-low, high) || 1 };
  };

  const name = (i) => `${first + i} “${tokens[i]}”`;
  const point = (r, c) => {
    shown.cell = [r, c];
    const pane = panes[shown.pane];
    if (!pane?.measured(shown.layer)) return;
    zoom.point(r, c);
    const cell = pane.at(shown.layer, r, c);
    const numbers = cell
      ? ["coupling", "null", "excess"].map((quantity) => `${quantity} ${tlc.number(cell[quantity])}`).join(", ") +
        (cell.undetermined ? tlc.undeterminedBases.readout : "")
      : r === c && data.diagonal_is_one
        ? "1 by definition"
        : "not compared";
    const heads = attention && r >= c && attention.layers.includes(shown.layer) ? patternsOf(shown.layer) : [];
    const best = heads.reduce((top, head, i) => (head[r][c] > heads[top][r][c] ? i : top), 0);
    const attends = heads.length ? `; strongest attention from row to column: ${tlc.number(heads[best][r][c], 3)}, head ${best}` : "";
    part("readout").textContent = `Jacobian of ${name(r)}, bases of ${name(c)}: ${numbers}${attends}`;
  };
  const choose = (r) => tlc.choice.set("token", first + r);

  const zoom = tlc.heatmap({
    labels,
    axes: { row: "Jacobian of token", column: "bases of token" },
    label: `Coupling of tokens, ${n} by ${n}`,
    turned: true,
    side: 420,
    onpoint: point,
    onchoose: choose,
  });
  const focus = tlc.html(
    "div",
    {
      class: "zoom",
      tabindex: 0,
      role: "group",
      "aria-label": "The selected pane: arrow keys move between cells, Enter selects the row’s token",
      onkeydown: tlc.cellKeys(n, () => shown.cell, point, choose),
    },
    zoom.node,
  );
  part("zoom").append(focus);

  const select = (i) => {
    shown.pane = i;
    draw();
  };
  const buttons = panes.map((pane, i) => {
    const picture = tlc.html("img", { alt: "" });
    const button = tlc.html(
      "button",
      { type: "button", onclick: () => select(i), "aria-label": `${pane.kind.title}, ${pane.sublayer}` },
      picture,
      tlc.html("span", {}, pane.sublayer),
    );
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = buttons[i + step];
      if (next) [next.focus(), select(i + step)];
    });
    return button;
  });
  for (const kind of data.kinds) {
    const own = buttons.filter((_, i) => panes[i].kind === kind);
    part("thumbs").append(
      tlc.html("div", { class: "kind", role: "group", "aria-label": kind.title }, tlc.html("span", { class: "label" }, kind.title), tlc.html("div", {}, ...own)),
    );
  }

  const draw = () => {
    const { layer } = shown;
    const missing = !panes.some((pane) => pane.measured(layer));
    part("coupling").hidden = missing;
    part("no-coupling").hidden = !missing;
    if (missing) {
      part("no-coupling").textContent =
        `Coupling of tokens was not measured in layer ${layer}. In Python: tlc.analyze(model, prompt, token_layers=[${layer}]). ` +
        `On the command line: tlcoupling report --token-layers ${layer}. "all" selects every layer.`;
      return;
    }
    const { low, high, undefinedCells, limit } = range();
    const scale = tlc.scale(limit);
    panes.forEach((pane, i) => {
      const measured = pane.measured(layer);
      buttons[i].hidden = !measured;
      buttons[i].setAttribute("aria-pressed", `${i === shown.pane}`);
      buttons[i].tabIndex = i === shown.pane ? 0 : -1;
      if (measured) buttons[i].querySelector("img").src = tlc.raster(n, n, valueAt(pane), scale, dotted(pane));
    });
    const pane = panes[shown.pane];
    zoom.paint(valueAt(pane), scale, dotted(pane));
    part("title").textContent = `${pane.kind.title}, ${pane.sublayer}: ${shown.quantity} of ${pane.kind.compared}`;
    const others = cells.filter(([r, c]) => r !== c).map(([r, c]) => valueAt(pane)(r, c));
    const defined = others.filter((value) => value !== undefined && value !== null);
    const mean = defined.length ? defined.reduce((sum, value) => sum + value, 0) / defined.length : null;
    part("mean").textContent = `mean ${tlc.number(mean)}`;
    const absent = panes.some((some) => some.kind.positions.length < n);
    const neutral = [data.diagonal_is_one && "diagonal, 1 by definition", absent && "not compared"].filter(Boolean);
    const swatches = neutral.length ? [["diagonal", neutral.join("; ")]] : [];
    if (undefinedCells) swatches.push(["undefined", "not defined"]);
    const undeterminedCells = panes.some((some) => some.measured(layer) && cells.some(([r, c]) => dotted(some)(r, c)));
    if (undeterminedCells) swatches.push(tlc.undeterminedBases.swatch);
    const title = "all panes and layers";
    part("colorbar").replaceChildren(...tlc.scaleBar({ low, high, scale, title, swatches }));
    if (shown.cell) point(...shown.cell);
  };

  const drawAttention = () => {
    const { layer } = shown;
    const missing = !attention?.layers.includes(layer);
    part("no-attention").hidden = !missing;
    part("attention").hidden = missing;
    if (missing) {
      part("no-attention").textContent = attention
        ? `The attention patterns of layer ${layer} were not kept, because the prompt is long. In Python: tlc.analyze(model, prompt, token_layers=[${layer}]).`
        : "There are no attention patterns: the model has none, or this result contains only coupling.";
    } else tlc.attentionHeads(part("attention"), patternsOf(layer), tokens);
  };

  for (const quantity of ["coupling", "null", "excess"]) {
    const input = tlc.html("input", { type: "radio", name: "quantity", value: quantity });
    input.checked = quantity === shown.quantity;
    input.addEventListener("change", () => {
      shown.quantity = quantity;
      draw();
    });
    part("quantity").append(tlc.html("label", {}, input, quantity));
  }
  if (first > 0) part("cut").append(`The axes show the last ${n} of ${data.n_tokens} tokens.`);
  part("readout").textContent = "Point at a cell, or focus the pane and use the arrow keys.";
  tlc.choice.on(["layer"], (layer) => {
    shown.layer = layer;
    part("layer").textContent = `${layer}`;
    drawAttention();
    draw();
  });
  tlc.choice.on(["k"], () => shown.layer !== null && draw());
  tlc.choice.on(["token"], (token) => zoom.mark(token - first));
  tlc.inScheme(() => shown.layer !== null && draw());
};
