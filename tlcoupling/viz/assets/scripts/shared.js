/* What two Jacobians share: the matrix behind their coupling, and the tokens of the directions on its diagonal. */

/** Fill a node with a panel; return {show(pair, numbers), say(text, how: whether a click shows a pair), bounds(text), redraw()}. */
tlc.sharedPanel = (node, heading) => {
  const parts = {};
  const part = (name, tag, attributes = {}, ...children) => (parts[name] = tlc.html(tag, { "data-part": `shared-${name}`, ...attributes }, ...children));
  const map = { class: "zoom", tabindex: 0, role: "group", "aria-label": "Projected Jacobian: arrow keys move between cells" };
  node.append(
    tlc.html("h3", {}, heading),
    part(
      "how",
      "p",
      { class: "note" },
      "Click a cell above, or press Enter on it. Row i, column j: how far the Jacobian J₁ of the row maps the j-th singular vector of the column, on one side, onto its i-th on the other. Where the two share directions, the diagonal is bright. ",
      part("bounds", "span"),
    ),
    part("missing", "p", { class: "note missing" }),
    part(
      "shown",
      "div",
      {},
      tlc.html("p", { class: "zoomed" }, part("title", "strong")),
      tlc.html(
        "div",
        { class: "columns halves" },
        tlc.html("figure", {}, tlc.html("figcaption", {}, part("formula", "span", { class: "formula" }), part("chance", "small")), part("map", "div", map), part("readout", "output", { class: "readout" })),
        tlc.html("figure", {}, tlc.html("figcaption", {}, "The directions that they share most"), part("tokens", "div", { class: "scroll" }), part("scores", "p", { class: "note" })),
      ),
    ),
  );
  let [pair, view, heat, cell] = [null, null, null, null];

  const point = (i, j) => {
    cell = [i, j];
    heat.point(i, j);
    const [left, right] = pair.bases === "uv" ? "uv" : "vu";
    parts.readout.textContent = `|${left}${i + 1}ᵀ J ${right}${j + 1}|, Jacobian of ${pair.row}, vectors of ${pair.column}: ${tlc.number(pair.entry(i, j), 3)}; by chance ${tlc.number(pair.chance, 3)}`;
  };
  const words = (side, rank, end) => {
    const found = pair.texts[side][rank][end].map((text) => tlc.html("bdi", { class: "token" }, text));
    return tlc.html("span", { class: "words", title: `best score ${tlc.number(pair.scores[side][rank][end], 3)}` }, ...found);
  };
  const draw = () => {
    if (!pair) return;
    const { k, entry, chance, scores, random } = pair;
    const ranks = Array.from({ length: k }, (_, i) => i);
    const high = Math.max(...ranks.flatMap((i) => ranks.map((j) => entry(i, j))));
    heat.paint(entry, tlc.scale(high || 1));
    parts.formula.textContent = pair.bases === "uv" ? "|U₂ᵀ J₁ V₂|" : "|V₂ᵀ J₁ U₂|";
    parts.chance.textContent = `0 to ${tlc.number(high, 2)}; unrelated bases ${tlc.number(chance, 3)} an entry`;
    const order = [...ranks].sort((a, b) => entry(b, b) - entry(a, a)).slice(0, 5);
    const table = tlc.table(
      ["direction", "entry", "chance", "reads", "writes"],
      order.flatMap((rank) =>
        [0, 1].map((end) => [
          `${rank + 1}${"+−"[end]}`,
          end ? "" : tlc.html("strong", {}, tlc.number(entry(rank, rank), 3)),
          end ? "" : tlc.number(chance, 3),
          words(1, rank, end),
          words(0, rank, end),
        ]),
      ),
    );
    parts.tokens.replaceChildren(table);
    const best = (side) => order.flatMap((rank) => scores[side][rank]).reduce((sum, one, _, all) => sum + one / all.length, 0);
    parts.scores.textContent =
      `Tokens of the singular vectors of ${pair.column}, both ends. The best token’s score, mean over these directions: writes ${tlc.number(best(0), 2)} logits per unit (random directions ${tlc.number(random[0], 2)}), ` +
      `reads, cosine with the embedding, ${tlc.number(best(1), 2)} (random ${tlc.number(random[1], 2)}). Tokens near the random score (point at them) mean little.`;
  };

  const say = (text, how = true) => {
    parts.how.hidden = !how;
    parts.missing.hidden = !text;
    parts.shown.hidden = Boolean(text) || !pair;
    parts.missing.textContent = text;
  };
  say("");

  return {
    say,
    redraw: draw,
    bounds: (text) => (parts.bounds.textContent = text),

    /**
     * Show what a pair shares: {title, row, column: names, k, entry(i, j), chance, bases, texts[side][rank][end], scores, random}.
     * numbers: {coupling, null, fresh: of fresh weights or undefined, undetermined} for the title, or nothing.
     */
    show(shown, numbers) {
      if (pair?.k !== shown.k) {
        view = tlc.view(shown.k);
        const axes = shown.bases === "uv" ? { row: "writes, uᵢ of the column", column: "reads, vⱼ of the column" } : { row: "reads, vᵢ of the column", column: "writes, uⱼ of the column" };
        const labels = Array.from({ length: shown.k }, (_, i) => `${i + 1}`);
        heat = tlc.heatmap({ labels, axes, label: `Projected Jacobian, ${shown.k} by ${shown.k}`, view, onpoint: point });
        parts.map.replaceChildren(heat.node);
        parts.map.onkeydown = tlc.cellKeys(view, () => cell, point, () => {});
        cell = null;
        parts.readout.textContent = "";
      }
      pair = shown;
      say("");
      const fresh = numbers?.fresh === undefined ? "" : `, fresh weights ${tlc.number(numbers.fresh)}`;
      const dots = numbers?.undetermined ? tlc.undeterminedBases.readout : "";
      parts.title.textContent = pair.title + (numbers ? `: coupling ${tlc.number(numbers.coupling)}, null ${tlc.number(numbers.null)}${fresh}${dots}` : "");
      draw();
      if (cell) point(...cell);
    },
  };
};

/** Let a panel show the pairs that a kernel answers, if wanted(asked); named(asked) gives {title, row, column}. */
tlc.answeredPairs = (panel, wanted, named) =>
  tlc.kernel.hear(({ asked, found, refusal }) => {
    if (asked.what !== "pair" || !wanted(asked)) return;
    if (refusal) panel.say(`Not measured: ${refusal}`);
    else {
      const { title, ...names } = named(asked);
      const entry = (i, j) => found.values[i][j];
      panel.show({ ...found, ...names, title: `${title}, K = ${found.k}`, entry }, { ...found, undetermined: !found.determined });
    }
  });
