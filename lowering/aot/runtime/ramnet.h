/* A RAM-Net language model, compiled ahead of time for one configuration.
 *
 * Functions that can fail return 0 or a negative ramnet_status; ramnet_message() says what was wrong, in one sentence.
 * One model serves several states at once, from any threads; calls with the same state must not overlap. */
#ifndef RAMNET_H
#define RAMNET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define RAMNET_API __attribute__((visibility("default")))
#else
#define RAMNET_API
#endif

typedef struct ramnet_model ramnet_model;
typedef struct ramnet_state ramnet_state;

enum ramnet_status {
  RAMNET_OK = 0,
  RAMNET_BAD_ARGUMENT = -1, /* a value outside its range */
  RAMNET_BAD_FILE = -2,     /* a file that is missing, damaged, or of another model */
  RAMNET_NO_MEMORY = -3,
  RAMNET_FAILED = -4, /* a kernel reported an error */
  RAMNET_BAD_CPU = -5 /* the CPU lacks instructions that the library is compiled to */
};

/* Run task(context, i) for each i < tasks, in any order and on any threads, and return when all have ended. */
typedef void (*ramnet_parallel)(void* runtime, int tasks, void (*task)(void* context, int i), void* context);

/* What was wrong in this thread's last call that failed. */
RAMNET_API const char* ramnet_message(void);

/* The sizes of the model. */
RAMNET_API int ramnet_vocabulary(void);
RAMNET_API int ramnet_layers(void);

/* The sizes of a layer, 0 if there is no such layer; top_k is the number of slots that a head reads, and that it writes,
 * for a token. */
RAMNET_API int ramnet_heads(int layer);
RAMNET_API int ramnet_slots(int layer);
RAMNET_API int ramnet_top_k(int layer);

/* Map the weights in a safetensors file into memory. The file must not be changed while the model is open.
 * Weights are refused if their data was altered or they are of another configuration. A library for several kinds of CPU
 * takes the kernels for the one that it runs on. */
RAMNET_API int ramnet_open(const char* weights, int threads, ramnet_model** model);

/* Use a safetensors file that is in memory, aligned to 8 bytes. It is not copied. */
RAMNET_API int ramnet_open_bytes(const void* weights_file, size_t size, int threads, ramnet_model** model);

/* Use weights in memory, in the order of the names that ramnet_weight_name gives. They are not copied. */
RAMNET_API int ramnet_wrap(const void* const* weights, int threads, ramnet_model** model);
RAMNET_API void ramnet_rebind(ramnet_model* model, const void* const* weights);
RAMNET_API int ramnet_weight_count(void);
RAMNET_API const char* ramnet_weight_name(int index);

/* Run parallel work on the host's threads instead of the model's own. */
RAMNET_API void ramnet_use_runtime(ramnet_model* model, ramnet_parallel parallel, void* runtime, int threads);
RAMNET_API void ramnet_close(ramnet_model* model);

/* A state before the first token. */
RAMNET_API int ramnet_state_create(const ramnet_model* model, ramnet_state** state);
RAMNET_API int ramnet_state_clone(const ramnet_state* state, ramnet_state** copy);
RAMNET_API void ramnet_state_reset(ramnet_state* state);
RAMNET_API int64_t ramnet_state_position(const ramnet_state* state);
RAMNET_API void ramnet_state_free(ramnet_state* state);

/* A state file is a safetensors file of memory.i, mass.i, conv.i (float32; bfloat16 is read too) and position, which
 * every runtime reads. */
RAMNET_API int ramnet_state_save(const ramnet_state* state, const char* path);
RAMNET_API int ramnet_state_load(ramnet_state* state, const char* path);

/* The same file in memory; a state that is written takes ramnet_state_bytes. */
RAMNET_API size_t ramnet_state_bytes(const ramnet_state* state);
RAMNET_API void ramnet_state_write(const ramnet_state* state, void* bytes);
RAMNET_API int ramnet_state_read(ramnet_state* state, const void* bytes, size_t size);

/* The slots that the last token read, then those that it wrote, in a layer, and their weights: [2, heads, top_k] of
 * the layer each. It fails if the state has read no token since it was created, reset, loaded or bound. */
RAMNET_API int ramnet_state_accesses(const ramnet_state* state, int layer, int32_t* slots, float* weights);

/* States whose tensors belong to the caller. They share scratch memory: only one call at a time may use any of them,
 * and they are freed together. */
RAMNET_API int ramnet_state_borrow(const ramnet_model* model, int count, ramnet_state** states);

/* Let state i use row i of the positions and of each of the tensors, which are in the order memory.j, mass.j, conv.j. */
RAMNET_API void ramnet_state_bind(ramnet_state* const* states, int count, float* const* tensors,
                                  const int64_t* positions);

/* Read one token; logits are [vocabulary], or NULL if they are not wanted. */
RAMNET_API int ramnet_token(const ramnet_model* model, ramnet_state* state, int32_t id, float* logits);

/* Read count tokens; logits [last, vocabulary] are those of the last tokens. Weights are read once for 32 tokens,
 * or for up to 128 as `ramnet tune-model` chose. */
RAMNET_API int ramnet_tokens(const ramnet_model* model, ramnet_state* state, const int32_t* ids, int count,
                             float* logits, int last);

/* Read one token of each of count sequences, at most 32, whose states differ; logits are [count, vocabulary]. */
RAMNET_API int ramnet_step(const ramnet_model* model, ramnet_state* const* states, const int32_t* ids, int count,
                           float* logits);

/* Compute one block of ramnet_step, for a host that computes other parts of the model itself. The weights are those of
 * the block; x [count, hidden] is its input and becomes its output. The states are borrowed, and are bound to memory,
 * mass and positions for this layer. */
RAMNET_API int ramnet_block(const ramnet_model* model, ramnet_state* const* states, int count, int layer,
                            const void* const* weights, float* memory, float* mass, const int64_t* positions, float* x);

#ifdef __cplusplus
}
#endif
#endif
