/** Reads the files of an exported model and checks their digests. */

const MANIFEST = "ramnet.json";
const WASM = "ramnet.wasm";
const WEIGHTS = "weights.safetensors";

export class RamNetError extends Error {
  name = "RamNetError";
}

/** Return the description, the compiled module and the bytes of the weights, after every file has been checked. */
export async function open(source) {
  const read = await reader(source);
  const manifest = parse(new TextDecoder().decode((await read(MANIFEST)).bytes));
  const names = Object.keys(manifest.files);
  const files = await Promise.all(names.map((name) => checked(read, name, manifest.files[name])));
  const found = Object.fromEntries(names.map((name, i) => [name, files[i]]));
  return { manifest, module: await compiled(found[WASM]), weights: found[WEIGHTS].bytes };
}

function parse(text) {
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new RamNetError(`${MANIFEST} is damaged: ${error.message}`, { cause: error });
  }
  if (!/^ramnet-/.test(manifest?.format) || typeof manifest.files !== "object" || manifest.files === null) {
    throw new RamNetError(`${MANIFEST} does not describe an exported model`);
  }
  for (const name of [WASM, WEIGHTS]) {
    if (!Object.hasOwn(manifest.files, name)) throw new RamNetError(`${MANIFEST} names no ${name}; export for wasm`);
  }
  for (const name of Object.keys(manifest.files)) {
    if (!/^[\w-][\w.-]*$/.test(name)) throw new RamNetError(`${MANIFEST} names ${name}, which is no file beside it`);
  }
  return manifest;
}

/** Return a function from a file's name to its bytes and, if it was fetched, what it compiles to. */
async function reader(source) {
  if (typeof source === "object" && !(source instanceof URL)) {
    return async (name) => {
      if (!Object.hasOwn(source, name)) throw new RamNetError(`${name} is missing`);
      return { bytes: source[name] };
    };
  }
  const isNode = globalThis.process?.versions?.node !== undefined;
  const isUrl = source instanceof URL || /^[a-z]+:\/\//i.test(source);
  let base;
  if (isUrl) base = new URL(source);
  else if (isNode) base = (await import("node:url")).pathToFileURL(`${source}/`);
  else base = new URL(source, globalThis.location.href);
  if (!base.pathname.endsWith("/")) base.pathname += "/";
  if (isNode && base.protocol === "file:") {
    const { readFile } = await import("node:fs/promises");
    return async (name) => ({ bytes: await named(name, () => readFile(new URL(name, base))) });
  }
  return (name) => named(name, () => fetched(new URL(name, base), name));
}

async function fetched(url, name) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`HTTP status ${response.status}`);
  // Compiles while it arrives, which only servers that state the type of the file allow.
  const streams = name === WASM && response.headers.get("content-type")?.startsWith("application/wasm");
  const compiling = streams ? WebAssembly.compileStreaming(response.clone()) : undefined;
  compiling?.catch(() => {}); // The digest is checked first; whoever awaits it still gets the error.
  return { bytes: new Uint8Array(await response.arrayBuffer()), compiling };
}

async function named(name, action) {
  try {
    return await action();
  } catch (error) {
    throw new RamNetError(`${name} cannot be read: ${error.message}`, { cause: error });
  }
}

async function checked(read, name, digest) {
  const file = await read(name);
  const { subtle } = globalThis.crypto ?? (await import("node:crypto")).webcrypto;
  if (!subtle) throw new RamNetError("digests cannot be checked on a page that came neither by https nor from localhost");
  const got = new Uint8Array(await subtle.digest("SHA-256", file.bytes));
  const text = Array.from(got, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (text !== digest) throw new RamNetError(`${name} is damaged: its SHA-256 digest is not that of ${MANIFEST}`);
  return file;
}

async function compiled({ bytes, compiling }) {
  try {
    return await (compiling ?? WebAssembly.compile(bytes));
  } catch (error) {
    throw new RamNetError(`${WASM} cannot be compiled, which needs WebAssembly SIMD: ${error.message}`, {
      cause: error,
    });
  }
}
