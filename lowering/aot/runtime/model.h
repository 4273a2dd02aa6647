/* The model and the state, as the files of this library know them. */
#ifndef RAMNET_MODEL_H
#define RAMNET_MODEL_H

#include "config.h"
#include "kernels.h"
#include "pool.h"

struct ramnet_model {
  const void* weights[WEIGHTS];
  executor executor;
  pool* pool;
  void* mapped;
  size_t mapped_bytes;
};

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
};

#endif
