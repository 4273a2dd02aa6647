/** Shows whose writes the token under the pointer reads, and which slots each token wrote and read. */

const ROWS = 256; // of the picture, the most; a row then stands for several slots
const WIDTH = 760; // pixels, about; wider only if a token would take less than 4, or 2 of a long text
const { labels, whole, heads, cut } = JSON.parse(document.getElementById("data").textContent);
const [text, sources, select, canvas] = ["#text", "#sources", "#head", "canvas"].map((name) => document.querySelector(name));
const column = Math.max(labels.length > 4000 ? 2 : 4, Math.min(24, 2 * Math.floor(WIDTH / labels.length / 2)));

const say = (id, words) => (document.getElementById(id).textContent = words);
const percent = (hundredths) => (hundredths < 1 ? "below 1%" : `${hundredths}%`);
const shown = (label) => label.replace("\n", "↵").replace("\t", "⇥").replace(/^ $/, "␣");

let head = heads[0];
let token = labels.length - 1;

const spans = labels.map((label, i) => {
  const span = document.createElement("span");
  Object.assign(span, { tabIndex: -1, id: `token-${i}`, className: whole ? "whole" : "" });
  span.setAttribute("role", "option");
  if (label === "\n") {
    span.append(Object.assign(document.createElement("span"), { className: "mark", textContent: "↵" }), "\n");
  } else {
    span.textContent = label;
  }
  return span;
});
text.append(...spans);

const step = [5, 10, 20, 50, 100].find((tokens) => tokens * column >= 100) ?? 200;
for (let t = 0; t < labels.length; t += step) {
  const tick = Object.assign(document.createElement("span"), { textContent: t || "token 0" });
  tick.style.left = `${t * column}px`;
  document.getElementById("ticks").append(tick);
}
for (const [i, each] of heads.entries()) {
  const kind = each.moves ? "addresses move (CAPE)" : "addresses stay";
  select.append(new Option(`Layer ${each.layer}, head ${each.head}: ${kind}`, i));
}
if (cut) {
  document.getElementById("cut").hidden = false;
  say("cut", cut);
}

/** The K slots and weights, in hundredths, of a token's writes or reads. */
function accesses(kind, t) {
  const K = head.topK;
  return [head[`${kind}Slots`].slice(t * K, (t + 1) * K), head[`${kind}Weights`].slice(t * K, (t + 1) * K)];
}

function context(t) {
  const code = document.createElement("code");
  const around = (from, to) => labels.slice(Math.max(0, from), to).map(shown).join(whole ? " " : "");
  const self = Object.assign(document.createElement("b"), { textContent: shown(labels[t]) });
  const gap = whole ? " " : "";
  const [before, after] = whole ? [2, 3] : [4, 4];
  code.append(around(t - before, t) + gap, self, gap + around(t + 1, t + after));
  return code;
}

function row(who, ago, share) {
  const line = document.createElement("tr");
  const [first, second, third] = [0, 1, 2].map(() => line.insertCell());
  first.append(who);
  second.textContent = ago;
  const bar = document.createElement("i");
  bar.style.width = `${share * 0.05}rem`;
  third.append(bar, percent(share));
  return line;
}

function showToken() {
  for (const span of spans) {
    span.style.background = span.style.borderBottomWidth = "";
    span.setAttribute("aria-selected", "false");
    span.tabIndex = -1;
  }
  spans[token].setAttribute("aria-selected", "true");
  spans[token].tabIndex = 0;
  const n = head.most;
  const found = [];
  for (let i = token * n; i < (token + 1) * n; i++) {
    if (head.shares[i] > 0) found.push([head.sources[i], head.shares[i]]);
  }
  for (const [source, share] of found) {
    const { style } = spans[source];
    style.background = `color-mix(in srgb, var(--read) ${18 + 0.3 * share}%, transparent)`;
    style.borderBottomWidth = `${1 + Math.round(share / 18)}px`;
  }
  const rows = found.map(([source, share]) => row(context(source), token - source || "itself", share));
  const before = head.before[token];
  const others = 100 - before - found.reduce((sum, [, share]) => sum + share, 0);
  if (others > 0) rows.push(row("Other tokens", "", others));
  if (before > 0) rows.push(row("Before the text", "", before));
  sources.replaceChildren(...rows);
  const heading = document.getElementById("reader");
  heading.replaceChildren(`Token ${token}, `, context(token), ", reads");
  const list = (kind) => {
    const [slots, weights] = accesses(kind, token);
    return slots.map((slot, i) => `${slot} (${percent(weights[i])})`).join(", ");
  };
  say("write", list("write"));
  say("read", list("read"));
  const { style } = document.getElementById("cursor");
  style.left = `${token * column}px`;
  style.width = `${column}px`;
  const scroll = document.getElementById("scroll");
  const hidden = token * column - scroll.scrollLeft;
  if (hidden < 0 || hidden > scroll.clientWidth - column) scroll.scrollLeft = token * column - scroll.clientWidth / 2;
}

function showHead() {
  const rows = Math.min(head.slots, ROWS);
  const height = Math.max(2, Math.floor(256 / rows)); // pixels of a row
  Object.assign(canvas, { width: labels.length * column, height: rows * height });
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  for (const [kind, colour, side] of [["write", "--written", 0], ["read", "--read", 1]]) {
    context.fillStyle = style.getPropertyValue(colour);
    for (let t = 0; t < labels.length; t++) {
      const [slots, weights] = accesses(kind, t);
      slots.forEach((slot, i) => {
        context.globalAlpha = Math.min(1, 0.05 + 1.4 * Math.sqrt(weights[i] / 100));
        const y = (rows - 1 - Math.floor((slot * rows) / head.slots)) * height;
        context.fillRect(t * column + (side * column) / 2, y, column / 2, height);
      });
    }
  }
  const name = `Layer ${head.layer}, head ${head.head}`;
  canvas.setAttribute("aria-label", `${name}: the slots that each token wrote and read`);
  say("top", head.slots - 1);
  say("summary", `${name}: ${head.used}% of ${head.slots} slots were written, half of the weight to ${head.busiest} of them. Of what is read, ${head.age}.`);
  showToken();
}

function choose(t, focus = false) {
  token = Math.max(0, Math.min(labels.length - 1, t));
  showToken();
  if (focus) spans[token].focus();
}

const numberOf = (target) => spans.indexOf(target.closest("[role=option]"));
text.addEventListener("pointerover", (event) => numberOf(event.target) >= 0 && choose(numberOf(event.target)));
text.addEventListener("focusin", (event) => numberOf(event.target) >= 0 && choose(numberOf(event.target)));
text.addEventListener("keydown", (event) => {
  const last = labels.length - 1;
  const to = { ArrowLeft: token - 1, ArrowRight: token + 1, Home: 0, End: last, ArrowUp: token - 10, ArrowDown: token + 10 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to, true);
});
canvas.addEventListener("pointermove", (event) => {
  choose(Math.floor(event.offsetX / column));
  spans[token].scrollIntoView({ block: "nearest" });
});
select.addEventListener("change", () => {
  head = heads[select.value];
  showHead();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showHead);
showHead();
