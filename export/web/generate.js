/** Chooses tokens one after another. */

import { RamNetError } from "./files.js";

/** A model may also return promises, as one that runs elsewhere does. */
export async function* generate(model, state, ids, options = {}) {
  const { maxNewTokens = Infinity, temperature = 0, topK = 0, seed } = options;
  check("maxNewTokens", maxNewTokens, maxNewTokens >= 0, "at least 0");
  check("temperature", temperature, temperature >= 0 && temperature < Infinity, "at least 0 and finite");
  check("topK", topK, Number.isInteger(topK) && topK >= 0, "a whole number of at least 0");
  const random = seed === undefined ? Math.random : seeded(seed);
  let logits = ids?.length === 0 ? state.logits : await model.tokens(state, ids);
  if (logits === null) throw new RamNetError("ids is empty, and the state has read no token since it was made or loaded");
  let rested = performance.now();
  for (let made = 0; made < maxNewTokens; made++) {
    const id = choose(logits, temperature, topK, random);
    logits = await model.token(state, id);
    yield id;
    if (performance.now() - rested > 16) {
      await pause();
      rested = performance.now();
    }
  }
}

function check(name, value, holds, valid) {
  if (typeof value !== "number" || !holds) throw new RamNetError(`${name} is ${value}; it must be ${valid}`);
}

function choose(logits, temperature, topK, random) {
  let best = 0;
  for (let i = 1; i < logits.length && !Number.isNaN(logits[best]); i++) if (!(logits[i] <= logits[best])) best = i;
  if (!Number.isFinite(logits[best])) throw new RamNetError(`the largest logit is ${logits[best]}; it must be finite`);
  if (temperature === 0) return best;
  const least = topK > 0 && topK < logits.length ? logits.slice().sort()[logits.length - topK] : -Infinity;
  const weights = logits.map((x) => (x < least ? 0 : Math.exp((x - logits[best]) / temperature)));
  let left = random() * weights.reduce((sum, x) => sum + x, 0);
  for (let i = 0; i < weights.length; i++) if (weights[i] > 0 && (left -= weights[i]) < 0) return i;
  return best;
}

/** Return uniform numbers in [0, 1): Marsaglia's xorshift32 (2003), whose state must not be 0. */
function seeded(seed) {
  check("seed", seed, Number.isInteger(seed), "a whole number");
  let x = Math.imul(seed + 1, 0x9e3779b1) || 1;
  return () => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) / 2 ** 32;
  };
}

/** Let the page handle what has happened meanwhile. A timer would wait 4 ms. */
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
