// Search from the disk: browsers start no worker there, so its script runs in a hidden frame instead.
// The theme's offline plugin would load a script for this from the network if it were not here.
"use strict";

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #waiting = [];
    #inside = null;

    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...addresses) => Promise.all(addresses.map((a) => run(inside, a)));
      run(inside, address).then(() => {
        this.#inside = inside;
        for (const data of this.#waiting) this.postMessage(data);
      });
    }

    postMessage(data) {
      if (this.#inside) this.#inside.dispatchEvent(new MessageEvent("message", { data }));
      else this.#waiting.push(data);
    }
  };

  const run = (inside, address) => new Promise((done, fail) => {
    const script = inside.document.createElement("script");
    Object.assign(script, { src: new URL(address, location.href), onload: done, onerror: fail });
    inside.document.head.append(script);
  });
}
