/* circuitsvis's AttentionHeads draws tokens on a canvas, so that no token can become markup there. */
tlc.sections.attention = (section, data) => {
  tlc.part(section, "layer").append(`${data.layer}`);
  if (data.first > 0) {
    tlc.part(section, "cut").append(
      ` Only the last ${data.tokens.length} of ${data.n_tokens} tokens are drawn, so that rows do not add up to 1 here.`,
    );
  }
  CircuitsVis.render("circuitsvis", CircuitsVis.AttentionHeads, {
    attention: data.patterns,
    tokens: data.tokens,
    maxValue: 1,
    minValue: -1,
    positiveColor: "#0b4f9e",
    negativeColor: "#b85c1e",
  });

  // Its head selectors listen to the mouse alone: give the keyboard the same events.
  const root = document.getElementById("circuitsvis");
  const reach = () => {
    root.querySelectorAll("h4").forEach((name) => {
      const head = name.parentElement.parentElement;
      if (head.tabIndex === 0) return;
      head.tabIndex = 0;
      head.setAttribute("role", "button");
      head.setAttribute("aria-label", name.textContent);
      const send = (type) => head.dispatchEvent(new MouseEvent(type, { bubbles: true }));
      head.addEventListener("focus", () => send("mouseover"));
      head.addEventListener("blur", () => send("mouseout"));
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        send("click");
      });
    });
  };
  new MutationObserver(reach).observe(root, { childList: true, subtree: true });
};
