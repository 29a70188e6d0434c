/* circuitsvis's AttentionHeads draws tokens on a canvas, so that no token can become markup there. */

{
  /** Run the bundle that the page carries compressed; its hash is in the page's policy. */
  const load = async () => {
    const text = await tlc.inflate(document.getElementById("circuitsvis-bundle").textContent);
    document.head.append(tlc.html("script", {}, text));
  };
  let loaded = null;
  let serial = 0;

  /** Its head selectors listen to the mouse alone: give the keyboard the same events. */
  const reach = (root) =>
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

  /** Draw [head][dest][src] patterns into a place; the last call wins where several overlap. */
  tlc.attentionHeads = async (place, patterns, tokens) => {
    serial += 1;
    const mine = serial;
    try {
      await (loaded ??= load());
    } catch (error) {
      place.replaceChildren(tlc.html("p", { class: "note" }, `This browser cannot unpack the attention patterns: ${error}`));
      return;
    }
    if (mine !== serial) return;
    // React keeps what it has drawn into; a fresh element each time is let go with all that is in it.
    const root = tlc.html("div", { class: "circuitsvis", id: `circuitsvis-${mine}` });
    place.replaceChildren(root);
    new MutationObserver(() => reach(root)).observe(root, { childList: true, subtree: true });
    CircuitsVis.render(root.id, CircuitsVis.AttentionHeads, {
      attention: patterns,
      tokens,
      maxValue: 1,
      minValue: -1,
      positiveColor: "#0b4f9e",
      negativeColor: "#b85c1e",
    });
  };
}
