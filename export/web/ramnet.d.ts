/** A RAM-Net language model in a browser or in Node, by WebAssembly. */

/** What is thrown for a wrong file or argument: one sentence. Nothing was changed. */
export class RamNetError extends Error {}

/**
 * Load an exported model. The digest of every file in ramnet.json is checked before anything runs.
 *
 * @param source the folder: its URL, by default that of this module; in Node also a path; or the files' bytes by name,
 *   with ramnet.json among them.
 */
export function load(source?: string | URL | Record<string, Uint8Array>): Promise<Model>;

/** One model serves any number of states. Ids are integers in 0 … vocabularySize − 1. */
export interface Model {
  readonly config: Readonly<Record<string, number | readonly number[] | boolean | string | null>>;
  readonly precision: "float32" | "bfloat16" | "int8" | "int4";
  /** How text becomes ids; null if the model does not say. */
  readonly text: "bytes" | null;
  readonly vocabularySize: number;
  readonly layers: number;
  /** Heads of each layer. */
  readonly heads: readonly number[];
  /** Slots of a head's memory, by layer. */
  readonly slots: readonly number[];
  /** Slots that a head reads, and that it writes, for each token, by layer. */
  readonly topK: readonly number[];

  /** A state before the first token. */
  state(): State;

  /** Read one token and return the logits [vocabularySize] of the next. */
  token(state: State, id: number): Float32Array;

  /**
   * Read tokens, such as a prompt, with one read of the weights for 32 of them.
   *
   * @param last how many of the last tokens' logits are returned, 1 by default: [last · vocabularySize].
   */
  tokens(state: State, ids: readonly number[] | Uint8Array | Int32Array, last?: number): Float32Array;

  /** Continue a prompt, id by id. The state has read every id that was returned. */
  generate(state: State, ids: readonly number[] | Uint8Array | Int32Array, options?: Options): AsyncGenerator<number>;

  /** The ids of a text, for models of bytes. */
  encode(text: string): Uint8Array;

  /** The text of ids, for models of bytes. */
  decode(ids: Iterable<number>): string;
}

export interface Options {
  /** Where to stop. By default, generation ends when the loop that takes the ids does. */
  maxNewTokens?: number;
  /** 0, the default, takes the most probable token; above 0, logits are divided by it and sampled. */
  temperature?: number;
  /** Sample from this many most probable tokens; 0, the default, from all. */
  topK?: number;
  /** Makes sampling repeatable. */
  seed?: number;
}

/** What the model remembers. Its size does not depend on how many tokens were read. */
export interface State {
  readonly model: Model;
  /** How many tokens were read. */
  readonly position: number;
  /** Those of the last token, or null if none was read since the state was made, reset or loaded. */
  readonly logits: Float32Array | null;

  clone(): State;
  reset(): void;

  /** A safetensors file, which Python's RamState.load and the C library read. For a Blob: new Blob([state.save()]). */
  save(): Uint8Array;
  load(file: Uint8Array | ArrayBuffer): void;

  /** The slots that the last token read and wrote in a layer, and their weights: [heads · topK] of the layer each. */
  accesses(layer: number): { read: Accesses; written: Accesses };

  /** Free its memory now instead of when the state is collected. */
  free(): void;
}

export interface Accesses {
  slots: Int32Array;
  weights: Float32Array;
}

/** What the choice of tokens needs of a model, which may also answer with promises. */
export interface Answers<S> {
  token(state: S, id: number): Float32Array | Promise<Float32Array>;
  tokens(state: S, ids: ArrayLike<number>): Float32Array | Promise<Float32Array>;
}

/** Model.generate for any model that answers. */
export function generate<S extends { logits: Float32Array | null }>(
  model: Answers<S>,
  state: S,
  ids: ArrayLike<number>,
  options?: Options,
): AsyncGenerator<number>;
