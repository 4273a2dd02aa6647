/* States: their memory and their files. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

static const size_t alignment = 64;

/* The number of elements of a tensor of the state. */
static size_t state_size(int tensor) {
  const layer_sizes* of = &layers[tensor % LAYERS];
  if (tensor < LAYERS) return (size_t)of->heads * of->slots * of->value_dim;
  if (tensor < 2 * LAYERS) return (size_t)of->heads * of->slots;
  return (size_t)(TAPS - 1) * HIDDEN;
}

/* Its name, "memory.0" for example. */
static void state_name(int tensor, char name[32]) {
  const char* kind = tensor < LAYERS ? "memory" : tensor < 2 * LAYERS ? "mass" : "conv";
  snprintf(name, 32, "%s.%d", kind, tensor < 2 * LAYERS ? tensor % LAYERS : tensor - 2 * LAYERS);
}

/* Take `bytes` from memory at *used, which is only counted if `memory` is NULL. */
static void* take(char* memory, size_t* used, size_t bytes) {
  void* taken = memory == NULL ? NULL : memory + *used;
  *used += (bytes + alignment - 1) / alignment * alignment;
  return taken;
}

static size_t lay_out(scratch* s, char* memory) {
  const size_t f = sizeof(float), inner = INNER > 0 ? INNER : 1, values = VALUES, accesses = ACCESSES;
  const size_t widest = inner > HIDDEN ? (inner > values ? inner : values) : (HIDDEN > values ? HIDDEN : values);
  size_t used = 0;
  s->x = take(memory, &used, f * BLOCK * HIDDEN);
  s->normed = take(memory, &used, f * BLOCK * HIDDEN);
  s->h = take(memory, &used, CONVS ? f * BLOCK * HIDDEN : 0);
  s->g = take(memory, &used, CONVS ? f * BLOCK * HIDDEN : 0);
  s->logits = take(memory, &used, f * BLOCK * LOGITS);
  s->factors = take(memory, &used, f * ROWS);
  s->address_weights = take(memory, &used, f * BLOCK * accesses);
  s->values = take(memory, &used, f * BLOCK * values);
  s->mixed = take(memory, &used, f * BLOCK * values);
  s->active = take(memory, &used, 2 * f * BLOCK * inner);
  s->steps = take(memory, &used, f * BLOCK);
  s->ids = take(memory, &used, sizeof(int32_t) * BLOCK);
  s->slots = take(memory, &used, sizeof(int32_t) * BLOCK * accesses);
  s->rounded = take(memory, &used, BLOCK * widest * 3 / 2);
  return used;
}

static int allocate(ramnet_state** state, int owned) {
  scratch unused;
  ramnet_state* made = calloc(1, sizeof *made);
  size_t total = 0;
  uint64_t whole = 0;
  if (made == NULL) return fail(RAMNET_NO_MEMORY, "there is no memory for a state");
  for (int i = 0; i < LAYERS; i++)
    whole += sizeof(float) * (uint64_t)layers[i].heads * layers[i].slots * (layers[i].value_dim + 1);
  if (owned && whole > SIZE_MAX / 2) { /* with 32 bits, in WebAssembly */
    free(made);
    return fail(RAMNET_NO_MEMORY, "a state of %llu bytes is larger than memory can be", (unsigned long long)whole);
  }
  made->scratch_memory = aligned_alloc(alignment, lay_out(&unused, NULL));
  if (owned) {
    for (int i = 0; i < STATE_TENSORS; i++) take(NULL, &total, sizeof(float) * state_size(i));
    made->memory = aligned_alloc(alignment, total);
  }
  if (made->scratch_memory == NULL || (owned && made->memory == NULL)) {
    ramnet_state_free(made);
    return fail(RAMNET_NO_MEMORY, "there is no memory for a state of %zu bytes", total);
  }
  lay_out(&made->scratch, made->scratch_memory);
  if (owned) {
    total = 0;
    for (int i = 0; i < STATE_TENSORS; i++)
      made->tensors[i] = take(made->memory, &total, sizeof(float) * state_size(i));
    ramnet_state_reset(made);
  }
  *state = made;
  return RAMNET_OK;
}

int ramnet_state_create(const ramnet_model* model, ramnet_state** state) {
  (void)model;
  return allocate(state, 1);
}

int ramnet_state_borrow(const ramnet_model* model, int count, ramnet_state** states) {
  (void)model;
  if (count < 1) return fail(RAMNET_BAD_ARGUMENT, "count is %d; it must be at least 1", count);
  const int status = allocate(&states[0], 0);
  if (status) return status;
  for (int i = 1; i < count; i++) {
    if ((states[i] = calloc(1, sizeof **states)) == NULL) {
      while (i > 0) ramnet_state_free(states[--i]);
      return fail(RAMNET_NO_MEMORY, "there is no memory for %d states", count);
    }
    states[i]->scratch = states[0]->scratch;
  }
  return RAMNET_OK;
}

void ramnet_state_bind(ramnet_state* const* states, int count, float* const* tensors, const int64_t* positions) {
  for (int i = 0; i < count; i++) {
    for (int j = 0; j < STATE_TENSORS; j++)
      states[i]->tensors[j] = tensors[j] + (size_t)i * state_size(j);
    states[i]->position = positions[i];
    states[i]->last_read = -1;
  }
}

int ramnet_state_clone(const ramnet_state* state, ramnet_state** copy) {
  const int status = allocate(copy, 1);
  if (status) return status;
  for (int i = 0; i < STATE_TENSORS; i++)
    memcpy((*copy)->tensors[i], state->tensors[i], sizeof(float) * state_size(i));
  memcpy((*copy)->slots, state->slots, sizeof state->slots);
  memcpy((*copy)->weights, state->weights, sizeof state->weights);
  (*copy)->position = state->position;
  (*copy)->last_read = state->last_read;
  return RAMNET_OK;
}

void ramnet_state_reset(ramnet_state* state) {
  for (int i = 0; i < STATE_TENSORS; i++) memset(state->tensors[i], 0, sizeof(float) * state_size(i));
  for (int i = LAYERS; i < 2 * LAYERS; i++)
    for (size_t j = 0; j < state_size(i); j++) state->tensors[i][j] = 1.0f / layers[i - LAYERS].slots;
  state->position = 0;
  state->last_read = -1;
}

int64_t ramnet_state_position(const ramnet_state* state) { return state->position; }

void ramnet_state_free(ramnet_state* state) {
  if (state == NULL) return;
  free(state->scratch_memory);
  free(state->memory);
  free(state);
}

/* The shape of a tensor of the state in a file, with the batch of one row. */
static tensor_shape shape_of(int tensor) {
  const layer_sizes* of = &layers[tensor % LAYERS];
  if (tensor < LAYERS) return (tensor_shape){4, {1, of->heads, of->slots, of->value_dim}};
  if (tensor < 2 * LAYERS) return (tensor_shape){3, {1, of->heads, of->slots}};
  return (tensor_shape){3, {1, TAPS - 1, HIDDEN}};
}

static void count(void* to, const void* data, size_t bytes) {
  (void)data;
  *(size_t*)to += bytes;
}

static void write_header(put_bytes* put, void* to) {
  char name[32];
  size_t begin = 0;
  declare_tensor("position", "I64", (tensor_shape){1, {1}}, begin, put, to);
  begin += sizeof(int64_t);
  for (int i = 0; i < STATE_TENSORS; i++) {
    state_name(i, name);
    declare_tensor(name, "F32", shape_of(i), begin, put, to);
    begin += sizeof(float) * state_size(i);
  }
  put(to, "}", 1);
}

void state_write(const ramnet_state* state, put_bytes* put, void* to) {
  size_t header = 0;
  write_header(count, &header);
  const size_t padding = (8 - header % 8) % 8; /* aligns the tensors */
  put_header_size(header + padding, put, to);
  write_header(put, to);
  put(to, "        ", padding);
  put(to, &state->position, sizeof state->position);
  for (int i = 0; i < STATE_TENSORS; i++) put(to, state->tensors[i], sizeof(float) * state_size(i));
}

size_t ramnet_state_bytes(const ramnet_state* state) {
  size_t bytes = 0;
  state_write(state, count, &bytes);
  return bytes;
}

static void append(void* to, const void* data, size_t bytes) {
  char** end = to;
  memcpy(*end, data, bytes);
  *end += bytes;
}

void ramnet_state_write(const ramnet_state* state, void* bytes) {
  char* end = bytes;
  state_write(state, append, &end);
}

int ramnet_state_read(ramnet_state* state, const void* bytes, size_t size) {
  return state_read(state, "the state file", bytes, size);
}

/* Find a tensor of the state. Its numbers are float32, or bfloat16 as those of a bfloat16 model in PyTorch are. */
static int find(const tensor_file* file, int tensor, const void** data, int* narrow) {
  char name[32];
  state_name(tensor, name);
  *narrow = find_tensor(file, name, "BF16", shape_of(tensor), data) == RAMNET_OK;
  return *narrow ? RAMNET_OK : find_tensor(file, name, "F32", shape_of(tensor), data);
}

static void copy_numbers(float* to, const void* from, size_t count, int narrow) {
  if (!narrow) {
    memcpy(to, from, sizeof *to * count);
    return;
  }
  for (size_t i = 0; i < count; i++) {
    const uint32_t bits = (uint32_t)((const uint16_t*)from)[i] << 16;
    memcpy(to + i, &bits, sizeof bits);
  }
}

int state_read(ramnet_state* state, const char* file_name, const void* bytes, size_t size) {
  const void* found[STATE_TENSORS];
  int narrow[STATE_TENSORS];
  const void* position;
  tensor_file file;
  int64_t at = 0;
  int status = read_tensors(&file, file_name, bytes, size);
  if (status) return status;
  status = find_tensor(&file, "position", "I64", (tensor_shape){1, {1}}, &position);
  for (int i = 0; status == 0 && i < STATE_TENSORS; i++) status = find(&file, i, &found[i], &narrow[i]);
  if (status == 0 && file.tensors != STATE_TENSORS + 1)
    status = fail(RAMNET_BAD_FILE, "%s holds %d tensors; a state of this model has %d", file_name, file.tensors,
                  STATE_TENSORS + 1);
  if (status == 0) {
    memcpy(&at, position, sizeof at);
    if (at < 0 || at > (int64_t)1 << 62)
      status = fail(RAMNET_BAD_FILE, "%s is at position %lld; it must be in 0..2^62", file_name, (long long)at);
  }
  if (status == 0) { /* nothing is changed before the whole file is known to fit */
    for (int i = 0; i < STATE_TENSORS; i++) copy_numbers(state->tensors[i], found[i], state_size(i), narrow[i]);
    state->position = at;
    state->last_read = -1;
  }
  return status;
}
