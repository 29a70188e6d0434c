/* Around a page's frame: makes the frame as high as its page, gives it the host's colour scheme, opens it as a page. */
const host = (frame, link) => {
  link.hidden = false;
  link.addEventListener("click", () => {
    link.href = URL.createObjectURL(new Blob([frame.srcdoc], { type: "text/html" }));
  });

  /** Dark if what lies behind the frame is. */
  const schemeOf = () => {
    for (let node = frame; node; node = node.parentElement) {
      const [r, g, b, a = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
      if (a > 0.5) return 0.299 * r + 0.587 * g + 0.114 * b < 128 ? "dark" : "light";
    }
    return "light";
  };
  const tell = () => frame.contentWindow?.postMessage({ tlcoupling: { scheme: schemeOf() } }, "*");
  const fit = (event) => {
    const height = event.data?.tlcoupling?.height;
    if (event.source !== frame.contentWindow || !(height > 0)) return;
    frame.style.height = `${Math.ceil(height)}px`;
  };
  // the page answers with its height, also where it said it before this script ran
  addEventListener("message", fit);
  frame.addEventListener("load", tell);
  tell();
  const changes = new MutationObserver(tell);
  for (const node of [document.documentElement, document.body]) changes.observe(node, { attributes: true });
  return () => {
    removeEventListener("message", fit);
    frame.removeEventListener("load", tell);
    changes.disconnect();
  };
};
