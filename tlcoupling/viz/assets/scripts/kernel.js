/* The kernel of a live notebook (viz.Live), where there is one: it measures what the page asks. */

tlc.kernel = {
  there: false,
  listeners: [],
  answered: [],

  /** Ask for {what, ...}; those who listen hear the answer, {asked, found} or {asked, refusal}. */
  ask: (asked) => parent.postMessage({ tlcoupling: { asked } }, "*"),

  /** Hear all answers, and those that came with the page. */
  hear(listen) {
    this.answered.push(listen);
    (tlc.opened ?? []).forEach(listen);
  },

  /** Run once a kernel is there. */
  ready(run) {
    if (this.there) run();
    else this.listeners.push(run);
  },
};

addEventListener("message", (event) => {
  if (event.source !== parent) return;
  const { live, answer } = event.data?.tlcoupling ?? {};
  if (live && !tlc.kernel.there) {
    tlc.kernel.there = true;
    tlc.kernel.listeners.forEach((run) => run());
  }
  if (answer) tlc.kernel.answered.forEach((listen) => listen(answer));
});
