tlc.sections.controls = (section, data) => {
  const show = (name, count) => (tlc.part(section, `${name}-chooser`).hidden = count < 2);
  const { layers, compared, tokens, positions, measured, ks } = data;

  const slider = tlc.part(section, "layer");
  show("layer", layers.length);
  slider.max = Math.max(layers.length - 1, 0);
  slider.addEventListener("input", () => tlc.choice.set("layer", layers[Number(slider.value)]));
  tlc.part(section, "marks").append(
    ...compared.map((layer) => {
      const mark = tlc.html("i");
      mark.style.left = `${(100 * layers.indexOf(layer)) / Math.max(layers.length - 1, 1)}%`;
      return mark;
    }),
  );
  tlc.choice.on(["layer"], (layer) => {
    slider.value = layers.indexOf(layer);
    const what = compared.includes(layer) ? "tokens compared" : "attention only";
    slider.setAttribute("aria-valuetext", `layer ${layer}, ${what}`);
    tlc.part(section, "layer-shown").replaceChildren(`${layer}`, tlc.html("small", {}, what));
  });

  const token = tlc.part(section, "token");
  const option = (i) => tlc.html("option", { value: positions[i] }, tlc.named(positions[i], tokens[i]));
  const [known, others] = [true, false].map((wanted) =>
    positions.map((_, i) => i).filter((i) => measured.includes(positions[i]) === wanted),
  );
  show("token", positions.length);
  if (others.length) {
    token.append(
      tlc.html("optgroup", { label: "coupling across depth measured" }, ...known.map(option)),
      tlc.html("optgroup", { label: "not measured" }, ...others.map(option)),
    );
  } else token.append(...known.map(option));
  token.addEventListener("change", () => tlc.choice.set("token", Number(token.value)));
  tlc.choice.on(["token"], (position) => (token.value = position));

  const k = tlc.part(section, "k");
  show("k", ks.length);
  k.append(...ks.map((value) => tlc.html("option", { value }, `${value}`)));
  k.addEventListener("change", () => tlc.choice.set("k", Number(k.value)));
  tlc.choice.on(["k"], (value) => (k.value = value));

  section.hidden = [...section.querySelectorAll(".chooser")].every((chooser) => chooser.hidden);
  tlc.start = data.start;
  tlc.opened = data.opened;
  tlc.choices = { layer: layers, token: positions, k: [...ks] };
};
