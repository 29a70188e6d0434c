/* What the reader has chosen, for the whole page: a layer, a token (its position) and K. Sections listen to it. */

tlc.choice = {
  layer: null,
  token: null,
  k: null,
  listeners: { layer: [], token: [], k: [] },

  on(names, listen) {
    names.forEach((name) => this.listeners[name].push(listen));
  },

  set(name, value) {
    if (this[name] === value) return;
    this[name] = value;
    this.listeners[name].forEach((listen) => listen(value));
  },
};

/** The token that the reader points at, which need not be the one chosen. */
tlc.token = {
  listeners: [],
  point: (position) => tlc.token.listeners.forEach((listen) => listen(position)),
};
