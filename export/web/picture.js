/** Draws which slots each head reads and writes over time, as in the paper's Figure 5. */

const TOKENS = 256; // columns
const ROWS = 256; // the most; a row then stands for several slots
const DOT = 2; // pixels of a slot at a token, each way

export class Picture {
  #parent;
  #sizes;
  #starts; // where each layer begins in a column, and the end of the last
  #rows;
  #canvases; // of the layer's heads
  #columns = []; // the last tokens, each [2, heads, topK] of every layer
  #layer = 0;
  #waits = false;

  constructor(parent, config, sizes) {
    this.#parent = parent;
    this.#sizes = sizes;
    this.#starts = [0];
    sizes.heads.forEach((heads, i) => this.#starts.push(this.#starts[i] + 2 * heads * sizes.topK[i]));
    this.config = config;
    this.show(0);
  }

  add(accesses) {
    const size = this.#starts.at(-1);
    for (let at = 0; at < accesses.length; at += size) this.#columns.push(accesses.subarray(at, at + size));
    this.#columns.splice(0, Math.max(0, this.#columns.length - TOKENS));
    this.redraw();
  }

  show(layer) {
    const { cape_full_layers: full, cape_half_layers: half } = this.config;
    const heads = this.#sizes.heads[layer];
    this.#rows = Math.min(this.#sizes.slots[layer], ROWS);
    this.#canvases = Array.from({ length: heads }, () => {
      const canvas = Object.assign(document.createElement("canvas"), { width: TOKENS * DOT, height: this.#rows * DOT });
      canvas.setAttribute("role", "img");
      return canvas;
    });
    this.#parent.replaceChildren(
      ...this.#canvases.map((canvas) => {
        const figure = document.createElement("figure");
        figure.append(canvas, document.createElement("figcaption"));
        return figure;
      }),
    );
    const moving = layer < full ? heads : layer < full + half ? Math.floor(heads / 2) : 0;
    this.#layer = layer;
    this.#canvases.forEach((canvas, head) => {
      canvas.nextSibling.textContent = `Head ${head + 1}: addresses ${head < moving ? "move (CAPE)" : "stay"}`;
    });
    this.describe();
    this.redraw();
  }

  clear() {
    this.#columns = [];
    this.describe();
    this.redraw();
  }

  /** State the last token's slots in words. */
  describe() {
    const last = this.#columns.at(-1);
    this.#canvases.forEach((canvas, head) => {
      const [read, written] = [0, 1].map((side) => (last ? Array.from(this.#slots(last, side, head)).join(", ") : ""));
      const words = last ? `the last token read slots ${read} and wrote slots ${written}` : "no token was read";
      canvas.setAttribute("aria-label", `${canvas.nextSibling.textContent}; ${words}`);
    });
  }

  #slots(column, side, head) {
    const topK = this.#sizes.topK[this.#layer];
    const at = this.#starts[this.#layer] + (side * this.#canvases.length + head) * topK;
    return column.subarray(at, at + topK);
  }

  redraw() {
    if (this.#waits) return;
    this.#waits = true;
    requestAnimationFrame(() => {
      this.#waits = false;
      const style = getComputedStyle(document.documentElement);
      const colours = ["--read", "--written", "--both"].map((name) => rgb(style.getPropertyValue(name).trim()));
      this.#canvases.forEach((canvas, head) => this.#draw(canvas, head, colours));
    });
  }

  #draw(canvas, head, colours) {
    const rows = this.#rows;
    const marks = new Uint8Array(TOKENS * rows); // 1 if read, 2 if written, 3 if both
    this.#columns.forEach((column, t) => {
      for (const side of [0, 1]) {
        for (const slot of this.#slots(column, side, head)) {
          marks[Math.floor((slot * rows) / this.#sizes.slots[this.#layer]) * TOKENS + t] |= side + 1;
        }
      }
    });
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const pixels = new Uint32Array(image.data.buffer);
    marks.forEach((mark, i) => {
      if (mark === 0) return;
      const at = Math.floor(i / TOKENS) * DOT * canvas.width + (i % TOKENS) * DOT;
      for (let y = 0; y < DOT; y++) pixels.fill(colours[mark - 1], at + y * canvas.width, at + y * canvas.width + DOT);
    });
    context.putImageData(image, 0, 0);
  }
}

/** The pixel of a colour #rrggbb. */
function rgb(text) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  return new Uint32Array(Uint8Array.of(r, g, b, 255).buffer)[0];
}
