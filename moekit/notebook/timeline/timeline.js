// The timeline: what every rank did at each moment, one lane a rank. The same file runs as an anywidget in a notebook and
// inside the stand-alone page. It draws on a canvas from typed arrays sent once (see pack.py); no view needs the kernel.

const KINDS = { uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, float64: Float64Array };

export class Data {
  constructor(header, buffers) {
    Object.assign(this, header);
    header.arrays.forEach(([name, kind], i) => {
      const b = buffers[i]; // a DataView or typed array at any offset: copied, so that it is aligned
      this[name] = new KINDS[kind](b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength));
    });
    // Rows stand sorted by rank and start: those of rank r are at from[r] .. from[r + 1] - 1.
    this.from = new Array(this.ranks + 1).fill(this.rank.length);
    for (let i = this.rank.length - 1; i >= 0; i--) this.from[this.rank[i]] = i;
    for (let r = this.ranks - 1; r >= 0; r--) this.from[r] = Math.min(this.from[r], this.from[r + 1]);
    this.end = 0;
    for (let i = 0; i < this.rank.length; i++) this.end = Math.max(this.end, this.start[i] + this.duration[i]);
  }

  // The row of a rank at a time in seconds, or -1.
  at(rank, time) {
    const i = this.last(rank, time);
    return i >= this.from[rank] && time < this.start[i] + this.duration[i] ? i : -1;
  }

  // The last row of a rank that starts at `time` or before.
  last(rank, time) {
    let low = this.from[rank], high = this.from[rank + 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.start[middle] <= time) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  // Seconds of each part between two times, over all ranks: a Float64Array by part.
  sums(left, right) {
    const found = new Float64Array(this.parts.length);
    for (let r = 0; r < this.ranks; r++)
      for (let i = Math.max(this.from[r], this.last(r, left)); i < this.from[r + 1] && this.start[i] < right; i++)
        found[this.part[i]] += Math.max(0, Math.min(right, this.start[i] + this.duration[i]) - Math.max(left, this.start[i]));
    return found;
  }
}

function h(tag, attributes = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value); else if (value !== null) el.setAttribute(name, value);
  el.append(...children.flat().filter((c) => c !== null));
  return el;
}

// A time with the unit that suits a span.
function shown(seconds, span = seconds) {
  const [unit, factor] = span < 2e-3 ? ["µs", 1e6] : span < 2 ? ["ms", 1e3] : ["s", 1];
  return `${(seconds * factor).toPrecision(4)} ${unit}`;
}

const LANE = 44, GAP = 8, TOP = 22, LEFT = 64;

export class View {
  constructor(root, data) {
    Object.assign(this, { root, data, left: 0, right: data.end, only: -1, row: -1 });
    this.canvas = h("canvas", { class: "mkt-canvas", tabindex: "0", role: "img", "aria-label": "timeline of all ranks: wheel or + and - to zoom, drag or arrows to move" });
    this.told = h("div", { class: "mkt-told" });
    this.legend = h("div", { class: "mkt-legend" });
    const button = (text, title, act) => h("button", { type: "button", title, onclick: act }, text);
    root.replaceChildren(
      h("div", { class: "mkt-bar" }, button("+", "zoom in", () => this.zoom(0.5)), button("−", "zoom out", () => this.zoom(2)),
        button("all", "show everything", () => this.show(0, data.end)),
        ...data.steps.map(([from, to], i) => (data.steps.length <= 12 ? button(`step ${i}`, "show this step", () => this.show(from, to)) : null)),
        h("span", { class: "mkt-dim" }, "wheel: zoom, drag: move, click a part: only this part")),
      this.legend, this.canvas, this.told);
    this.canvas.addEventListener("wheel", (e) => { e.preventDefault(); this.zoom(e.deltaY > 0 ? 1.25 : 0.8, this.time(e.offsetX)); }, { passive: false });
    this.canvas.addEventListener("pointerdown", (e) => { this.drag = { x: e.offsetX, left: this.left, right: this.right }; this.canvas.setPointerCapture(e.pointerId); });
    this.canvas.addEventListener("pointerup", () => { this.drag = null; });
    this.canvas.addEventListener("pointermove", (e) => this.move(e));
    this.canvas.addEventListener("dblclick", () => this.show(0, data.end));
    this.canvas.addEventListener("keydown", (e) => this.key(e));
    new ResizeObserver(() => this.draw()).observe(root);
    this.draw();
  }

  get width() { return Math.max(100, this.canvas.clientWidth - LEFT); }

  time(x) { return this.left + ((x - LEFT) / this.width) * (this.right - this.left); }

  show(left, right) {
    const span = Math.min(Math.max(right - left, 1e-7), this.data.end);
    this.left = Math.min(Math.max(0, left), this.data.end - span);
    this.right = this.left + span;
    this.draw();
  }

  zoom(factor, around = (this.left + this.right) / 2) {
    this.show(around - (around - this.left) * factor, around + (this.right - around) * factor);
  }

  move(e) {
    if (this.drag) {
      const by = ((this.drag.x - e.offsetX) / this.width) * (this.drag.right - this.drag.left);
      this.show(this.drag.left + by, this.drag.right + by);
      return;
    }
    const rank = Math.floor((e.offsetY - TOP) / (LANE + GAP));
    this.row = rank >= 0 && rank < this.data.ranks && e.offsetX >= LEFT ? this.data.at(rank, this.time(e.offsetX)) : -1;
    this.tell();
  }

  key(e) {
    const span = this.right - this.left;
    const acts = { "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), ArrowLeft: () => this.show(this.left - span / 4, this.right - span / 4), ArrowRight: () => this.show(this.left + span / 4, this.right + span / 4), Home: () => this.show(0, this.data.end) };
    if (acts[e.key]) { e.preventDefault(); acts[e.key](); }
  }

  tell() {
    const { data, row: i } = this;
    if (i < 0) { this.told.textContent = `${shown(this.left, this.data.end)} to ${shown(this.right, this.data.end)}`; return; }
    const layer = data.layer[i] < 0 ? "" : `, layer ${data.layer[i]}`, kernel = data.kernels[data.kernel[i]];
    this.told.textContent = `rank ${data.rank[i]}, step ${data.step[i]}${layer}: ${data.parts[data.part[i]]}, ${shown(data.duration[i])} at ${shown(data.start[i], data.end)}${kernel ? `, ${kernel}` : ""}`;
  }

  draw() {
    const { data, canvas } = this, scale = window.devicePixelRatio || 1, height = TOP + data.ranks * (LANE + GAP);
    canvas.style.height = `${height}px`;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = height * scale;
    const c = canvas.getContext("2d"), style = getComputedStyle(canvas), per = this.width / (this.right - this.left);
    c.scale(scale, scale);
    c.font = "12px system-ui, sans-serif";
    c.fillStyle = style.color;
    for (let tick = 0; tick <= 5; tick++) {
      const time = this.left + ((this.right - this.left) * tick) / 5, x = LEFT + (this.width * tick) / 5;
      c.textAlign = tick === 5 ? "right" : tick === 0 ? "left" : "center";
      c.fillText(shown(time, this.right - this.left), x, 13);
    }
    c.textAlign = "left";
    for (let r = 0; r < data.ranks; r++) {
      const y = TOP + r * (LANE + GAP);
      c.globalAlpha = 1;
      c.fillStyle = style.color;
      c.fillText(`rank ${r}`, 4, y + LANE / 2 + 4);
      // Of rows that share a pixel, the longest is drawn.
      let pixel = -1, longest = 0;
      for (let i = Math.max(data.from[r], data.last(r, this.left)); i < data.from[r + 1] && data.start[i] < this.right; i++) {
        const x = LEFT + Math.max(0, (data.start[i] - this.left) * per), end = LEFT + Math.min(this.width, (data.start[i] + data.duration[i] - this.left) * per);
        if (end <= LEFT || data.duration[i] <= 0) continue;
        if (end - x < 1) {
          if (Math.floor(x) === pixel && data.duration[i] <= longest) continue;
          pixel = Math.floor(x);
          longest = data.duration[i];
        }
        c.fillStyle = data.colours[data.part[i]];
        c.globalAlpha = this.only < 0 || this.only === data.part[i] ? 1 : 0.12;
        c.fillRect(x, y, Math.max(end - x, 0.7), LANE);
      }
    }
    this.tell();
    this.drawLegend();
  }

  drawLegend() {
    const { data } = this, sums = data.sums(this.left, this.right), all = sums.reduce((a, b) => a + b, 0) || 1;
    this.legend.replaceChildren(...data.parts.map((name, p) => h("button", {
      type: "button", class: `mkt-key${this.only >= 0 && this.only !== p ? " mkt-off" : ""}`, style: `background:${data.colours[p]}`,
      "aria-pressed": String(this.only === p), onclick: () => { this.only = this.only === p ? -1 : p; this.draw(); },
    }, `${name} ${((100 * sums[p]) / all).toFixed(1)} %`)));
  }
}

// ---------------------------------------------------------------------------------------------------- the two homes

function render({ model, el }) {
  const root = h("div", { class: "moekit-timeline" }, "fetching the profile …");
  el.append(root);
  const timer = setTimeout(() => { root.textContent = "No timeline here: the kernel gave no answer. Run its cell again, or open the page that save_html wrote."; }, 60000);
  model.on("msg:custom", (content, buffers) => {
    if (content.header === undefined) return;
    clearTimeout(timer);
    new View(root, new Data(content.header, buffers));
  });
  model.send({ ask: "profile" });
}

// The page that save_html writes: the header and the arrays stand in it.
export function openPage() {
  const text = (id) => document.getElementById(id).textContent;
  const header = JSON.parse(text("header"));
  const buffers = header.arrays.map(([name]) => Uint8Array.from(atob(text(`array-${name}`)), (c) => c.charCodeAt(0)));
  const root = h("div", { class: "moekit-timeline" });
  document.getElementById("explorer").append(root);
  new View(root, new Data(header, buffers));
}

export default { render };
