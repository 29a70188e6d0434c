/* circuitsvis's AttentionHeads draws tokens on a canvas, where no token can become markup. */

{
  /** Run the compressed bundle in the page; its hash is in the page's Content-Security-Policy. */
  const load = async () => {
    const text = await tlc.inflate(document.getElementById("circuitsvis-bundle").textContent);
    document.head.append(tlc.html("script", {}, text));
  };
  let loaded = null;
  let serial = 0;

  /** The head selectors listen only to the mouse: send the same events from the keyboard. */
  const addKeyboard = (root) =>
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

  /**
   * Draw [head][dest][src] patterns of a window of tokens, from the position `first` on, into an element; causal: whether
   * the upper triangle is empty. If calls overlap, the last one wins.
   */
  tlc.attentionHeads = async (container, patterns, tokens, first, causal) => {
    // circuitsvis numbers tokens from 0 on by what map tells it: tell it their positions in the prompt
    tokens.map = (label) => Array.prototype.map.call(tokens, (text, i) => label(text, first + i));
    serial += 1;
    const mine = serial;
    try {
      await (loaded ??= load());
    } catch (error) {
      container.replaceChildren(tlc.html("p", { class: "note" }, `This browser cannot decompress the attention patterns: ${error}`));
      return;
    }
    if (mine !== serial) return;
    // React keeps a reference to an element that it draws into. A new element each time lets the old one be freed.
    const root = tlc.html("div", { class: "circuitsvis", id: `circuitsvis-${mine}` });
    container.replaceChildren(root);
    new MutationObserver(() => addKeyboard(root)).observe(root, { childList: true, subtree: true });
    CircuitsVis.render(root.id, CircuitsVis.AttentionHeads, {
      attention: patterns,
      tokens,
      maskUpperTri: causal,
      maxValue: 1,
      minValue: -1,
      positiveColor: "#0b4f9e",
      negativeColor: "#b85c1e",
    });
  };
}
