// The explorer: linked views of one routing trace. The same file runs as an anywidget in a notebook and inside the
// stand-alone page. All look-ups happen here, on typed arrays sent once (see pack.py, whose header names the constants
// that the arrays are packed with); only masking needs the kernel.
//
// Letters: T tokens (rows), L traced layers (indices, named by data.layers), K choices, E experts.

// ---------------------------------------------------------------------------------------------------- the trace

const KINDS = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array };

export class Data {
  constructor(header, buffers) {
    Object.assign(this, header);
    header.arrays.forEach(([name, kind], i) => {
      const b = buffers[i]; // a DataView or typed array at any offset: copied, so that it is aligned
      this[name] = new KINDS[kind](b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength));
    });
    this.L = this.layers.length;
    this.starts = []; // first row of each sample
    for (let i = 0; i < this.T; i++) if (i === 0 || this.sample[i] !== this.sample[i - 1]) this.starts.push(i);
    this.starts.push(this.T);
    this.postings = this.layers.map((_, l) => this.post(l));
    this.pieceCount = new Uint32Array(this.pieces.length);
    for (let i = 0; i < this.T; i++) this.pieceCount[this.token[i]]++;
  }

  // Where each expert of a layer was chosen: its entries (row * K + choice) are at[from[e]] .. at[from[e + 1] - 1].
  post(l) {
    const n = this.T * this.K, of = l * n, from = new Uint32Array(this.E + 1), at = new Uint32Array(n);
    for (let j = 0; j < n; j++) from[(this.choice[of + j] & ~this.UNDISPATCHED) + 1]++;
    for (let e = 0; e < this.E; e++) from[e + 1] += from[e];
    const next = from.slice();
    for (let j = 0; j < n; j++) at[next[this.choice[of + j] & ~this.UNDISPATCHED]++] = j;
    return { from, at };
  }

  // Which sample (an index into starts) a row belongs to.
  sampleOf(row) {
    let low = 0, high = this.starts.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= row) low = middle; else high = middle;
    }
    return low;
  }

  // One choice of a token: {expert, prob, weight, kept}.
  pick(l, row, k) {
    const j = (l * this.T + row) * this.K + k, c = this.choice[j];
    return { expert: c & ~this.UNDISPATCHED, kept: !(c & this.UNDISPATCHED), prob: this.prob[j] / this.UNIT, weight: this.weight[j] / this.UNIT };
  }

  picks(l, row) {
    return Array.from({ length: this.K }, (_, k) => this.pick(l, row, k));
  }

  entropyOf(l, row) { // nats
    return (this.entropy[l * this.T + row] / this.UNIT) * Math.log(this.E);
  }

  // Rows that pass the filter, as [T] 0/1, and how many; all of them without a filter.
  // filter: domain (-1 any), undispatched (only rows with a choice not dispatched in `layer`, or in any if that is -1).
  allowed({ domain, undispatched, layer }) {
    const mask = new Uint8Array(this.T).fill(1);
    if (domain >= 0) for (let i = 0; i < this.T; i++) mask[i] = this.domain[i] === domain ? 1 : 0;
    if (undispatched) {
      const lost = new Uint8Array(this.T);
      const [a, b] = layer < 0 ? [0, this.L] : [layer, layer + 1];
      for (let l = a; l < b; l++)
        for (let i = 0; i < this.T; i++)
          for (let k = 0; k < this.K; k++) if (this.choice[(l * this.T + i) * this.K + k] & this.UNDISPATCHED) lost[i] = 1;
      for (let i = 0; i < this.T; i++) mask[i] &= lost[i];
    }
    let count = 0;
    for (let i = 0; i < this.T; i++) count += mask[i];
    return { mask, count };
  }

  // How often each expert was chosen by the allowed rows: a Uint32Array [E] a layer.
  load(allowed) {
    return this.layers.map((_, l) => {
      const n = new Uint32Array(this.E), of = l * this.T * this.K;
      for (let i = 0; i < this.T; i++)
        if (allowed.mask[i]) for (let k = 0; k < this.K; k++) n[this.choice[of + i * this.K + k] & ~this.UNDISPATCHED]++;
      return n;
    });
  }

  // All about one expert, over the allowed rows that chose it.
  expert(l, e, allowed, top = 12) {
    const { from, at } = this.postings[l], K = this.K, step = this.T * K, of = l * step; // layer l's choices start at `of`
    const byPiece = new Map(), byDomain = new Uint32Array(this.domains.length), best = [];
    const partner = new Uint32Array(this.E), before = new Uint32Array(this.E), after = new Uint32Array(this.E);
    let n = 0, first = 0, undispatched = 0, prob = 0;
    for (let p = from[e]; p < from[e + 1]; p++) {
      const row = (at[p] / K) | 0, k = at[p] % K;
      if (!allowed.mask[row]) continue;
      const j = of + at[p], p1 = this.prob[j] / this.UNIT;
      n++;
      prob += p1;
      if (k === 0) first++;
      if (this.choice[j] & this.UNDISPATCHED) undispatched++;
      byPiece.set(this.token[row], (byPiece.get(this.token[row]) || 0) + 1);
      byDomain[this.domain[row]]++;
      for (let o = 0; o < K; o++) if (o !== k) partner[this.choice[j - k + o] & ~this.UNDISPATCHED]++;
      if (l > 0) before[this.choice[of - step + row * K] & ~this.UNDISPATCHED]++;
      if (l + 1 < this.L) after[this.choice[of + step + row * K] & ~this.UNDISPATCHED]++;
      if (best.length < top || p1 > best[best.length - 1].prob) {
        best.push({ row, prob: p1 });
        best.sort((a, b) => b.prob - a.prob);
        if (best.length > top) best.pop();
      }
    }
    // Tokens in the order of count * log2(lift): common here, and commoner here than elsewhere in the whole trace.
    const tokens = Array.from(byPiece, ([piece, count]) => {
      const lift = count / n / (this.pieceCount[piece] / this.T);
      return { piece, count, lift, score: count * Math.log2(lift) };
    }).sort((a, b) => b.score - a.score || b.count - a.count).slice(0, top);
    const ranked = (counts) => Array.from(counts, (count, expert) => ({ expert, count, share: count / n }))
      .filter((x) => x.count).sort((a, b) => b.count - a.count).slice(0, 5);
    return {
      n, first, undispatched, prob: prob / n, tokens, contexts: best, byDomain,
      partners: ranked(partner), before: ranked(before), after: ranked(after),
    };
  }

  // Tokens whose text holds the words searched, and the experts a query names ("17", "e17", "3:17", "layer 3 expert 17").
  search(query, l, top = 40) {
    const named = /^\s*(?:(?:l|layer)?\s*(\d+)\s*[:.,\s]\s*)?(?:e|expert)?\s*(\d+)\s*$/i.exec(query);
    const experts = [];
    if (named && +named[2] < this.E)
      this.layers.forEach((name, i) => {
        if (named[1] === undefined || +named[1] === name) experts.push({ layer: i, expert: +named[2] });
      });
    const wanted = query.toLowerCase(), tokens = [];
    this.pieces.forEach((text, piece) => {
      if (this.pieceCount[piece] && text.toLowerCase().includes(wanted)) tokens.push({ piece, count: this.pieceCount[piece] });
    });
    tokens.sort((a, b) => b.count - a.count);
    const hit = new Uint8Array(this.pieces.length), rows = [], chosen = new Uint32Array(this.E);
    tokens.forEach(({ piece }) => (hit[piece] = 1));
    let total = 0;
    for (let i = 0; i < this.T; i++) {
      if (!hit[this.token[i]]) continue;
      total++;
      if (rows.length < top) rows.push(i);
      for (let k = 0; k < this.K; k++) chosen[this.choice[(l * this.T + i) * this.K + k] & ~this.UNDISPATCHED]++;
    }
    const gets = Array.from(chosen, (count, expert) => ({ expert, count, share: count / total }))
      .filter((x) => x.count).sort((a, b) => b.count - a.count).slice(0, 8);
    return { experts, tokens: tokens.slice(0, top), types: tokens.length, rows, total, gets };
  }
}

// ---------------------------------------------------------------------------------------------------- small helpers

const SVG = "http://www.w3.org/2000/svg";
// Paul Tol's "light" scheme: told apart by colour-blind people, made for black text upon it.
const COLOURS = ["#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#99DDFF", "#BBCC33", "#AAAA00"];

function h(tag, attributes = {}, ...children) {
  const el = tag === "svg" || tag === "path" || tag === "line" || tag === "rect" || tag === "circle"
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) el.setAttribute(name, value === true ? "" : value);
  }
  el.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
  return el;
}

const percent = (x, digits = 1) => (Number.isFinite(x) ? (100 * x).toFixed(digits) + " %" : "–");
const times = (x) => (Number.isFinite(x) ? x.toFixed(x < 10 ? 1 : 0) + "×" : "–");
const number = (x, digits = 2) => (Number.isFinite(x) ? x.toFixed(digits) : "–");
const signed = (x, digits = 2) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(digits);
const whole = (n) => n.toLocaleString("en");
const visible = (text) => text.replace(/<\/s>|\n/g, "¶").replace(/\t/g, "⇥");
const mix = (share) => { // a ramp from pale to strong blue that carries black text
  const a = [240, 245, 250], b = [92, 158, 214], s = Math.max(0, Math.min(1, share));
  return `rgb(${a.map((v, i) => Math.round(v + s * (b[i] - v))).join(",")})`;
};

// ---------------------------------------------------------------------------------------------------- pictures

// A vector picture of what an element shows: its boxes, its texts and the drawings in it.
export function toSvg(el) {
  el.classList.add("mk-whole"); // nothing scrolls while it is measured
  const box = el.getBoundingClientRect(), out = [];
  const escape = (s) => s.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const clear = (colour) => colour === "transparent" || /, 0\)$/.test(colour);
  const r = (x) => Math.round(x * 100) / 100;
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) {
      const style = getComputedStyle(node.parentElement);
      for (const word of node.data.matchAll(/\S+/g)) { // words, because a text may break anywhere between them
        const range = document.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        const at = range.getBoundingClientRect();
        if (!at.width) continue;
        out.push(
          `<text x="${r(at.left - box.left)}" y="${r(at.top - box.top + at.height * 0.79)}" textLength="${r(at.width)}" ` +
          `font-family="${escape(style.fontFamily)}" font-size="${style.fontSize}" font-weight="${style.fontWeight}" ` +
          `fill="${style.color}">${escape(word[0])}</text>`);
      }
      return;
    }
    if (node.nodeType !== Node.ELEMENT_NODE || node.classList.contains("mk-tools")) return;
    const style = getComputedStyle(node), at = node.getBoundingClientRect();
    if (style.display === "none" || !at.width) return;
    const place = `x="${r(at.left - box.left)}" y="${r(at.top - box.top)}" width="${r(at.width)}" height="${r(at.height)}"`;
    if (node.namespaceURI === SVG) {
      const copy = node.cloneNode(true);
      for (const [name, value] of [["width", at.width], ["height", at.height], ["x", at.left - box.left], ["y", at.top - box.top]])
        copy.setAttribute(name, r(value));
      const from = [...node.querySelectorAll("*")];
      [...copy.querySelectorAll("*")].forEach((part, i) => {
        const look = getComputedStyle(from[i]);
        for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "vector-effect"]) part.setAttribute(name, look.getPropertyValue(name));
      });
      out.push(new XMLSerializer().serializeToString(copy));
      return;
    }
    const border = parseFloat(style.borderTopWidth), filled = !clear(style.backgroundColor);
    if (filled || border)
      out.push(`<rect ${place} rx="${parseFloat(style.borderTopLeftRadius) || 0}" fill="${filled ? style.backgroundColor : "none"}" ` +
        `stroke="${border ? style.borderTopColor : "none"}" stroke-width="${border}"/>`);
    node.childNodes.forEach(walk);
    if (node.classList.contains("mk-same"))
      out.push(`<rect x="${r(at.left - box.left)}" y="${r(at.bottom - box.top - 2)}" width="${r(at.width)}" height="2" fill="${style.color}"/>`);
    if (style.outlineStyle !== "none" && parseFloat(style.outlineWidth)) // last, so that nothing covers it
      out.push(`<rect ${place} fill="none" stroke="${style.outlineColor}" stroke-width="${parseFloat(style.outlineWidth)}"/>`);
  };
  walk(el);
  el.classList.remove("mk-whole");
  return `<svg xmlns="${SVG}" width="${r(box.width)}" height="${r(box.height)}" viewBox="0 0 ${r(box.width)} ${r(box.height)}">${out.join("")}</svg>`;
}

async function save(el, name, kind) {
  const text = toSvg(el);
  let blob = new Blob([text], { type: "image/svg+xml" });
  if (kind === "png") {
    const image = new Image(), url = URL.createObjectURL(blob), scale = 2;
    image.src = url;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.width * scale;
    canvas.height = image.height * scale;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(url);
    blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  }
  const link = h("a", { href: URL.createObjectURL(blob), download: `${name}.${kind}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ---------------------------------------------------------------------------------------------------- the views

class Views {
  constructor(root, data, model) {
    this.data = data;
    this.model = model;
    this.drawn = {};
    this.whole = data.load({ mask: new Uint8Array(data.T).fill(1) });
    this.order = this.whole.map((n) => Array.from(n.keys()).sort((a, b) => n[b] - n[a])); // of each layer's bars
    this.rank = this.order.map((o) => { const r = []; o.forEach((e, i) => (r[e] = i)); return r; });
    const row = Math.max(0, model.get("token"));
    const [layer, expert] = model.get("expert");
    this.s = {
      row, layer: layer < 0 ? 0 : layer, expert: expert < 0 ? this.order[0][0] : expert, sample: data.sampleOf(row),
      colour: "expert", domain: -1, undispatched: false, everyLayer: true, query: "", change: null,
    };
    this.build(root);
    this.update();
    model.on("change:token", () => model.get("token") !== this.s.row && this.goTo(model.get("token")));
    model.on("change:expert", () => {
      const [l, e] = model.get("expert");
      if (l >= 0 && (l !== this.s.layer || e !== this.s.expert)) this.set({ layer: l, expert: e });
    });
  }

  set(change) {
    if (["layer", "expert", "sample"].some((name) => name in change && change[name] !== this.s[name])) this.said = ""; // of another mask
    Object.assign(this.s, change);
    this.update();
    this.model.set("token", this.s.row);
    this.model.set("expert", [this.s.layer, this.s.expert]);
    this.model.save_changes();
  }

  goTo(row) {
    this.set({ row, sample: this.data.sampleOf(row) });
    this.spans[row - this.data.starts[this.s.sample]].scrollIntoView({ block: "nearest" });
  }

  panel(kind, title) {
    const body = h("div", { class: "mk-body" }), head = h("span", { class: "mk-title" }, title);
    const el = h("section", { class: `mk-panel mk-${kind}`, "data-view": kind });
    const tool = (type) => h("button", { type: "button", title: `save this view as ${type.toUpperCase()}`, onclick: () => save(el, `moekit-${kind}`, type) }, type.toUpperCase());
    el.append(h("header", {}, head, h("span", { class: "mk-tools" }, tool("svg"), tool("png"))), body);
    return { el, head, body };
  }

  build(root) {
    const { data, s } = this;
    const option = (value, text) => h("option", { value }, text);
    const choose = (label, name, options, onchange) =>
      h("label", {}, label, h("select", { name, onchange: (event) => onchange(event.target.value) }, options));
    this.search = h("input", { type: "search", name: "search", placeholder: "a token, or an expert as 3:17", "aria-label": "search tokens and experts",
      oninput: (event) => this.set({ query: event.target.value }) });
    this.layerBox = choose("layer", "layer", data.layers.map((name, l) => option(l, name)), (v) => this.set({ layer: +v, expert: this.order[+v][0] }));
    this.colourBox = choose("colour", "colour", [["expert", "expert"], ["confidence", "gate confidence"], ["undispatched", "not dispatched"], ["logprob", "log-probability"], ["change", "change by masking"]].map(([v, t]) => option(v, t)),
      (v) => this.set({ colour: v }));
    this.domainBox = choose("domain", "domain", [option(-1, "all"), ...data.domains.map((name, d) => option(d, name))], (v) => this.filterTo({ domain: +v }));
    const undispatched = choose("not dispatched", "undispatched", [option("no", "any"), option("all", "in some layer"), option("layer", "in this layer")],
      (v) => this.filterTo({ undispatched: v !== "no", everyLayer: v === "all" }));
    this.found = h("span", { class: "mk-muted" });
    this.results = this.panel("results", "Search");
    this.text = this.panel("text", "Text");
    this.tokenView = this.panel("token", "Token");
    this.loadView = this.panel("load", "Load");
    this.expertView = this.panel("expert", "Expert");
    const step = (by, label) => h("button", { type: "button", name: by < 0 ? "previous" : "next", onclick: () => this.step(by) }, label);
    root.replaceChildren(
      h("div", { class: "mk-bar" }, this.search, this.layerBox, this.colourBox, data.domains.length > 1 ? this.domainBox : null, undispatched,
        step(-1, "‹ sample"), step(1, "sample ›"), this.found),
      data.cut ? h("p", { class: "mk-muted mk-cut" }, data.cut) : "",
      this.results.el, h("div", { class: "mk-row" }, this.text.el, this.tokenView.el), this.loadView.el, this.expertView.el);
    this.text.body.tabIndex = 0;
    this.text.body.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], to = s.row + by;
      if (by && to >= 0 && to < data.T) { event.preventDefault(); this.goTo(to); }
    });
    this.bars = data.layers.map((name, l) => this.strip(l));
    this.loadView.body.append(...this.bars.map((b) => b.el), h("p", { class: "mk-muted" }, "dashed: uniform routing · orange: the token's choices · dark: the expert shown below · × of uniform"));
  }

  filterTo(change) {
    Object.assign(this.s, change);
    const { mask } = this.allowed(), { starts } = this.data, { sample } = this.s;
    if (!mask.subarray(starts[sample], starts[sample + 1]).includes(1)) {
      const row = mask.indexOf(1);
      if (row >= 0) return this.goTo(row);
    }
    this.update();
  }

  allowed() {
    const { domain, undispatched, everyLayer, layer } = this.s;
    const key = JSON.stringify([domain, undispatched, undispatched && !everyLayer && layer]);
    if (key !== this.key) {
      this.key = key;
      this.passing = this.data.allowed({ domain, undispatched, layer: everyLayer ? -1 : layer });
      this.loads = this.data.load(this.passing);
      this.totals = new Uint32Array(this.data.domains.length); // rows a domain
      for (let i = 0; i < this.data.T; i++) this.totals[this.data.domain[i]] += this.passing.mask[i];
    }
    return this.passing;
  }

  step(by) { // to the next sample with a row that passes the filter
    const { starts } = this.data, { mask } = this.allowed(), n = starts.length - 1;
    for (let i = 1; i <= n; i++) {
      const sample = (this.s.sample + by * i + n * i) % n;
      const row = mask.subarray(starts[sample], starts[sample + 1]).indexOf(1);
      if (row >= 0) return this.goTo(starts[sample] + row);
    }
  }

  update() {
    const { s, data } = this;
    const { count } = this.allowed();
    this.layerBox.lastChild.value = s.layer;
    this.colourBox.lastChild.value = s.colour;
    this.found.textContent = count < data.T ? `${whole(count)} of ${whole(data.T)} tokens` : `${whole(data.T)} tokens`;
    const seen = [s.layer, s.expert, this.key];
    this.redraw("text", [...seen, s.sample, s.colour, s.change], () => this.showText());
    this.redraw("here", [s.row, s.sample], () => this.showHere());
    this.redraw("token", [s.row, s.layer, s.expert], () => this.showToken());
    this.redraw("bars", [this.key], () => this.showBars());
    this.redraw("marks", [s.row, s.layer, s.expert], () => this.showMarks());
    this.redraw("expert", [...seen, s.sample, s.change, this.said, this.waiting], () => this.showExpert());
    this.redraw("results", [...seen, s.query], () => this.showResults());
  }

  // Draw a view again if what it depends on has changed.
  redraw(name, depends, draw) {
    const old = this.drawn[name];
    if (old && depends.every((x, i) => x === old[i])) return;
    this.drawn[name] = depends;
    draw();
  }

  // --- pieces of views

  piece(index, extra = {}) {
    return h("span", { class: "mk-piece", ...extra }, index === this.data.NONE ? "–" : visible(this.data.pieces[index]));
  }

  chip(l, e, text) {
    const on = l === this.s.layer && e === this.s.expert;
    const name = `layer ${this.data.layers[l]}, expert ${e}`;
    return h("button", { type: "button", class: "mk-chip" + (on ? " mk-on" : ""), "data-layer": l, "data-expert": e, title: name, "aria-label": name,
      onclick: () => this.set({ layer: l, expert: e }) }, text ?? `E${e}`);
  }

  bar(share, chance, full = 1, against = "uniform") { // with a tick at the baseline `chance`; `full` is its whole width
    const x = (v) => Math.min(100, (100 * v) / full).toFixed(1) + "%";
    return h("span", { class: "mk-meter", title: `${percent(share, 2)}; ${against} ${percent(chance, 2)}` },
      h("span", { class: "mk-fill", style: `width:${x(share)}` }), h("span", { class: "mk-tick", style: `left:${x(chance)}` }));
  }

  context(row, width = 8) {
    const { data } = this, sample = data.sampleOf(row);
    const from = Math.max(data.starts[sample], row - width), to = Math.min(data.starts[sample + 1], row + width + 1);
    const side = (a, b) => Array.from({ length: b - a }, (_, i) => visible(data.pieces[data.token[a + i]])).join("");
    return h("button", { type: "button", class: "mk-context", "data-row": row, title: `sample ${data.sample[row]}, position ${data.position[row]}`, onclick: () => this.goTo(row) },
      h("span", { class: "mk-left" }, side(from, row)), h("b", {}, visible(data.pieces[data.token[row]])), h("span", { class: "mk-right" }, side(row + 1, to)));
  }

  // --- views

  showText() {
    const { data, s } = this, from = data.starts[s.sample], to = data.starts[s.sample + 1];
    if (this.shown !== s.sample) { // other words; else only their colours change
      this.shown = s.sample;
      this.spans = [];
      const rowOf = (event) => event.target.dataset.row === undefined ? -1 : +event.target.dataset.row;
      const words = h("div", { class: "mk-words",
        onclick: (event) => rowOf(event) >= 0 && this.goTo(rowOf(event)),
        onmouseover: (event) => rowOf(event) >= 0 && (event.target.title = this.hintOf(rowOf(event))) });
      for (let row = from; row < to; row++) {
        const text = data.pieces[data.token[row]];
        const span = h("span", { class: "mk-word" + (data.generated[row] ? " mk-generated" : ""), "data-row": row });
        const gap = /^ (?=\S)/.test(text) ? " " : ""; // stands between the coloured words, where lines may break
        span.textContent = visible(text).slice(gap.length);
        words.append(gap, span);
        if (/<\/s>|\n/.test(text)) words.append(h("br"));
        this.spans.push(span);
      }
      this.legend = h("div", { class: "mk-legend" });
      this.text.body.replaceChildren(this.legend, words);
    }
    const { mask } = this.allowed(), { change } = s;
    const changed = change && change.from === from ? change.delta : null;
    const counts = new Map();
    for (let row = from; row < to; row++) {
      const e = data.pick(s.layer, row, 0).expert;
      counts.set(e, (counts.get(e) || 0) + 1);
    }
    const common = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, COLOURS.length).map(([e]) => e);
    if (counts.has(s.expert) && !common.includes(s.expert)) common[common.length - 1] = s.expert;
    this.spans.forEach((span, i) => {
      const row = from + i, picks = data.picks(s.layer, row), [first] = picks;
      const place = common.indexOf(first.expert), lost = picks.filter((c) => !c.kept).length;
      let fill = "";
      if (s.colour === "expert" && place >= 0) fill = COLOURS[place];
      if (s.colour === "confidence") fill = mix(first.prob);
      if (s.colour === "undispatched" && lost) fill = lost === data.K ? COLOURS[1] : COLOURS[2];
      if (s.colour === "logprob" && Number.isFinite(data.logprob[row])) fill = mix(-data.logprob[row] / 10);
      const d = changed ? changed[i] : NaN;
      if (s.colour === "change" && Number.isFinite(d)) fill = `rgba(${d < 0 ? "238,136,102" : "119,170,221"},${Math.min(1, Math.abs(d) / 1)})`;
      const solid = fill && !(s.colour === "change" && Math.abs(d) < 0.5);
      span.style.background = fill;
      span.style.color = solid ? "#111" : "";
      span.classList.toggle("mk-same", picks.some((c) => c.expert === s.expert));
      span.classList.toggle("mk-faded", !mask[row]);
    });
    const key = (fill, text) => h("span", { class: "mk-key", style: `background:${fill};color:#111` }, text);
    const rest = to - from - common.reduce((n, e) => n + (counts.get(e) || 0), 0);
    const keys = {
      expert: () => [...common.map((e, i) => { const c = this.chip(s.layer, e); c.style.background = COLOURS[i]; c.style.color = "#111"; return c; }),
        rest ? h("span", { class: "mk-muted" }, `no colour: ${counts.size - common.length} other experts, ${percent(rest / (to - from), 0)} of the tokens`) : null],
      confidence: () => [key(mix(0), "0"), key(mix(0.5), "0.5"), key(mix(1), "1"), h("span", { class: "mk-muted" }, `first choice's gate probability; uniform ${number(1 / data.E, 3)}`)],
      undispatched: () => data.K > 1 ? [key(COLOURS[2], data.K > 2 ? "some choices not dispatched" : "one choice not dispatched"), key(COLOURS[1], data.K > 2 ? "none dispatched" : "neither dispatched")] : [key(COLOURS[1], "not dispatched")],
      logprob: () => [key(mix(0), "0"), key(mix(0.5), "−5"), key(mix(1), "−10 nats"), h("span", { class: "mk-muted" }, "of the next token")],
      change: () => changed ? [key("#EE8866", "−1"), key("#77AADD", "+1 nat"), h("span", { class: "mk-muted" }, `next token's log-probability without ${change.name}`)]
        : [h("span", { class: "mk-muted" }, "mask an expert to see the change here")],
    }[s.colour]();
    this.legend.replaceChildren(...keys.filter(Boolean), h("span", { class: "mk-muted" }, `underlined: expert ${s.expert} chosen`));
    const labels = [...new Set(data.domain.subarray(from, to))].map((d) => data.domains[d]);
    const label = data.domains.length > 1 ? ` · ${labels.slice(0, 3).join(", ")}${labels.length > 3 ? ", …" : ""}` : "";
    this.text.head.textContent = `Text · sample ${data.sample[from]}${label} · layer ${data.layers[s.layer]}`;
  }

  hintOf(row) {
    const { change, layer } = this.s, d = change ? change.delta[row - change.from] : NaN;
    return this.data.picks(layer, row).map((c) => `E${c.expert} ${percent(c.prob, 0)}${c.kept ? "" : " not dispatched"}`).join(", ") +
      (Number.isFinite(d) ? `; change ${signed(d)} nats` : "");
  }

  showHere() {
    this.here?.classList.remove("mk-here");
    this.here = this.spans[this.s.row - this.data.starts[this.s.sample]];
    this.here.classList.add("mk-here");
  }

  showToken() {
    const { data, s } = this, { row } = s;
    this.tokenView.head.replaceChildren("Token ", this.piece(data.token[row]), ` · position ${data.position[row]}${data.domains.length > 1 ? `, ${data.domains[data.domain[row]]}` : ""}${data.generated[row] ? ", generated" : ""}`);
    const line = (l) => h("tr", { class: l === s.layer ? "mk-this" : "" }, h("th", {}, data.layers[l]), data.picks(l, row).map((c) => [
      h("td", {}, this.chip(l, c.expert)),
      h("td", { class: "mk-number" + (c.kept ? "" : " mk-undispatched"), title: `gate probability ${number(c.prob, 4)}, ${c.kept ? `combine weight ${number(c.weight, 4)}` : "not dispatched"}` },
        this.bar(c.prob, 1 / data.E),
        `${number(c.prob)} → ${c.kept ? number(c.weight) : "none"}`)]),
      h("td", { class: "mk-number" }, number(data.entropyOf(l, row))));
    const names = Array.from({ length: data.K }, (_, k) => ["first", "second"][k] ?? `choice ${k + 1}`);
    const known = data.target[row] !== data.NONE;
    this.tokenView.body.replaceChildren(
      h("table", {}, h("tr", {}, h("th", {}, "layer"), names.map((n) => h("th", { colspan: 2 }, `${n}: prob → weight`)), h("th", { title: `nats; uniform ${number(Math.log(data.E))}` }, "entropy")),
        data.layers.map((_, l) => line(l))),
      h("p", {}, known ? ["next ", this.piece(data.target[row]), `, log-probability ${number(data.logprob[row])} nats`] : "no next token",
        data.predicted[row] !== data.NONE ? ["; predicted ", this.piece(data.predicted[row])] : []));
  }

  strip(l) {
    const { data } = this;
    const path = h("path", { class: "mk-shape" }), chosen = h("rect", { class: "mk-chosen", y: 0, height: 100, width: 1 }), line = h("line", { class: "mk-uniform", x1: 0, x2: data.E });
    const marks = Array.from({ length: data.K }, () => h("rect", { class: "mk-mark", y: 0, height: 9, width: Math.max(1, data.E / 150) }));
    const expertAt = (event) => {
      const at = svg.getBoundingClientRect();
      return this.order[l][Math.max(0, Math.min(data.E - 1, Math.floor(((event.clientX - at.left) / at.width) * data.E)))];
    };
    const svg = h("svg", { viewBox: `0 0 ${data.E} 100`, preserveAspectRatio: "none", "data-layer": l,
      onclick: (event) => this.set({ layer: l, expert: expertAt(event) }),
      onmousemove: (event) => { const e = expertAt(event); hint.textContent = `E${e} ${times((this.loads[l][e] / this.total()) * data.E)}`; },
      onmouseleave: () => (hint.textContent = this.most(l)) }, path, chosen, line, marks);
    const hint = h("span", { class: "mk-hint" });
    return { el: h("div", { class: "mk-strip" }, h("span", { class: "mk-name" }, `layer ${data.layers[l]}`), svg, hint), path, chosen, line, marks, hint };
  }

  total() {
    return Math.max(1, this.passing.count * this.data.K);
  }

  most(l) {
    const n = this.loads[l], max = n.reduce((a, b) => Math.max(a, b), 0);
    return `max ${times((max / this.total()) * this.data.E)}, idle ${n.reduce((a, b) => a + (b === 0), 0)}`;
  }

  showBars() {
    const { data } = this, filtered = this.passing.count < data.T;
    this.loadView.head.textContent = `Load · ${filtered ? "of the tokens that pass the filter; " : ""}experts by their whole load, busiest first; square-root scale`;
    this.bars.forEach((b, l) => {
      const n = this.loads[l], top = n.reduce((a, x) => Math.max(a, x), 1), uniform = this.total() / data.E;
      const y = (v) => (100 - Math.sqrt(v / Math.max(top, uniform * 1.2)) * 88).toFixed(1);
      b.path.setAttribute("d", `M0 100` + this.order[l].map((e, i) => `V${y(n[e])}H${i + 1}`).join("") + "V100Z");
      b.line.setAttribute("y1", y(uniform));
      b.line.setAttribute("y2", y(uniform));
      b.hint.textContent = this.most(l);
    });
  }

  showMarks() {
    const { data, s } = this;
    this.bars.forEach((b, l) => {
      b.chosen.setAttribute("x", this.rank[l][s.expert]);
      b.chosen.style.display = l === s.layer ? "" : "none";
      data.picks(l, s.row).forEach((c, k) => b.marks[k].setAttribute("x", this.rank[l][c.expert] + 0.5 - Math.max(1, data.E / 150) / 2));
    });
  }

  showExpert() {
    const { data, s } = this, allowed = this.allowed();
    const x = data.expert(s.layer, s.expert, allowed), share = x.n / this.total();
    this.expertView.head.textContent = `Expert ${s.expert} of layer ${data.layers[s.layer]}`;
    const row = (...cells) => h("tr", {}, cells.map((c) => h("td", {}, c)));
    const list = (title, counts, l, chance) => h("div", { class: "mk-column" }, h("h4", {}, title),
      counts.length ? h("table", {}, counts.map((p) => row(this.chip(l, p.expert), this.bar(p.share, chance, counts[0].share), percent(p.share)))) : h("p", { class: "mk-muted" }, "none"));
    const { totals } = this;
    const domains = Array.from(x.byDomain, (n, d) => ({ d, share: n / (totals[d] * data.K) })).filter((o) => totals[o.d]).sort((a, b) => b.share - a.share);
    const own = this.whole[s.layer][s.expert] / (data.T * data.K), widest = Math.max(own, ...domains.map((o) => o.share));
    this.maskButton = h("button", { type: "button", name: "mask", disabled: data.mask !== null || this.waiting, title: data.mask, onclick: () => this.mask() }, "Mask this expert");
    this.expertView.body.replaceChildren(
      h("p", { class: "mk-figures" }, `${whole(x.n)} choices (${percent(share, 2)}, ${times(share * data.E)} uniform)` +
        (data.K > 1 ? `, ${percent(x.first / x.n, 0)} as first` : "") + ` · not dispatched ${percent(x.undispatched / x.n)} · mean gate probability ${number(x.prob)} `,
        h("span", { class: "mk-masking" }, this.maskButton, h("span", { class: "mk-muted mk-said" }, data.mask ?? this.said ?? ""))),
      ...this.changes(),
      h("div", { class: "mk-columns" },
        h("div", { class: "mk-column" }, h("h4", { title: "ordered by count · log2(lift); lift: how much commoner than in the whole trace" }, "Top tokens"),
          h("table", {}, x.tokens.map((t) => row(this.find(t.piece), whole(t.count), times(t.lift))))),
        h("div", { class: "mk-column mk-wide" }, h("h4", {}, "Contexts, surest first"), x.contexts.map((c) => this.context(c.row))),
        data.domains.length > 1 ? h("div", { class: "mk-column" }, h("h4", { title: "share of a domain's choices that go to this expert; tick and ×: this expert's own load, its share of the whole trace's choices" }, "Domains, × own load"),
          h("table", {}, domains.map((o) => row(data.domains[o.d], this.bar(o.share, own, widest, "own load"), times(o.share / own))))) : null,
        data.K > 1 ? list("Chosen together", x.partners, s.layer, 1 / (data.E - 1)) : null,
        h("div", {}, s.layer > 0 ? list(`Before, layer ${data.layers[s.layer - 1]}`, x.before, s.layer - 1, 1 / data.E) : null,
          s.layer + 1 < data.L ? list(`After, layer ${data.layers[s.layer + 1]}`, x.after, s.layer + 1, 1 / data.E) : null)));
  }

  find(piece) {
    return h("button", { type: "button", class: "mk-find", title: "search it", onclick: () => { this.search.value = this.data.pieces[piece]; this.set({ query: this.search.value }); } }, this.piece(piece));
  }

  showResults() {
    const { data, s } = this, query = s.query;
    this.results.el.style.display = query.trim() ? "" : "none";
    if (!query.trim()) return;
    const r = data.search(query, s.layer);
    this.results.head.textContent = `Search · ${whole(r.total)} tokens of ${whole(r.types)} kinds, ${r.experts.length} experts by that name`;
    this.results.body.replaceChildren(h("div", { class: "mk-columns" },
      r.experts.length ? h("div", { class: "mk-column" }, h("h4", {}, "Experts"), r.experts.map((x) => this.chip(x.layer, x.expert, `layer ${data.layers[x.layer]} · E${x.expert}`))) : null,
      h("div", { class: "mk-column" }, h("h4", {}, "Tokens"), h("table", {}, r.tokens.slice(0, 12).map((t) => h("tr", {}, h("td", {}, this.find(t.piece)), h("td", {}, whole(t.count)))))),
      r.gets.length ? h("div", { class: "mk-column" }, h("h4", {}, `Go to, layer ${data.layers[s.layer]}`),
        h("table", {}, r.gets.map((g) => h("tr", {}, h("td", {}, this.chip(s.layer, g.expert)), h("td", {}, this.bar(g.share, data.K / data.E, r.gets[0].share)), h("td", {}, percent(g.share)))))) : null,
      h("div", { class: "mk-column mk-wide" }, h("h4", {}, "Where"), r.rows.slice(0, 12).map((row) => this.context(row)))));
  }

  // --- masking

  async mask() {
    const { data, s } = this, { layer, expert, sample } = s, from = data.starts[sample];
    const name = `expert ${expert} of layer ${data.layers[layer]}`;
    this.said = `scoring sample ${data.sample[from]} without it …`;
    this.waiting = true;
    this.update();
    try {
      const { content, buffers } = await ask(this.model, { ask: "mask", layer, expert, from, to: data.starts[sample + 1] }, 300);
      const b = buffers[0], delta = new Float32Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength));
      this.said = content.said;
      this.waiting = false;
      this.set({ change: { from, delta, name, layer, expert }, colour: "change" });
    } catch (error) {
      this.said = error.message;
      this.waiting = false;
      this.update();
    }
  }

  changes() {
    const { change, layer, expert, sample } = this.s, { data } = this;
    if (!change || change.layer !== layer || change.expert !== expert || change.from !== data.starts[sample]) return [];
    const known = Array.from(change.delta, (d, i) => ({ d, row: change.from + i })).filter((x) => Number.isFinite(x.d));
    const worst = known.slice().sort((a, b) => Math.abs(b.d) - Math.abs(a.d)).slice(0, 5);
    const mean = known.reduce((sum, x) => sum + x.d, 0) / known.length;
    return [h("div", { class: "mk-change" }, h("p", {}, `Masked: log-probability of the next token changes by ${signed(mean, 4)} nats on average over ${whole(known.length)} tokens. Most changed:`),
      worst.map((x) => h("div", { class: "mk-worst" }, h("span", { class: "mk-number" }, signed(x.d)), this.context(x.row))))];
  }
}

// ---------------------------------------------------------------------------------------------------- the two homes

let asked = 0;

// Ask the kernel; resolves to {content, buffers} or rejects with what went wrong, at the latest after `seconds`.
function ask(model, message, seconds) {
  return new Promise((resolve, reject) => {
    const id = `${Date.now()}-${++asked}`;
    const done = () => { clearTimeout(timer); model.off("msg:custom", listen); };
    const timer = setTimeout(() => { done(); reject(new Error(`the kernel gave no answer within ${seconds} s`)); }, seconds * 1000);
    const listen = (content, buffers) => {
      if (content.id !== id) return;
      done();
      if (content.error) reject(new Error(content.error)); else resolve({ content, buffers });
    };
    model.on("msg:custom", listen);
    model.send({ ...message, id });
  });
}

async function render({ model, el }) {
  const root = h("div", { class: "moekit-explorer" }, h("p", { class: "mk-muted" }, "fetching the trace …"));
  el.append(root);
  try {
    const { content, buffers } = await ask(model, { ask: "trace" }, 60);
    new Views(root, new Data(content.header, buffers), model);
  } catch (error) {
    root.replaceChildren(h("p", { class: "mk-muted" }, `No explorer here: ${error.message}. Run its cell again, or open the page that save_html wrote.`));
  }
}

// The page that save_html writes: the header and the arrays stand in it.
export function openPage() {
  const text = (id) => document.getElementById(id).textContent;
  const header = JSON.parse(text("header"));
  const buffers = header.arrays.map(([name]) => Uint8Array.from(atob(text(`array-${name}`)), (c) => c.charCodeAt(0)));
  const state = { token: -1, expert: [-1, -1] };
  const model = { get: (name) => state[name], set: (name, value) => (state[name] = value), on() {}, save_changes() {} };
  const root = h("div", { class: "moekit-explorer" });
  document.getElementById("explorer").append(root);
  new Views(root, new Data(header, buffers), model);
}

export default { render };
