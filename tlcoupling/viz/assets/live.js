/* The page in a notebook with a kernel: what is chosen in it goes to the kernel, which sends a page with more in it. */
export default {
  render({ model, el }) {
    const make = (name, properties) => Object.assign(document.createElement(name), properties);
    const status = make("p", { className: "tlcoupling-status" });
    status.setAttribute("role", "status");
    const frame = make("iframe", { sandbox: "allow-scripts", width: "100%", height: 900, style: "border: 0" });
    const link = make("a", { target: "_blank", href: "#", textContent: "open as a page" });
    const say = () => (status.textContent = model.get("status"));
    const show = () => (frame.srcdoc = model.get("page"));
    const tell = (about) => frame.contentWindow?.postMessage({ tlcoupling: about }, "*");
    const answer = () => tell({ answer: model.get("answer") });
    frame.addEventListener("load", () => tell({ live: true }));
    el.append(status, frame, link);
    say();
    show();
    const leave = host(frame, link);

    // a slider passes by many layers: the one that it stays at counts
    let settled;
    const choose = (event) => {
      if (event.source !== frame.contentWindow) return;
      const { chosen, asked } = event.data?.tlcoupling ?? {};
      if (asked) {
        // what is asked twice is asked anew: the page may have forgotten the answer
        model.set("asked", { ...asked, turn: Date.now() });
        model.save_changes();
      }
      if (!chosen) return;
      clearTimeout(settled);
      settled = setTimeout(() => {
        model.set("chosen", chosen);
        model.save_changes();
      }, 400);
    };
    addEventListener("message", choose);
    model.on("change:page", show);
    model.on("change:answer", answer);
    model.on("change:status", say);

    // the page that is saved with the notebook, for when there is no kernel
    const saved = document.querySelector(`[data-tlcoupling="${CSS.escape(model.get("key"))}"]`);
    if (saved) saved.hidden = true;
    return () => {
      if (saved) saved.hidden = false;
      removeEventListener("message", choose);
      leave();
    };
  },
};
