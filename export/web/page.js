/** The page: sends what is typed to the worker, and shows what it answers. */

import { Picture } from "./picture.js";

const element = (id) => document.getElementById(id);
const [form, text, status] = ["form", "text", "status"].map(element);
const worker = new Worker("worker.js", { type: "module" });
const encoder = new TextEncoder();
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** The bytes that the model has read, and the text that they are shown as. */
let read = [];
let shown = "";
let isFresh = true; // no memory was loaded
let written = { tokens: 0, seconds: 0 };
let picture;

function enable(isWriting, isLoaded = true) {
  for (const id of ["write", "save", "restore"]) element(id).disabled = isWriting || !isLoaded;
  element("stop").disabled = !isWriting;
  text.readOnly = isWriting;
}

function say(sentence) {
  status.textContent = sentence;
}

/** The speed is that of the model, whatever the pace; there is none if the clock saw no time pass. */
function count() {
  const { tokens, seconds } = written;
  return `${tokens} tokens` + (seconds > 0 ? `, ${number.format(tokens / seconds)} tokens/s` : "");
}

/** A size of the layers: one number if they agree. */
function each(sizes) {
  const shown = sizes.every((size) => size === sizes[0]) ? sizes.slice(0, 1) : sizes;
  return shown.map((size) => number.format(size)).join("/");
}

const answers = {
  loaded({ config, layers, heads, slots, topK, canSave }) {
    if (config.vocab_size !== 256) return say(`The model has ${config.vocab_size} tokens; this page writes bytes.`);
    element("about").textContent =
      `A language model of ${layers} layers, each with ${each(heads)} memories of ${each(slots)} slots,` +
      ` of which a token reads ${each(topK)} and writes ${each(topK)}. It runs in this page.`;
    picture = new Picture(element("heads"), config, { layers, heads, slots, topK });
    element("layer").replaceChildren(...Array.from({ length: layers }, (_, i) => new Option(i + 1, i)));
    element("save").hidden = element("restore").hidden = !canSave;
    enable(false);
    say("Ready");
  },

  tokens({ ids, accesses, seconds }) {
    read.push(...ids);
    written.tokens += ids.length;
    if (ids.length > 0) written.seconds += seconds;
    text.value = new TextDecoder().decode(Uint8Array.from(read));
    shown = text.value; // with the line ends of a text area
    text.scrollTop = text.scrollHeight;
    picture.add(accesses);
    say(`Writing: ${count()}`);
  },

  ended({ position }) {
    picture.describe();
    enable(false);
    say(`${count()}; the model has read ${position} tokens`);
  },

  saved({ file }) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file]));
    link.download = "state.safetensors";
    link.click();
    URL.revokeObjectURL(link.href);
    say(`Saved ${number.format(file.length / 1024)} KB`);
  },

  restored({ position }) {
    [read, shown, text.value, isFresh] = [[], "", "", false];
    picture.clear();
    say(`Loaded a memory of ${position} tokens; type what follows them`);
    text.focus();
  },

  failed({ message }) {
    enable(false, picture !== undefined);
    say(message);
  },
};

function write() {
  const goesOn = text.value.startsWith(shown);
  const rest = goesOn ? text.value.slice(shown.length) : text.value;
  if (text.value === "" || (rest === "" && read.length === 0)) return say("Type a text for the model to continue");
  const ids = encoder.encode(rest);
  const fresh = !goesOn || (read.length === 0 && isFresh);
  if (fresh) [read, isFresh] = [[], true];
  if (!goesOn) picture.clear();
  for (const id of ids) read.push(id);
  written = { tokens: 0, seconds: 0 };
  enable(true);
  const options = { temperature: element("temperature").valueAsNumber, maxNewTokens: element("count").valueAsNumber };
  worker.postMessage({ type: "write", ids, fresh, options, pace: Number(element("pace").value) });
}

worker.onmessage = ({ data }) => answers[data.type](data);
worker.onerror = () => say("The model's worker cannot be started");
form.addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") worker.postMessage({ type: "stop" });
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !element("write").disabled) form.requestSubmit();
});
element("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
element("save").addEventListener("click", () => worker.postMessage({ type: "save" }));
element("restore").addEventListener("click", () => element("file").click());
element("file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  if (file) worker.postMessage({ type: "restore", file: await file.arrayBuffer() });
  target.value = "";
});
element("layer").addEventListener("change", ({ target }) => picture.show(Number(target.value)));
element("temperature").addEventListener("input", ({ target }) => {
  element("degrees").value = target.valueAsNumber.toFixed(1);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => picture?.redraw());

worker.postMessage({ type: "load", runtime: new URLSearchParams(location.search).get("runtime") });
if ("serviceWorker" in navigator) navigator.serviceWorker.register("offline.js");
