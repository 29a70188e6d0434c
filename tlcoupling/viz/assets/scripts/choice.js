/* The selection of the whole page: a layer, a token (its position) and K. Sections listen for changes. */

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

/** The token under the pointer, which may differ from the selected one. */
tlc.token = {
  listeners: [],
  point: (position) => tlc.token.listeners.forEach((listen) => listen(position)),
};
