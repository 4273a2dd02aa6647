// Continues ids by onnxruntime-web: node onnx.mjs FOLDER PACKAGES IDS COUNT, which prints JSON.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

import { load } from "../../../export/examples/onnxruntime_web/onnx.js";
import { generate } from "../../../export/web/generate.js";

const [folder, packages, prompt, count] = process.argv.slice(2);
const ort = createRequire(join(packages, "x"))("onnxruntime-web/wasm");
ort.env.wasm.numThreads = 1;
const model = await load(ort, (name) => readFile(join(folder, name)));
const state = model.state(), ids = [];
for await (const id of generate(model, state, JSON.parse(prompt), { maxNewTokens: Number(count) })) ids.push(id);
const slots = Array.from(state.accesses(0).written.slots);
const logits = Array.from(await model.token(model.state(), ids[0]));
console.log(JSON.stringify({ ids, slots, position: state.position, logits }));
