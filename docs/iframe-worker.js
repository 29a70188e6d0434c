// A page from disk may not start a worker, and the theme searches in one. There, run the worker's script in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.loaded = new Promise((resolve) => {
        document.body.append(this.frame);
        const inner = this.frame.contentDocument;
        inner.open();
        inner.write("<!doctype html><body><script>postMessage = (data) => parent.postMessage(data, '*');<\/script>");
        const script = inner.createElement("script");
        script.src = url;
        script.onload = resolve;
        inner.body.append(script);
        inner.close();
      });
      window.addEventListener("message", ({ source, data }) => {
        if (source === this.frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data }));
      });
    }

    postMessage(data) {
      // The frame's own postMessage now leads out of it.
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
