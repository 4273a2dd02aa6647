// Runs the module in Node on the files in a folder: node node.mjs FOLDER TASK ARGUMENTS..., which prints JSON.
import { createHash } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, task, ...rest] = process.argv.slice(2);
const { generate, load, RamNetError } = await import(pathToFileURL(join(folder, "ramnet.js")));

/** What a call throws, which must be one of the module's own errors. */
async function refused(action) {
  try {
    await action();
  } catch (error) {
    if (error instanceof RamNetError) return error.message;
    throw error;
  }
  return "nothing was thrown";
}

async function collected(generated) {
  const ids = [];
  for await (const id of generated) ids.push(id);
  return ids;
}

const tasks = {
  /** Greedy text, and the logits of ids read one by one and in blocks. */
  async write(prompt, count, ids) {
    const model = await load(folder);
    const state = model.state();
    const generated = await collected(model.generate(state, model.encode(prompt), { maxNewTokens: Number(count) }));
    const more = await collected(model.generate(state, [], { maxNewTokens: 5 })); // goes on where it stopped
    const all = JSON.parse(ids), one = model.state(), block = model.state();
    const alone = all.map((id) => Array.from(model.token(one, id)));
    const blocks = Array.from(model.tokens(block, all, all.length));
    return { generated: [...generated, ...more], position: state.position, alone: alone.flat(), blocks };
  },

  /** Loads a state, reads ids, and saves it, also from a clone that a reset of the original does not change. */
  async resume(from, to, ids) {
    const url = pathToFileURL(folder); // of a folder, also without a slash at its end
    const model = await load(url);
    if (url.pathname.endsWith("/")) throw new Error("the caller's URL was changed");
    const state = model.state();
    model.token(state, 7);
    state.load(await readFile(from));
    const unread = await refused(() => collected(model.generate(state, [])));
    const logits = model.tokens(state, JSON.parse(ids), JSON.parse(ids).length);
    const copy = state.clone();
    state.reset();
    await writeFile(to, copy.save());
    const accesses = copy.accesses(model.layers - 1);
    copy.free();
    const written = Array.from(accesses.written.slots);
    return { logits: Array.from(logits), position: state.position, written, unread, freed: await refused(() => copy.save()) };
  },

  /** Samples with seeds and settings. */
  async sample() {
    const model = await load(folder);
    const run = (options) => collected(model.generate(model.state(), [65], { maxNewTokens: 40, ...options }));
    const [first, again, other] = await Promise.all([1, 1, 2].map((seed) => run({ temperature: 1, seed })));
    const [greedy, narrow] = [await run({}), await run({ temperature: 5, topK: 1, seed: 3 })];
    return { first, again, other, greedy, narrow };
  },

  /** What wrong files and arguments are answered. */
  async refuse() {
    const names = ["ramnet.json", ...Object.keys(JSON.parse(await readFile(join(folder, "ramnet.json"))).files)];
    const good = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await readFile(join(folder, name))])));
    const changed = (name, change) => {
      const bytes = Uint8Array.from(good[name]);
      return { ...good, [name]: change(bytes) ?? bytes };
    };
    const manifest = (change) => {
      const described = JSON.parse(good["ramnet.json"]);
      change(described);
      return { ...good, "ramnet.json": new TextEncoder().encode(JSON.stringify(described)) };
    };
    const digest = (bytes) => createHash("sha256").update(bytes).digest("hex");
    const flip = (bytes) => void (bytes[bytes.length - 1] ^= 1);
    const notWasm = new Uint8Array(8);
    const cut = good["weights.safetensors"].subarray(0, -4);
    const digests = { "ramnet.wasm": digest(notWasm), "weights.safetensors": digest(cut) };
    const model = await load(good), other = await load(good);
    const state = model.state();
    const before = Array.from(model.token(state, 5)), saved = state.save();
    const answers = {
      weights: await refused(() => load(changed("weights.safetensors", flip))),
      module: await refused(() => load(changed("ramnet.wasm", flip))),
      page: await refused(() => load(changed("ramnet.js", flip))),
      json: await refused(() => load(changed("ramnet.json", (bytes) => bytes.subarray(0, 40)))),
      format: await refused(() => load(manifest((m) => (m.format = "onnx")))),
      unnamed: await refused(() => load(manifest((m) => delete m.files["ramnet.wasm"]))),
      outside: await refused(() => load(manifest((m) => (m.files["../x"] = "0")))),
      missing: await refused(() => load({ "ramnet.json": good["ramnet.json"] })),
      folder: await refused(() => load(join(folder, "nowhere"))),
      compile: await refused(() =>
        load({ ...manifest((m) => Object.assign(m.files, digests)), "ramnet.wasm": notWasm, "weights.safetensors": cut })),
      cut: await refused(() =>
        load({ ...manifest((m) => (m.files["weights.safetensors"] = digests["weights.safetensors"])), "weights.safetensors": cut })),
      id: await refused(() => model.token(state, 256)),
      fraction: await refused(() => model.token(state, 1.5)),
      large: await refused(() => model.token(state, 2 ** 32)),
      ids: await refused(() => model.tokens(state, [1, -1])),
      last: await refused(() => model.tokens(state, [1], 2)),
      none: await refused(() => model.tokens(state, null)),
      text: await refused(() => model.tokens(state, "abc")),
      holes: await refused(() => model.tokens(state, [1, , 3])),
      much: await refused(() => model.tokens(state, [1], 2 ** 22)),
      nothing: await refused(() => collected(model.generate(state, null))),
      layer: await refused(() => state.accesses(9)),
      stranger: await refused(() => model.token(other.state(), 1)),
      state: await refused(() => state.load(saved.subarray(0, 100))),
      empty: await refused(() => collected(model.generate(model.state(), []))),
      temperature: await refused(() => collected(model.generate(state, [1], { temperature: -1 }))),
      ...Object.fromEntries(
        await Promise.all(
          [0, 1, 2].map(async (i) => {
            const damaged = { tokens: () => [1, 3, 2].map((x, j) => (j === i ? NaN : x)), token: () => [1, 3, 2] };
            return [`nan ${i}`, await refused(() => collected(generate(damaged, { logits: null }, [1], { maxNewTokens: 2 })))];
          }),
        ),
      ),
    };
    const untouched = model.state();
    untouched.load(saved);
    const same = String(model.token(state, 6)) === String(model.token(untouched, 6)); // nothing above changed the state
    return { answers, same, finite: before.every(Number.isFinite) };
  },

  async imports() {
    const module = await WebAssembly.compile(await readFile(join(folder, "ramnet.wasm")));
    return WebAssembly.Module.imports(module);
  },
};

console.log(JSON.stringify(await tasks[task](...rest)));
