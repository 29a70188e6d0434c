/* Measures on request: charts of a chosen quantity, one for each sublayer, beside chance and a baseline. */

tlc.sections.measures = (section, data) => {
  const roles = { model: ["coupling", "the model"], chance: ["null", "chance"], baseline: ["fresh", "baseline"], baseline_chance: ["fresh-null", "its chance"] };
  const charts = data.flatMap((measure) => measure.charts);
  const used = Object.entries(roles).filter(([role]) => charts.some(({ lines }) => lines[role]));
  tlc.part(section, "no-baseline").hidden = data.every((measure) => measure.has_baseline);
  tlc.part(section, "legend").append(...tlc.legend(used.map(([, entry]) => entry)));

  const inWords = (values) =>
    Object.entries(values).map(([role, value]) => `${role === "model" ? "" : `${roles[role][1]} `}${tlc.number(value)}`).join(", ");
  const each = (lines, then) => Object.fromEntries(Object.entries(lines).map(([role, values]) => [role, then(values)]));

  const draw = ({ title, axis, labels, logarithmic, lines }, point) => {
    const scaled = each(lines, (values) => values.map((value) => (value === null || !logarithmic ? value : value > 0 ? Math.log10(value) : null)));
    const { svg, marks, at, onmove } = tlc.axes({
      width: 360,
      height: 240,
      x: { low: labels[0], high: labels[labels.length - 1], label: axis },
      y: { ...tlc.extent(Object.values(scaled).flat()), label: logarithmic ? "log₁₀" : "" },
      description: `${title}, by ${axis}`,
    });
    const drawn = Object.keys(roles).reverse().filter((role) => scaled[role]);
    marks.append(...drawn.map((role) => tlc.line(at, scaled[role].map((value, i) => [labels[i], value]), roles[role][0])));
    const nearest = (x) => labels.reduce((best, label, i) => (Math.abs(label - x) < Math.abs(labels[best] - x) ? i : best), 0);
    onmove((x) => point(nearest(x)), (x) => axis === "layer" && tlc.choice.set("layer", labels[nearest(x)]));
    const readout = tlc.html("output", { class: "readout" });
    const show = (i) => (readout.textContent = `${axis} ${labels[i]}: ${inWords(each(lines, (values) => values[i]))}`);
    const caption = tlc.html("figcaption", {}, title, tlc.html("small", {}, `mean ${inWords(each(lines, tlc.mean))}`));
    return { show, last: labels.length - 1, node: tlc.html("figure", {}, caption, svg, readout) };
  };

  for (const measure of data) {
    const groups = [...new Set(measure.charts.map(({ group }) => group))];
    const shown = { index: -1, charts: [] };
    const point = (i) => {
      shown.index = Math.max(0, Math.min(i, shown.charts[0].last));
      shown.charts.forEach(({ show }) => show(shown.index));
    };
    const keydown = (event) => {
      const layers = shown.charts[0].axis === "layer" && shown.charts[0].labels;
      if (event.key === "Enter" && layers && shown.index >= 0) tlc.choice.set("layer", layers[shown.index]);
      else if (event.key === "ArrowLeft" || event.key === "ArrowRight") point(shown.index + (event.key === "ArrowLeft" ? -1 : 1));
      else return;
      event.preventDefault();
    };
    const row = tlc.html("div", { class: "columns thirds", tabindex: 0, role: "group", "aria-label": `${measure.title}: arrow keys move along the axis`, onkeydown: keydown });
    const choose = (group) => {
      shown.charts = measure.charts.filter((chart) => chart.group === group).map((chart) => ({ ...chart, ...draw(chart, point) }));
      shown.index = -1;
      row.replaceChildren(...shown.charts.map(({ node }) => node));
    };
    const options = groups.map((group) => tlc.html("option", {}, group));
    const select = tlc.html("select", { onchange: (event) => choose(event.target.value) }, ...options);
    const rows = measure.rows.map(([name, ...numbers]) => [name, ...numbers.map((value) => tlc.number(value))]);
    tlc.part(section, "measures").append(
      tlc.html("div", { "data-measure": measure.name },
        tlc.html("h3", {}, measure.title),
        tlc.html("p", { class: "note" }, measure.note),
        tlc.html("label", { class: "chooser" }, tlc.html("span", {}, "Quantity"), select),
        row,
        tlc.html("details", {}, tlc.html("summary", {}, "As a table"), tlc.html("div", { class: "scroll" }, tlc.table(measure.columns, rows)))),
    );
    choose(groups[0]);
  }
};
