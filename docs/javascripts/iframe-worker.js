// Lets the search of the site work from files: browsers start no worker from file://, so a hidden frame runs the worker's script.
// The theme would fetch such a script from a content delivery network; this one travels with the pages. Elsewhere it does nothing.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {  // the search script looks for the second name
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script src="${url}"></` + "script>";
      frame.addEventListener("load", () => this.begin(frame.contentWindow), { once: true });
      const attach = () => document.body.append(frame);
      if (document.body) attach();
      else document.addEventListener("DOMContentLoaded", attach, { once: true });
    }

    begin(inside) {
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside = inside;
      this.waiting.forEach((data) => this.postMessage(data));
    }

    postMessage(data) {
      if (this.inside) this.inside.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
  };
}
