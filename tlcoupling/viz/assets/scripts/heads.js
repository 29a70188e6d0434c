/* Coupling of a layer's heads, which a kernel measures when it is asked; a pair of them opens what they share. */

/** Fill the parts of a section that show it; open(layer, token, row, column) opens a pair of heads. */
tlc.headCoupling = (part, open) => {
  const button = part("head-ask");
  let drawn = null;
  const name = () => (button.textContent = `Compare the heads of layer ${tlc.choice.layer} at token ${tlc.choice.token}`);
  tlc.choice.on(["layer", "token"], name);
  tlc.kernel.ready(() => {
    part("head-coupling").hidden = false;
    name();
  });
  button.addEventListener("click", () => {
    part("head-missing").hidden = false;
    part("head-missing").textContent = "Measuring the coupling of heads …";
    const { layer, token, k } = tlc.choice;
    tlc.kernel.ask({ what: "heads", layer, token, k });
  });

  const show = ({ layer, token }, found) => {
    const n = found.values.length;
    const cellOf = (r, c) => (r === c && found.diagonal_is_one ? undefined : tlc.comparison(found.values[r][c], found.null[r][c], found.std[r][c]));
    const view = tlc.view(n);
    let cell = null;
    const point = (r, c) => {
      cell = [r, c];
      map.point(r, c);
      const at = cellOf(r, c);
      const related = found.related?.[r][c] && r !== c ? "; they share keys and values" : "";
      part("head-readout").textContent = `Jacobian of head ${r}, bases of head ${c}: ${at ? tlc.inWords({ ...at, undetermined: found.undetermined?.[c] }, 4) : "1 by definition"}${related}`;
    };
    const choose = (r, c) => open(layer, token, r, c);
    const labels = Array.from({ length: n }, (_, i) => `${i}`);
    const map = tlc.heatmap({ labels, axes: { row: "Jacobian of head", column: "bases of head" }, label: `Coupling of heads, ${n} by ${n}`, view, onpoint: point, onchoose: choose });
    part("head-map").replaceChildren(map.node);
    part("head-map").onkeydown = tlc.cellKeys(view, () => cell, point, choose);
    const valueAt = (r, c) => cellOf(r, c)?.excess;
    const range = tlc.range();
    for (let r = 0; r < n; r += 1) for (let c = 0; c < n; c += 1) range.add(valueAt(r, c));
    const { low, high, limit } = range.result();
    part("head-caption").replaceChildren(`layer ${layer}, token ${token}`, tlc.html("small", {}, `excess, ${tlc.number(low, 3)} to ${tlc.number(high, 3)}; mean ${tlc.number(found.mean)}`));
    drawn = () => map.paint(valueAt, tlc.scale(limit));
    drawn();
  };
  tlc.kernel.hear(({ asked, found, refusal }) => {
    if (asked.what !== "heads") return;
    part("head-coupling").hidden = false;
    part("head-missing").hidden = !refusal;
    part("head-missing").textContent = refusal ? `Not measured: ${refusal}` : "";
    if (found) show(asked, found);
  });
  tlc.inScheme(() => drawn?.());
};
