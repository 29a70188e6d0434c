tlc.sections.pairs = (section, data) => {
  const { tokens } = data;
  const n = tokens.length;
  const labels = tokens.map((text, i) => `${i} ${tlc.isolated(text)}`);
  const view = tlc.view(n);
  const sinks = new Set(data.sinks);
  const kinds = sinks.size ? tokens.map((_, i) => (sinks.has(i) ? 0 : -1)) : [];
  const shown = { layer: null, pane: 0, quantity: "excess", cell: null, head: "mean", overlay: null };
  const part = (name) => tlc.part(section, name);

  const attention = data.attention && {
    ...data.attention,
    mean: tlc.roots(data.attention.mean),
    heads: data.attention.heads && tlc.roots(data.attention.heads),
  };
  const attended = (r, c) => r >= c || !attention.causal;
  /** Attention from row to column, of a head or the mean over heads; undefined where a causal model cannot attend. */
  const attends = (layer, head) => {
    const [l, kept] = [attention.layers.indexOf(layer), attention.head_layers.indexOf(layer)];
    const [part, pool] = head === "mean" ? [attention.mean.part(l), attention.pool] : [attention.heads.part(kept, head), 1];
    return (r, c) => {
      if (!attended(r, c)) return undefined;
      const [row, column] = [Math.floor(r / pool), Math.floor(c / pool)];
      return part[(attention.causal ? (row * (row + 1)) / 2 : row * Math.ceil(n / pool)) + column];
    };
  };
  const hasAttention = (layer) => Boolean(attention?.layers.includes(layer));
  const hasHeads = (layer) => hasAttention(layer) && attention.head_layers.includes(layer);

  /** A pane per kind of coupling and sublayer. */
  const unpack = (part) => part && { ...part, values: tlc.array(part.values), null: tlc.array(part.null), std: tlc.array(part.std) };
  const panes = data.kinds.flatMap((kind) => {
    const [trained, fresh] = [unpack(kind), unpack(kind.fresh)];
    const undetermined = kind.undetermined && tlc.array(kind.undetermined);
    const indices = new Map(kind.positions.map((position, i) => [position, i]));
    const digits = tlc.digits(kind.values);
    return kind.sublayers.map((sublayer, s) => {
      const of = (model, layer, r, c) => {
        if (!indices.has(r) || !indices.has(c) || (data.diagonal_is_one && r === c)) return undefined;
        const [row, column] = [r, c].map((i) => Math.floor(indices.get(i) / kind.pool));
        const at = [s, kind.layers.indexOf(layer), kind.ks.indexOf(tlc.choice.k), row];
        const cell = tlc.comparison(model.values.at(...at, column), model.null.at(...at), model.std.at(...at));
        return model === trained ? { ...cell, undetermined: Boolean(undetermined?.at(...at.slice(0, 3), column)) } : cell;
      };
      /** One quantity of a layer at tokens (row, column), fast: undefined where it is 1 by definition or not compared. */
      const shownOf = (model, layer) => {
        const at = [s, kind.layers.indexOf(layer), kind.ks.indexOf(tlc.choice.k)];
        const of = tlc.quantityOf(shown.quantity, ...[model.values, model.null, model.std].map((array) => array.part(...at)));
        const places = Array.from({ length: n }, (_, i) => (indices.has(i) ? Math.floor(indices.get(i) / kind.pool) : -1));
        return (r, c) => (places[r] < 0 || places[c] < 0 || (data.diagonal_is_one && r === c) ? undefined : of(places[r], places[c]));
      };
      const meanOf = (model, layer) => model.mean[shown.quantity][s][kind.layers.indexOf(layer)][kind.ks.indexOf(tlc.choice.k)];
      return { kind, sublayer, digits, undetermined, trained, fresh, of, shownOf, meanOf, measured: (layer) => kind.layers.includes(layer) && kind.ks.includes(tlc.choice.k) };
    });
  });
  const hasFresh = panes.some((pane) => pane.fresh);
  const minus = (a, b) => (a === null || b === null || a === undefined || b === undefined ? null : a - b);
  /** The maps of the selected pane: the model, and beside it fresh weights and the difference. */
  const sets = {
    trained: (pane) => (r, c) => pane.of(pane.trained, shown.layer, r, c),
    ...(hasFresh && {
      "fresh weights": (pane) => (r, c) => pane.fresh && pane.of(pane.fresh, shown.layer, r, c),
      difference: (pane) => (r, c) => {
        if (!pane.fresh) return undefined;
        const [a, b] = [pane.trained, pane.fresh].map((model) => pane.of(model, shown.layer, r, c));
        return a && b && Object.fromEntries(Object.keys(tlc.quantities).map((q) => [q, minus(a[q], b[q])]));
      },
    }),
  };
  /** The quantity that is shown of a set's map. */
  const valuesOf = (set, pane) => {
    const [trained, fresh] = [pane.trained, pane.fresh].map((model) => model && pane.shownOf(model, shown.layer));
    if (set === "trained") return trained;
    if (!fresh) return () => undefined;
    if (set === "fresh weights") return fresh;
    return (r, c) => {
      const [a, b] = [trained(r, c), fresh(r, c)];
      return a === undefined ? undefined : minus(a, b);
    };
  };
  const dotted = (pane) =>
    shown.quantity !== "null" && pane.undetermined ? (r, c) => Boolean(sets.trained(pane)(r, c)?.undetermined) : () => false;

  const name = (i) => tlc.named(i, tokens[i]);
  const point = (r, c) => {
    shown.cell = [r, c];
    Object.values(maps).forEach(({ map }) => map.point(r, c));
    picture?.point(c);
    const texts = [`Row ${name(r)}, column ${name(c)}`];
    if (hasAttention(shown.layer) && attended(r, c)) {
      texts.push(`attention from row to column ${tlc.number(attends(shown.layer, "mean")(r, c), 3)} (mean)`);
      if (hasHeads(shown.layer)) {
        const heads = Array.from({ length: attention.heads.shape[1] }, (_, head) => attends(shown.layer, head)(r, c));
        const best = heads.indexOf(Math.max(...heads));
        texts.push(`at most ${tlc.number(heads[best], 3)} (head ${best})`);
      }
    }
    const pane = panes[shown.pane];
    if (pane?.measured(shown.layer)) {
      for (const [set, cellAt] of Object.entries(sets)) {
        const cell = cellAt(pane)(r, c);
        const words = cell ? tlc.inWords(cell, pane.digits) : r === c && data.diagonal_is_one ? "1 by definition" : "not compared";
        texts.push(set === "trained" ? words : `${set}: ${words}`);
      }
    }
    part("readout").textContent = texts.join("; ");
  };
  const panel = tlc.sharedPanel(part("shared"), "What two tokens or two heads share");
  panel.say("In a notebook with a kernel, tlc.viz.Live(analysis) opens what a pair of tokens, or of heads, shares: |U₂ᵀ J₁ V₂|, and the tokens that the shared directions write and read.", false);
  tlc.kernel.ready(() => panel.say(""));
  panel.bounds("The null is of unrelated bases. Tokens of one layer share its weights, and so do heads with the same keys: read fresh weights, which stand beside it if the analysis has them (baseline=\"fresh\").");
  const ask = (asked) => {
    panel.say("Measuring what the two share …");
    tlc.kernel.ask({ what: "pair", k: tlc.choice.k, ...asked });
  };
  const choose = (r, c) => {
    const pane = panes[shown.pane];
    if (tlc.kernel.there && pane?.measured(shown.layer)) {
      const { kind, sublayer } = pane;
      const basis = kind.basis_layers[kind.layers.indexOf(shown.layer)];
      const place = (layer, i) => ({ layer, dest: kind.name === "context dest" ? kind.fixed : i, src: kind.name === "context src" ? kind.fixed : i });
      ask({ of: "token", sublayer, pair: [place(shown.layer, r), place(basis, c)] });
    }
    tlc.choice.set("token", r);
  };
  const at = ({ src, dest }) => `token ${src === dest ? "" : `${src} → `}${name(dest)}`;
  tlc.answeredPairs(
    panel,
    ({ of }) => of !== "layer",
    ({ of, sublayer, pair: [row, column] }) => {
      const named = of === "head" ? (place) => `head ${place.head}` : at;
      const across = row.layer === column.layer ? "" : ` in layer ${column.layer}`;
      return { title: `Layer ${row.layer}, ${of === "head" ? at(row) : sublayer}: Jacobian of ${named(row)}, bases of ${named(column)}${across}`, row: named(row), column: named(column) };
    },
  );
  tlc.headCoupling(part, (layer, token, row, column) =>
    ask({ of: "head", sublayer: null, pair: [row, column].map((head) => ({ layer, dest: token, src: token, head })) }),
  );
  const keydown = tlc.cellKeys(view, () => shown.cell, point, choose);

  const axes = { row: "Jacobian of token", column: "bases of token" };
  const describe = "arrow keys move between cells, Enter selects the row’s token, plus and minus zoom";
  const makeMap = (name, axes) => {
    const map = tlc.heatmap({ labels, axes, kinds, label: `${name} of tokens, ${n} by ${n}`, turned: true, side: 420, view, onpoint: point, onchoose: choose });
    const caption = tlc.html("figcaption");
    const group = { class: "zoom", tabindex: 0, role: "group", "aria-label": `${name}: ${describe}`, onkeydown: keydown };
    return { map, caption, node: tlc.html("figure", {}, caption, tlc.html("div", group, map.node)) };
  };
  const maps = {
    ...(attention && { attention: makeMap("attention", { row: "destination", column: "source" }) }),
    ...(panes.length && Object.fromEntries(Object.keys(sets).map((set) => [set, makeMap(set, axes)]))),
  };
  part("maps").append(...Object.values(maps).map(({ node }) => node));
  part("sinks").hidden = !sinks.size;
  part("sinks").append(...tlc.legend([["kind-0", "sink (norm more than ten times the median), on the axes"]]));

  const row = () => tlc.choice.token ?? 0;
  /** What may be laid over the image: numbers from the selected token to each patch, by the name of a choice. */
  const overlays = {
    coupling: () => maps.trained,
    attention: () => maps.attention,
    "image alone": () => ({ node: {}, values: () => undefined }),
  };
  const picture = data.picture && tlc.picture(data.picture, { onpoint: (i) => point(row(), i), onchoose: choose });
  const overlay = tlc.html("select", { "aria-label": "Over the image", onchange: () => {
    shown.overlay = overlay.value;
    drawPicture();
  } });
  const overlaid = tlc.html("small");
  if (picture) part("maps").prepend(tlc.html("figure", {}, tlc.html("figcaption", {}, overlay, overlaid), picture.node));
  const drawPicture = () => {
    if (!picture) return;
    const here = Object.keys(overlays).filter((name) => overlays[name]()?.values && !overlays[name]().node.hidden);
    const wanted = here.includes(shown.overlay) ? shown.overlay : here[0];
    overlay.replaceChildren(...here.map((name) => tlc.html("option", { value: name }, name === "coupling" ? `coupling, ${tlc.quantities[shown.quantity]}` : name)));
    overlay.value = wanted;
    overlaid.textContent = wanted === "image alone" ? "" : `from ${name(row())} to each patch`;
    picture.mark(row());
    const { values, scale } = overlays[wanted]();
    picture.paint((i) => values(row(), i), scale);
  };
  if (n > 8) part("zooming").append(tlc.viewButtons(view, () => shown.cell));

  const select = (i) => {
    shown.pane = i;
    draw();
  };
  const buttons = panes.map((pane, i) => {
    const button = tlc.html(
      "button",
      { type: "button", onclick: () => select(i), "aria-label": `${pane.kind.title}, ${pane.sublayer}` },
      tlc.html("img", { alt: "" }),
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

  /** One colour scale for all panes and models of this layer at the selected K and quantity. */
  const drawCoupling = () => {
    const { layer } = shown;
    const measured = panes.filter((pane) => pane.measured(layer));
    part("coupling").hidden = !measured.length;
    part("no-coupling").hidden = Boolean(measured.length);
    for (const set of Object.keys(sets)) if (maps[set]) maps[set].node.hidden = !measured.length;
    if (!measured.length) {
      part("no-coupling").textContent =
        `Coupling of tokens was not measured in layer ${layer}. In Python: tlc.analyze(model, prompt, token_layers=[${layer}]). ` +
        `On the command line: tlcoupling report --token-layers ${layer}. "all" selects every layer.`;
      return;
    }
    const range = tlc.range();
    let dots = false;
    for (const pane of measured) {
      const marked = dotted(pane);
      const steps = pane.kind.positions.filter((_, i) => i % pane.kind.pool === 0);
      for (const model of [pane.trained, pane.fresh].filter(Boolean)) {
        const of = pane.shownOf(model, layer);
        for (const r of steps)
          for (const c of steps) {
            range.add(of(r, c));
            dots ||= marked(r, c);
          }
      }
    }
    const { low, high, undefinedCells, limit } = range.result();
    const scale = tlc.scale(limit);
    panes.forEach((pane, i) => {
      const is = pane.measured(layer);
      buttons[i].hidden = !is;
      buttons[i].setAttribute("aria-pressed", `${i === shown.pane}`);
      buttons[i].tabIndex = i === shown.pane ? 0 : -1;
      if (is) buttons[i].querySelector("img").src = tlc.raster(tlc.view(n), valuesOf("trained", pane), scale, dotted(pane), 104);
    });
    const pane = panes[shown.pane];
    const means = [pane.meanOf(pane.trained, layer), pane.fresh ? pane.meanOf(pane.fresh, layer) : null];
    const ofSets = { trained: means[0], "fresh weights": means[1], difference: minus(...means) };
    for (const set of Object.keys(sets)) {
      Object.assign(maps[set], { values: valuesOf(set, pane), scale });
      maps[set].map.paint(maps[set].values, scale, set === "trained" ? dotted(pane) : () => false);
      maps[set].caption.replaceChildren(hasFresh ? set : "coupling", tlc.html("small", { "data-mean": set }, `mean ${tlc.quantity(shown.quantity, ofSets[set])}`));
    }
    part("title").textContent = `${pane.kind.title}, ${pane.sublayer}: ${tlc.quantities[shown.quantity]} of ${pane.kind.compared}`;
    const absent = measured.some((some) => some.kind.positions.length < n);
    const neutral = [data.diagonal_is_one && "diagonal, 1 by definition", absent && "not compared"].filter(Boolean);
    const swatches = neutral.length ? [["diagonal", neutral.join("; ")]] : [];
    if (undefinedCells) swatches.push(["undefined", "not defined"]);
    if (dots) swatches.push(tlc.undeterminedBases.swatch);
    const marks = shown.quantity === "coupling" ? [[pane.trained.mean.null[panes.filter((one) => one.kind === pane.kind).indexOf(pane)][pane.kind.layers.indexOf(layer)][pane.kind.ks.indexOf(tlc.choice.k)], "null"]] : [];
    part("colorbar").replaceChildren(...tlc.scaleBar({ low, high, scale, title: "all panes of the layer", swatches, marks }));
  };

  const drawAttention = () => {
    const { layer } = shown;
    const missing = !hasAttention(layer);
    part("no-attention").hidden = !missing;
    if (maps.attention) maps.attention.node.hidden = missing;
    part("heads").hidden = !hasHeads(layer);
    if (missing) {
      part("no-attention").textContent = attention
        ? `The attention patterns of layer ${layer} were not kept, because the prompt is long. In Python: tlc.analyze(model, prompt, token_layers=[${layer}]).`
        : "There are no attention patterns: the model has none, or this result contains only coupling.";
      return;
    }
    if (!hasHeads(layer)) shown.head = "mean";
    const at = attends(layer, shown.head);
    const select = tlc.html("select", { "aria-label": "Head", onchange: (event) => {
      shown.head = event.target.value === "mean" ? "mean" : Number(event.target.value);
      drawAttention();
    } });
    const options = hasHeads(layer) ? Array.from({ length: attention.heads.shape[1] }, (_, head) => head) : [];
    select.append(
      tlc.html("option", { value: "mean" }, "attention, mean over heads"),
      ...options.map((head) => tlc.html("option", { value: head }, `attention of head ${head}`)),
    );
    select.value = shown.head;
    maps.attention.caption.replaceChildren(select, tlc.html("small", {}, "square roots from 0 to 1"));
    // small shares of attention stay visible: colours go with the square root
    const roots = (r, c) => { const value = at(r, c); return value === undefined ? undefined : Math.sqrt(value); };
    Object.assign(maps.attention, { values: roots, scale: tlc.scale(1) });
    maps.attention.map.paint(roots, maps.attention.scale);
    drawPicture();
    if (hasHeads(layer)) drawHeads();
    else part("no-heads").hidden = false;
    part("no-heads").hidden = hasHeads(layer);
  };

  /** circuitsvis draws a window of the tokens, which ends with the chosen one. */
  const drawHeads = () => {
    const size = Math.min(n, data.attention.window);
    const to = Math.max(Math.min(Number(part("window").value) || n - 1, n - 1), size - 1);
    const first = to + 1 - size;
    part("window-shown").textContent = `tokens ${first} to ${to}`;
    const indices = Array.from({ length: size }, (_, i) => first + i);
    const patterns = Array.from({ length: attention.heads.shape[1] }, (_, head) => {
      const at = attends(shown.layer, head);
      return indices.map((r) => indices.map((c) => Math.round((at(r, c) ?? 0) * 1e4) / 1e4));
    });
    tlc.attentionHeads(part("attention"), patterns, indices.map((i) => tokens[i]), first, attention.causal);
  };
  const input = part("window");
  [input.min, input.max, input.value] = [Math.min(n, data.attention?.window ?? n) - 1, n - 1, n - 1];
  part("window-chooser").hidden = !data.attention || n <= data.attention.window;
  input.addEventListener("change", drawHeads);

  const draw = () => {
    drawCoupling();
    drawPicture();
    if (shown.cell) point(...shown.cell);
  };
  part("quantity").append(...tlc.quantitySwitch("pair-quantity", (quantity) => {
    shown.quantity = quantity;
    draw();
  }));
  [part("within").hidden, part("across").hidden] = [data.across, !data.across];
  part("no-fresh").hidden = hasFresh || !panes.length;
  const coarsest = data.kinds.flatMap((kind) => [kind.values, kind.fresh?.values]).filter(Boolean).sort((a, b) => b.scale - a.scale)[0];
  const blocks = (of) => (of > 1 ? `, the mean over a block of ${of} × ${of} tokens` : "");
  const exact = [
    coarsest && (tlc.isCoarse(coarsest) || data.kinds[0].pool > 1) && `coupling to ${tlc.precision(coarsest)}${blocks(data.kinds[0].pool)}`,
    attention && `attention to ±\u00a00.004 or better${attention.pool > 1 ? ` (the mean over heads${blocks(attention.pool)})` : ""}`,
  ].filter(Boolean);
  part("precision").textContent = exact.length ? `Precision of a cell: ${exact.join("; ")}. Means over all tokens are not rounded.` : "";
  part("readout").textContent = "Point at a cell, or focus a pane and use the arrow keys.";
  tlc.choice.on(["layer"], (layer) => {
    shown.layer = layer;
    part("layer").textContent = `${layer}`;
    drawAttention();
    draw();
  });
  tlc.choice.on(["k"], () => shown.layer !== null && draw());
  tlc.choice.on(["token"], (token) => {
    Object.values(maps).forEach(({ map }) => map.mark(token));
    if (shown.layer !== null) drawPicture();
    if (n > (data.attention?.window ?? n) && shown.layer !== null && hasHeads(shown.layer)) {
      input.value = Math.min(n - 1, token + Math.floor(data.attention.window / 2));
      drawHeads();
    }
  });
  tlc.inScheme(() => {
    panel.redraw();
    if (shown.layer === null) return;
    drawAttention();
    draw();
  });
};
