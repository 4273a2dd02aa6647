/** A RAM-Net language model in a browser or in Node, by WebAssembly. `ramnet.d.ts` describes what is exported. */

import { RamNetError, open } from "./files.js";
import { generate } from "./generate.js";

export { RamNetError, generate };

export async function load(source = new URL("./", import.meta.url)) {
  const { manifest, module, weights } = await open(source);
  const { exports } = await WebAssembly.instantiate(module, {});
  return new Model(manifest, new Library(exports), weights);
}

/** The C functions of ramnet.h, and the memory that they work on. */
class Library {
  #cell; // a pointer that functions return into

  constructor(exports) {
    this.c = exports;
    this.#cell = this.allocate(4);
  }

  call(name, ...values) {
    if (this.c[`ramnet_${name}`](...values) !== 0) throw new RamNetError(this.#message());
  }

  /** Call a function whose last parameter is where it returns a pointer. */
  make(name, ...values) {
    this.call(name, ...values, this.#cell);
    return new DataView(this.#memory).getUint32(this.#cell, true);
  }

  allocate(bytes) {
    const pointer = bytes < 2 ** 32 ? this.c.malloc(Math.max(bytes, 1)) >>> 0 : 0;
    if (pointer === 0) throw new RamNetError(`there is no memory for ${bytes} bytes`);
    return pointer;
  }

  with(bytes, use) {
    const pointer = this.allocate(bytes);
    try {
      return use(pointer);
    } finally {
      this.c.free(pointer);
    }
  }

  // Views are made for each use, because they end when the memory grows.
  get #memory() {
    return this.c.memory.buffer;
  }

  bytes(pointer, count) {
    return new Uint8Array(this.#memory, pointer, count);
  }

  integers(pointer, count) {
    return new Int32Array(this.#memory, pointer, count);
  }

  floats(pointer, count) {
    return new Float32Array(this.#memory, pointer, count);
  }

  #message() {
    const rest = new Uint8Array(this.#memory, this.c.ramnet_message());
    return new TextDecoder().decode(rest.subarray(0, rest.indexOf(0)));
  }
}

class Model {
  #library;
  #model;
  #logits;

  constructor({ config, precision, text = null }, library, weights) {
    const { c } = library;
    Object.assign(this, { config, precision, text });
    this.vocabularySize = c.ramnet_vocabulary();
    this.layers = c.ramnet_layers();
    const each = (size) => Array.from({ length: this.layers }, (_, layer) => size(layer));
    this.heads = each(c.ramnet_heads);
    this.slots = each(c.ramnet_slots);
    this.topK = each(c.ramnet_top_k);
    this.#library = library;
    this.#logits = library.allocate(4 * this.vocabularySize);
    const file = library.allocate(weights.length);
    library.bytes(file, weights.length).set(weights);
    this.#model = library.make("open_bytes", file, weights.length, 1);
  }

  encode(text) {
    this.#requireBytes();
    return new TextEncoder().encode(text);
  }

  decode(ids) {
    this.#requireBytes();
    return new TextDecoder().decode(Uint8Array.from(ids));
  }

  #requireBytes() {
    if (this.text !== "bytes") throw new RamNetError("the model does not say how text becomes ids; give it ids");
  }

  state() {
    return new State(this, this.#library, this.#library.make("state_create", this.#model));
  }

  token(state, id) {
    const pointer = this.#pointer(state);
    whole("id", id);
    this.#library.call("token", this.#model, pointer, id, this.#logits);
    state.logits = this.#library.floats(this.#logits, this.vocabularySize).slice();
    return state.logits;
  }

  tokens(state, ids, last = 1) {
    const library = this.#library, size = this.vocabularySize, pointer = this.#pointer(state);
    const read = listed(ids);
    read.forEach((id, i) => whole(`id ${i}`, id));
    whole("last", last);
    return library.with(4 * (ids.length + Math.max(last, 0) * size), (at) => {
      const logits = at + 4 * ids.length;
      library.integers(at, ids.length).set(read);
      library.call("tokens", this.#model, pointer, at, ids.length, logits, last);
      const found = library.floats(logits, last * size).slice();
      if (ids.length > 0) state.logits = last > 0 ? found.slice(-size) : null;
      return found;
    });
  }

  generate(state, ids, options) {
    return generate(this, state, ids, options);
  }

  #pointer(state) {
    if (!(state instanceof State) || state.model !== this) throw new RamNetError("the state is of another model");
    return state._pointer;
  }
}

const abandoned = new FinalizationRegistry(({ library, pointer }) => library.c.ramnet_state_free(pointer));

class State {
  #library;
  #at;

  constructor(model, library, pointer) {
    this.model = model;
    this.logits = null;
    this.#library = library;
    this.#at = pointer;
    abandoned.register(this, { library, pointer }, this);
  }

  get _pointer() {
    if (this.#at === 0) throw new RamNetError("the state was freed");
    return this.#at;
  }

  get position() {
    return Number(this.#library.c.ramnet_state_position(this._pointer));
  }

  clone() {
    const copy = new State(this.model, this.#library, this.#library.make("state_clone", this._pointer));
    copy.logits = this.logits;
    return copy;
  }

  reset() {
    this.#library.c.ramnet_state_reset(this._pointer);
    this.logits = null;
  }

  save() {
    const library = this.#library, count = library.c.ramnet_state_bytes(this._pointer) >>> 0;
    return library.with(count, (at) => {
      library.c.ramnet_state_write(this._pointer, at);
      return library.bytes(at, count).slice();
    });
  }

  load(file) {
    const library = this.#library, bytes = file instanceof ArrayBuffer ? new Uint8Array(file) : file;
    if (!(bytes instanceof Uint8Array)) throw new RamNetError("a state file is a Uint8Array or an ArrayBuffer");
    library.with(bytes.length, (at) => {
      library.bytes(at, bytes.length).set(bytes);
      library.call("state_read", this._pointer, at, bytes.length);
    });
    this.logits = null;
  }

  accesses(layer) {
    whole("layer", layer);
    const { heads, topK } = this.model, library = this.#library;
    const count = (heads[layer] ?? 0) * (topK[layer] ?? 0); // the call fails if there is no such layer
    return library.with(16 * count, (at) => {
      library.call("state_accesses", this._pointer, layer, at, at + 8 * count);
      const slots = library.integers(at, 2 * count).slice();
      const weights = library.floats(at + 8 * count, 2 * count).slice();
      const of = (i) => ({ slots: slots.subarray(i, i + count), weights: weights.subarray(i, i + count) });
      return { read: of(0), written: of(count) };
    });
  }

  free() {
    this.#library.c.ramnet_state_free(this._pointer);
    abandoned.unregister(this);
    this.#at = 0;
  }
}

/** Ids as an array without holes. */
function listed(ids) {
  if (!Array.isArray(ids) && !ArrayBuffer.isView(ids)) throw new RamNetError(`ids is ${ids}; it must be an array`);
  return Array.from(ids);
}

/** The library takes 32-bit integers, to which JavaScript would cut any number without a word. */
function whole(name, value) {
  if (!Number.isInteger(value) || Math.abs(value) >= 2 ** 31) {
    throw new RamNetError(`${name} is ${value}; it must be a whole number`);
  }
}
