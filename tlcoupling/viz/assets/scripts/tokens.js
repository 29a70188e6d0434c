tlc.sections.tokens = (section, data) => {
  const numbers = {
    lss: { label: "LSS", digits: 3, log: false },
    ed: { label: "ED", digits: 2, log: true },
    cv: { label: "CV", digits: 2, log: true },
    norm: { label: "final norm", digits: 1, log: true },
    attn_share: { label: "attention’s share of growth", digits: 4, log: false },
    mlp_share: { label: "MLP’s share of growth", digits: 4, log: false },
  };
  tlc.part(section, "shares").hidden = !data.attn_share;
  for (const name of Object.keys(numbers)) if (!data[name]) delete numbers[name];
  const value = (name, i) => tlc.number(data[name][i], numbers[name]?.digits ?? 4);
  const describe = (i) =>
    `${i} “${data.tokens[i]}”: LSS ${value("lss", i)}, ED ${value("ed", i)}, final norm ${value("norm", i)}, ` +
    `rate ${value("rate", i)}${data.attn_share ? ` (attention ${value("attn_share", i)}, MLP ${value("mlp_share", i)})` : ""}, ` +
    `R² ${tlc.number(data.r_squared[i], 3)}`;
  tlc.part(section, "random").append(`${tlc.number(Math.sqrt(data.n_steps), 2)} for ${data.n_steps} blocks`);

  const readout = tlc.part(section, "readout");
  readout.textContent = "Point at a token, or focus the row and use the arrow keys. A click or Enter selects it.";
  const point = (i) => {
    readout.textContent = describe(i);
    tlc.token.point(i);
  };

  const choose = (i) => {
    point(i);
    tlc.choice.set("token", i);
  };

  const chips = data.tokens.map((text, i) =>
    tlc.html(
      "button",
      { type: "button", tabindex: i ? -1 : 0, title: describe(i), onpointerenter: () => point(i), onclick: () => choose(i) },
      tlc.html("bdi", {}, text),
    ),
  );
  chips.forEach((chip, i) => {
    chip.addEventListener("focus", () => {
      chips.forEach((other) => (other.tabIndex = other === chip ? 0 : -1));
      point(i);
    });
    chip.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      chips[i + step]?.focus();
    });
  });
  tlc.part(section, "row").append(...chips.map((chip) => tlc.html("li", {}, chip)));

  tlc.choice.on(["token"], (position) =>
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", `${i === position}`)),
  );

  let shown = "lss";
  const draw = () => {
    const { log, digits, label } = numbers[shown];
    const usable = (x) => x !== null && (!log || x > 0);
    const scaled = (x) => (log ? Math.log(x) : x);
    const { low, high } = tlc.extent(data[shown].filter(usable).map(scaled));
    const tint = tlc.tint();
    const share = (x) => (high > low ? (x - low) / (high - low) : 0.5);
    chips.forEach((chip, i) => {
      const x = data[shown][i];
      const colors = usable(x) ? tint(share(scaled(x))) : { background: "", text: "" };
      chip.classList.toggle("undefined", !usable(x));
      chip.style.background = colors.background;
      chip.style.color = colors.text;
    });
    const end = (x) => tlc.number(log ? Math.exp(x) : x, digits);
    tlc.part(section, "colorbar").replaceChildren(
      tlc.html("span", { class: "label" }, log ? `${label}, log scale` : label),
      tlc.colorbar({
        low,
        high: high > low ? high : low + 1,
        color: (x) => tint(share(x)).background,
        labels: [[0, end(low)], [1, end(high)]],
        description: `Colour scale of ${label} from ${end(low)} to ${end(high)}`,
      }),
    );
  };
  for (const [name, { label }] of Object.entries(numbers)) {
    const input = tlc.html("input", { type: "radio", name: "color-by", value: name });
    input.checked = name === shown;
    input.addEventListener("change", () => {
      shown = name;
      draw();
    });
    tlc.part(section, "switch").append(tlc.html("label", {}, input, label));
  }

  const rows = (order) =>
    tlc.table(
      ["token", "LSS", "ED", "final norm"],
      order.map((i) => [
        tlc.html("span", {}, tlc.html("small", {}, `${i}`), tlc.html("bdi", { class: "token" }, data.tokens[i])),
        value("lss", i),
        value("ed", i),
        value("norm", i),
      ]),
    );
  tlc.part(section, "most").append(rows(data.most));
  tlc.part(section, "least").append(rows(data.least));
  tlc.inScheme(draw);
};
