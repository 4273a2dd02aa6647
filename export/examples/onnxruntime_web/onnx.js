/** The ONNX export of a model, run by onnxruntime-web, behind the methods of ramnet.js that generation calls. */

/**
 * Load decode.onnx and its weights from the folder of an ONNX export.
 *
 * @param ort the module onnxruntime-web/wasm
 * @param read a function from a file's name to a promise of its bytes
 */
export async function load(ort, read) {
  const text = new TextDecoder();
  const { config, graphs } = JSON.parse(text.decode(await read("ramnet.json")));
  const session = await ort.InferenceSession.create(await read("decode.onnx"), {
    executionProviders: ["wasm"],
    externalData: [{ path: "weights.bin", data: await read("weights.bin") }],
  });
  return new Model(ort, session, graphs.decode, config);
}

class Model {
  constructor(ort, session, graph, config) {
    Object.assign(this, { ort, session, graph, config });
    this.vocabularySize = config.vocab_size;
    this.layers = config.num_layers;
    const each = (size) => (Array.isArray(size) ? size : Array(this.layers).fill(size)); // of each layer
    const orders = each(config.order);
    this.heads = each(config.num_heads);
    this.slots = each(config.sub_dim).map((size, layer) => size ** orders[layer]);
    this.topK = each(config.top_k);
  }

  state() {
    return new State(this);
  }

  async token(state, id) {
    const ids = new this.ort.Tensor("int64", BigInt64Array.of(BigInt(id)), [1, 1]);
    state.outputs = await this.session.run({ input_ids: ids, ...state.tensors });
    for (const name of Object.keys(state.tensors)) state.tensors[name] = state.outputs[name.replace("past_", "present_")];
    state.logits = state.outputs.logits.data;
    return state.logits;
  }

  async tokens(state, ids) {
    for (const id of ids) await this.token(state, id);
    return state.logits;
  }
}

class State {
  constructor(model) {
    this.model = model;
    this.reset();
  }

  /** Before the first token, the memory and the position are 0, and the mass of a slot is 1/M. */
  reset() {
    this.tensors = {};
    this.outputs = this.logits = null;
    for (const { name, shape, dtype } of this.model.graph.inputs.slice(1)) {
      const sizes = shape.map((size) => (size === "batch" ? 1 : size));
      const count = sizes.reduce((product, size) => product * size, 1);
      const data = dtype === "int64" ? new BigInt64Array(count) : new Float32Array(count);
      if (name.includes(".mass.")) data.fill(1 / this.model.slots[name.split(".")[2]]);
      this.tensors[name] = new this.model.ort.Tensor(dtype, data, sizes);
    }
  }

  get position() {
    return Number(this.tensors["past_recurrent.position"].data[0]);
  }

  accesses(layer) {
    const { data } = this.outputs[`slots.${layer}`];
    const count = data.length / 2;
    const of = (side) => ({ slots: this.#moved(data.subarray(side * count, (side + 1) * count), layer) });
    return { read: of(0), written: of(1) };
  }

  /** The graph's slots are those before CAPE, which moves the addresses of a layer's first heads with the position. */
  #moved(slots, layer) {
    const [size, topK, heads] = ["slots", "topK", "heads"].map((name) => this.model[name][layer]);
    const { cape_full_layers: full, cape_half_layers: half } = this.model.config;
    const moving = layer < full ? heads : layer < full + half ? Math.floor(heads / 2) : 0;
    const shift = (this.position - 1) % size;
    return slots.map((slot, i) => (i < moving * topK ? (slot - shift + size) % size : slot));
  }
}
