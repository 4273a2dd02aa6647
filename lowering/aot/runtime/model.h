/* The model and the state, as the files of this library know them. */
#ifndef RAMNET_MODEL_H
#define RAMNET_MODEL_H

#include "config.h"
#include "files.h"
#include "kernels.h"
#include "pool.h"

struct ramnet_model {
  const void* weights[WEIGHTS];
  executor executor;
  pool* pool;
  void (*unmap)(void* mapped, size_t bytes); /* NULL if the weights belong to the caller */
  void* mapped;
  size_t mapped_bytes;
};

/* Sizes of a layer. Layers of the same kind have the same kernels. */
typedef struct {
  int kind, heads, cape_heads, address, top_k, slots, value_dim; /* an address has U * P logits */
} layer_sizes;

extern const layer_sizes layers[LAYERS];

/* Open a weights file in memory, which messages call `name`. */
int open_named(const char* name, const void* bytes, size_t size, int threads, ramnet_model** model);

typedef struct {
  float *x, *normed, *h, *g, *logits, *factors, *address_weights, *values, *mixed, *active, *steps;
  int32_t *ids, *slots;
  int8_t* rounded;
} scratch;

/* Tensors in the order memory.i, mass.i, conv.i. */
enum { STATE_TENSORS = 2 * LAYERS + CONVS };

struct ramnet_state {
  float* tensors[STATE_TENSORS];
  int64_t position;
  scratch scratch;
  void* scratch_memory;
  void* memory; /* NULL if the tensors belong to the caller */
  /* Reads, then writes, of the last token, before CAPE; its position is -1 if there is none. */
  int32_t slots[LAYERS][ACCESSES];
  float weights[LAYERS][ACCESSES];
  int64_t last_read;
};

/* Write the bytes of a state file through `put`. */
void state_write(const ramnet_state* state, put_bytes* put, void* to);

/* Replace a state by that of a file in memory, which messages call `name`. */
int state_read(ramnet_state* state, const char* name, const void* bytes, size_t size);

#endif
