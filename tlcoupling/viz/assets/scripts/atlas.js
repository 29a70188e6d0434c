/* The sensitivity atlas: a quantity of the slices between all pairs of layers, of the model, its baseline and their difference. */

tlc.sections.atlas = (section, data) => {
  const part = (name) => tlc.part(section, name);
  const labels = data.layers.map(String);
  const view = tlc.view(labels.length);
  const shown = { quantity: data.quantities[0], cell: null };
  const valueOf = {
    model: (r, c) => shown.quantity.model[r][c],
    baseline: (r, c) => shown.quantity.baseline[r][c],
    difference: (r, c) => {
      const [here, there] = [shown.quantity.model[r][c], shown.quantity.baseline[r][c]];
      return here === null || there === null ? null : here - there;
    },
  };
  const between = (valueAt) => (r, c) => (r < c ? valueAt(r, c) : undefined); // a slice ends behind its source
  const point = (r, c) => {
    shown.cell = [r, c];
    maps.forEach(({ map }) => map.point(r, c));
    const words = maps.map(({ name, valueAt }) => `${name} ${tlc.number(valueAt(r, c))}`).join(", ");
    part("readout").textContent = `From layer ${labels[r]} to layer ${labels[c]}: ${r < c ? words : "no slice, since the target is not behind the source"}`;
  };
  const roles = { model: "the model", ...(data.has_baseline ? { baseline: "baseline", difference: "difference" } : {}) };
  const maps = Object.entries(roles).map(([role, name]) => {
    const map = tlc.heatmap({ labels, axes: { row: "source layer", column: "target layer" }, label: `Slices of ${name}, ${labels.length} by ${labels.length} layers`, view, onpoint: point });
    const caption = tlc.html("figcaption");
    return { name, map, caption, valueAt: between(valueOf[role]), node: tlc.html("figure", {}, caption, map.node) };
  });
  const draw = () => {
    const all = tlc.range();
    const means = maps.map(({ valueAt }) => {
      const values = labels.flatMap((_, r) => labels.map((_, c) => valueAt(r, c))).filter((value) => value !== undefined);
      values.forEach((value) => all.add(value));
      return tlc.mean(values);
    });
    const { low, high, limit, undefinedCells } = all.result();
    const scale = tlc.scale(limit);
    maps.forEach(({ name, map, caption, valueAt }, i) => {
      map.paint(valueAt, scale);
      caption.replaceChildren(name, tlc.html("small", {}, `mean ${tlc.number(means[i])}`));
    });
    const swatches = [["diagonal", "no slice"], ...(undefinedCells ? [["undefined", "not defined"]] : [])];
    part("colorbar").replaceChildren(...tlc.scaleBar({ low, high, scale, title: shown.quantity.scale, swatches }));
    if (shown.cell) point(...shown.cell);
  };
  part("note").textContent = data.note;
  part("no-baseline").hidden = data.has_baseline;
  part("quantity").append(...data.quantities.map(({ title }) => tlc.html("option", {}, title)));
  part("quantity").addEventListener("change", ({ target }) => {
    shown.quantity = data.quantities[target.selectedIndex];
    draw();
  });
  part("maps").addEventListener("keydown", tlc.cellKeys(view, () => shown.cell, point, () => {}));
  part("maps").append(...maps.map(({ node }) => node));
  tlc.inScheme(draw);
};
