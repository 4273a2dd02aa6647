/**
 * Runs a model beside the page, which stays alive. Messages to it have a `type`:
 *   load {runtime}                      answers loaded {config, layers, heads, slots, topK, canSave}
 *   write {ids, fresh, options, pace}   answers tokens {ids, accesses, seconds} as they come, then ended {position}
 *   stop                                ends write after the next token
 *   save, restore {file}                answer saved {file}, restored {position}
 * What fails is answered by failed {message}. `accesses` are those of one token after another, and of
 * one layer after another, each [2, heads, topK] of that layer, reads first; `seconds` is the time in the model, and
 * `pace` the most tokens a second, 0 for any number.
 */

import { generate } from "./generate.js";

/** The most tokens of a prompt whose accesses are told. */
const TOLD = 256;
/** Milliseconds between two messages. */
const EVERY = 30;

let model, state, stopped;

const actions = {
  async load({ runtime }) {
    model = await open(runtime);
    state = model.state();
    const { config, layers, heads, slots, topK } = model;
    postMessage({ type: "loaded", config, layers, heads, slots, topK, canSave: "save" in state });
  },

  async write({ ids, fresh, options, pace }) {
    stopped = false;
    if (fresh) state.reset();
    const watched = new Watched();
    if (ids.length > TOLD) await model.tokens(state, ids.slice(0, -TOLD), 0);
    for (const id of ids.slice(-TOLD)) await watched.token(state, id);
    watched.report([]);
    let written = [], count = 0, reported = performance.now();
    const started = reported;
    for await (const id of generate(watched, state, [], options)) {
      written.push(id);
      const ahead = pace > 0 ? (++count * 1000) / pace - (performance.now() - started) : 0;
      if (ahead > 0 || performance.now() - reported > EVERY) {
        watched.report(written);
        [written, reported] = [[], performance.now()];
      }
      if (ahead > 0) await new Promise((resolve) => setTimeout(resolve, ahead));
      if (stopped) break;
    }
    watched.report(written);
    postMessage({ type: "ended", position: state.position });
  },

  async stop() {
    stopped = true;
  },

  async save() {
    postMessage({ type: "saved", file: state.save() });
  },

  async restore({ file }) {
    state.load(file);
    postMessage({ type: "restored", position: state.position });
  },
};

/** The model, with a note of what each token accessed and how long it took. */
class Watched {
  accesses = [];
  seconds = 0;

  async token(state, id) {
    const start = performance.now();
    const logits = await model.token(state, id);
    this.seconds += (performance.now() - start) / 1000;
    for (let layer = 0; layer < model.layers; layer++) {
      const { read, written } = state.accesses(layer);
      this.accesses.push(...read.slots, ...written.slots);
    }
    return logits;
  }

  report(ids) {
    postMessage({ type: "tokens", ids, accesses: Int32Array.from(this.accesses), seconds: this.seconds });
    [this.accesses, this.seconds] = [[], 0];
  }
}

/** With "onnx", the same model by onnxruntime-web, from a folder beside the page that holds both. */
async function open(runtime) {
  if (runtime !== "onnx") return (await import("./ramnet.js")).load();
  const [{ load }, ort] = await Promise.all([import("./onnx/onnx.js"), import("./onnx/ort.wasm.min.mjs")]);
  ort.env.wasm.numThreads = 1;
  return load(ort, async (name) => new Uint8Array(await (await fetch(`onnx/${name}`)).arrayBuffer()));
}

onmessage = async ({ data }) => {
  try {
    await actions[data.type](data);
  } catch (error) {
    postMessage({ type: "failed", message: error.message });
  }
};
