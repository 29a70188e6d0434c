/* Colours of numbers. The ramps are custom properties of the style sheet, so the light or dark scheme selects them. */

{
  const property = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const channels = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));

  const ramp = (name) => {
    const anchors = property(name).split(/\s+/).map(channels);
    return (share) => {
      const position = Math.min(Math.max(share, 0), 1) * (anchors.length - 1);
      const low = Math.min(Math.floor(position), anchors.length - 2);
      return anchors[low].map((from, i) => Math.round(from + (anchors[low + 1][i] - from) * (position - low)));
    };
  };

  const css = (color) => `rgb(${color.join(" ")})`;

  /** value -> [red, green, blue]: 0 is the start of the ramp and limit its end. Negative values have a separate ramp. */
  tlc.channels = (limit) => {
    const steps = 512;
    const table = (name) => {
      const of = ramp(name);
      return Array.from({ length: steps + 1 }, (_, i) => of(i / steps));
    };
    const [positive, negative, none] = [table("--ramp"), table("--ramp-negative"), channels(property("--undefined"))];
    return (value) => {
      if (value === null) return none;
      return (value < 0 ? negative : positive)[Math.min(Math.round((Math.abs(value) / limit) * steps), steps)];
    };
  };

  /** value -> the same colour for a style sheet. */
  tlc.scale = (limit) => {
    const color = tlc.channels(limit);
    return Object.assign((value) => css(color(value)), { channels: color });
  };

  /** share from 0 to 1 -> background and a readable text colour. */
  tlc.tint = () => {
    const tint = ramp("--ramp");
    return (share) => {
      const color = tint(share);
      const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
      const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
      return { background: css(color), text: luminance > 0.18 ? "#10151b" : "#ffffff" };
    };
  };

  /** The channels of cells outside the scale, and of the border and the centre of a dot that stands out on every colour. */
  tlc.outside = () => ["--diagonal", "--page", "--ink"].map((name) => channels(property(name)));

  // The colour scheme is the reader's, unless the page that frames this one has another. Paper is light.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const scheme = { host: null, printing: false, listeners: [] };
  const follow = () => {
    const name = scheme.printing ? "light" : (scheme.host ?? (dark.matches ? "dark" : "light"));
    if (document.documentElement.dataset.scheme === name) return;
    document.documentElement.dataset.scheme = name;
    scheme.listeners.forEach((draw) => draw());
  };
  follow();
  dark.addEventListener("change", follow);
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]])
    addEventListener(event, () => {
      scheme.printing = printing;
      follow();
    });
  addEventListener("message", (event) => {
    if (event.source !== parent || !["dark", "light"].includes(event.data?.tlcoupling?.scheme)) return;
    scheme.host = event.data.tlcoupling.scheme;
    follow();
  });

  /** Run now, and again when the colour scheme changes. */
  tlc.inScheme = (draw) => {
    draw();
    scheme.listeners.push(draw);
  };

  /** Make a colour bar from low to high; color maps a value to a colour, labels are pairs of share and text. */
  tlc.colorbar = ({ low, high, color, labels, description }) => {
    const stops = Array.from({ length: 33 }, (_, i) => color(low + ((high - low) * i) / 32));
    const bar = tlc.html("div", { class: "bar" });
    bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const ticks = labels.map(([share, text]) => {
      const tick = tlc.html("span", {}, text);
      tick.style.left = `${100 * share}%`;
      return tick;
    });
    return tlc.html("div", { class: "colorbar", role: "img", "aria-label": description }, bar, ...ticks);
  };
}
