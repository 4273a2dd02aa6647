// Compares tokens a second of WebAssembly and of onnxruntime-web, interleaved:
//   npm install onnxruntime-web
//   node compare.mjs WEB_FOLDER ONNX_FOLDER [ROUNDS]
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

import { load as loadOnnx } from "./onnx.js";

const [web, onnx, rounds = "9"] = process.argv.slice(2);
const ort = createRequire(resolve("package.json"))("onnxruntime-web/wasm");
ort.env.wasm.numThreads = 1;
const { load } = await import(pathToFileURL(resolve(web, "ramnet.js")));
const models = { wasm: await load(web), onnxruntime: await loadOnnx(ort, (name) => readFile(join(onnx, name))) };

const TOKENS = 300;
const times = { wasm: [], onnxruntime: [] };
for (let round = 0; round <= Number(rounds); round++) {
  for (const [name, model] of Object.entries(models)) {
    const state = model.state();
    const start = performance.now();
    for (let i = 0; i < TOKENS; i++) await model.token(state, (i * 37) % model.vocabularySize);
    if (round > 0) times[name].push((performance.now() - start) / TOKENS); // the first compiles
  }
}
const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];
const ratios = times.wasm.map((time, i) => times.onnxruntime[i] / time);
for (const [name, values] of Object.entries(times)) console.log(`${name} ${(median(values) * 1000).toFixed(0)} µs a token`);
console.log(`ratio ${median(ratios).toFixed(1)} (${Math.min(...ratios).toFixed(1)} to ${Math.max(...ratios).toFixed(1)})`);
