tlc.sections.header = (section, data) => {
  const cut = data.model.lastIndexOf("/") + 1;
  tlc.part(section, "model").append(
    tlc.html("span", { class: "owner" }, data.model.slice(0, cut)),
    data.model.slice(cut),
  );
  tlc.part(section, "headline").append(data.headline);
  tlc.part(section, "prompt").append(data.prompt);
  tlc.part(section, "facts").append(
    ...data.facts.map(([name, text]) => tlc.html("div", {}, tlc.html("dt", {}, name), tlc.html("dd", {}, text))),
  );
  tlc.part(section, "versions").append(data.versions);
};
