/* What two blocks share: the matrix behind their coupling, and the tokens of the directions on its diagonal. */

/** Fill the part of a section that shows a pair of layers; return {show(row layer, column layer, cell of their coupling at its token, or nothing)}. */
tlc.sharedDirections = (section, data) => {
  const part = (name) => tlc.part(section, `shared${name && "-"}${name}`);
  if (!data) {
    part("shown").hidden = true;
    part("missing").hidden = false;
    part("missing").textContent =
      "The matrices of single pairs were not kept. In Python: tlc.analyze(model, prompt, shared=True). On the command line: tlcoupling report --directions.";
    return { show: () => {}, redraw: () => {} };
  }
  const { layers, k, texts, scores, null: random } = data;
  const [values, chance] = [tlc.array(data.values), data.chance];
  part("bounds").textContent =
    `Measured with the report for blocks of ${layers.length === data.n_layers ? `all ${data.n_layers}` : `${layers.length} of ${data.n_layers}`} layers at token ` +
    `${tlc.named(data.position, data.token)}, the first ${k} singular vectors (entries to ${tlc.precision(data.values)}).`;

  const ranks = Array.from({ length: k }, (_, i) => `${i + 1}`);
  const shown = { row: 0, column: 0, cell: null };
  const entry = (i, j) => values.at(shown.row, shown.column, i, j);
  const point = (i, j) => {
    shown.cell = [i, j];
    map.point(i, j);
    const [from, to] = [layers[shown.row], layers[shown.column]];
    part("readout").textContent = `|u${i + 1}ᵀ J v${j + 1}|, Jacobian of layer ${from}, vectors of layer ${to}: ${tlc.number(entry(i, j), 3)}; by chance ${tlc.number(chance[shown.row], 3)}`;
  };
  const view = tlc.view(k);
  const axes = { row: "writes, uᵢ of the second layer", column: "reads, vⱼ of the second layer" };
  const map = tlc.heatmap({ labels: ranks, axes, label: `Projected Jacobian, ${k} by ${k}`, view, onpoint: point });
  part("map").append(map.node);
  part("map").addEventListener("keydown", tlc.cellKeys(view, () => shown.cell, point, () => {}));

  const words = (side, rank, end) => {
    const found = texts[shown.column][side][rank][end].map((text) => tlc.html("bdi", { class: "token" }, text));
    return tlc.html("span", { class: "words", title: `best score ${tlc.number(scores[shown.column][side][rank][end], 3)}` }, ...found);
  };
  const draw = () => {
    const [from, to] = [layers[shown.row], layers[shown.column]];
    let high = 0;
    for (let i = 0; i < k; i += 1) for (let j = 0; j < k; j += 1) high = Math.max(high, entry(i, j));
    map.paint(entry, tlc.scale(high || 1));
    part("chance").textContent = `0 to ${tlc.number(high, 2)}; unrelated bases ${tlc.number(chance[shown.row], 3)} an entry`;
    const order = Array.from({ length: k }, (_, i) => i).sort((a, b) => entry(b, b) - entry(a, a)).slice(0, 5);
    const table = tlc.table(
      ["direction", "entry", "chance", "reads", "writes"],
      order.flatMap((rank) =>
        [0, 1].map((end) => [
          `${rank + 1}${"+−"[end]}`,
          end ? "" : tlc.html("strong", {}, tlc.number(entry(rank, rank), 3)),
          end ? "" : tlc.number(chance[shown.row], 3),
          words(1, rank, end),
          words(0, rank, end),
        ]),
      ),
    );
    part("tokens").replaceChildren(table);
    const best = (side) => order.flatMap((rank) => scores[shown.column][side][rank]).reduce((sum, one, _, all) => sum + one / all.length, 0);
    part("scores").textContent =
      `Tokens of layer ${to}’s singular vectors, both ends. The best token’s score, mean over these directions: writes ${tlc.number(best(0), 2)} logits per unit (random directions ${tlc.number(random[0], 2)}), ` +
      `reads, cosine with the embedding, ${tlc.number(best(1), 2)} (random ${tlc.number(random[1], 2)}). Tokens near the random score (point at them) mean little.`;
  };

  return {
    show(row, column, cell, note = "") {
      const [r, c] = [row, column].map((layer) => layers.indexOf(layer));
      const measured = r >= 0 && c >= 0;
      part("missing").hidden = measured;
      part("shown").hidden = !measured;
      if (!measured) {
        part("missing").textContent = `Layers ${row} and ${column} are not both among those kept: ${layers.join(", ")}.`;
        return;
      }
      [shown.row, shown.column] = [r, c];
      part("title").textContent = `Jacobian of layer ${row}, bases of layer ${column}${note}${cell ? `: coupling ${tlc.number(cell.coupling)}, null ${tlc.number(cell.null)}${cell.undetermined ? tlc.undeterminedBases.readout : ""}` : ""}`;
      draw();
      if (shown.cell) point(...shown.cell);
    },
    redraw: draw,
  };
};
