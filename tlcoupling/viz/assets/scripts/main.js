{
  /** What the address chooses, such as #layer=15&token=27. */
  const fromAddress = () => Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].map(([name, value]) => [name, Number(value)]));
  const names = ["layer", "token", "k"];

  const start = async () => {
    const data = await tlc.unpack(document.getElementById("data").textContent);
    for (const [name, draw] of Object.entries(tlc.sections)) {
      const section = document.querySelector(`[data-section="${name}"]`);
      if (!section) continue;
      draw(section, data[name]);
      performance.mark(name);
      await new Promise((next) => setTimeout(next)); // the headline is in sight before large panes are drawn
    }
    const allowed = (name, value) => (tlc.choices[name] ?? []).includes(value);
    for (const [name, value] of Object.entries(tlc.start ?? {})) {
      const wanted = fromAddress()[name];
      tlc.choice.set(name, allowed(name, wanted) ? wanted : value);
    }
    if (location.protocol !== "about:")
      tlc.choice.on(names, () => {
        const chosen = names.filter((name) => tlc.choice[name] !== null).map((name) => `${name}=${tlc.choice[name]}`);
        history.replaceState(null, "", `#${chosen.join("&")}`);
      });
    if (parent !== window)
      tlc.choice.on(names, () => {
        const chosen = Object.fromEntries(names.map((name) => [name, tlc.choice[name]]));
        parent.postMessage({ tlcoupling: { chosen } }, "*");
      });
    document.documentElement.dataset.drawn = "";
  };
  start().catch((error) => {
    document.querySelector("main").prepend(tlc.html("p", { class: "note missing" }, `This browser cannot show the page: ${error}`));
    throw error;
  });

  // a page that frames this one makes the frame as high as its content; it tells its scheme once it listens
  if (parent !== window) {
    const tell = () => parent.postMessage({ tlcoupling: { height: document.documentElement.offsetHeight } }, "*");
    new ResizeObserver(tell).observe(document.documentElement);
    addEventListener("message", (event) => {
      if (event.source === parent && event.data?.tlcoupling?.scheme) tell();
    });
  }
}
