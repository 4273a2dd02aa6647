/* Reads tokens: calls the kernels of each block in turn. */
#include <string.h>

#include "model.h"

/* Consecutive tokens of one sequence. */
static int run_length(ramnet_state* const* states, int at, int count) {
  int end = at + 1;
  while (end < count && states[end] == states[at]) end++;
  return end - at;
}

#if CONVS
static int convolution(const void* const* w, int layer, ramnet_state* const* states, int n, const scratch* s) {
  int status = CALL(gate, I(n), P(s->x), P(w[0]), P(w[1]), P(w[2]), P(w[3]), P(w[4]), P(s->h), P(s->g), P(s->rounded), P(s->steps));
  for (int at = 0, count; status == 0 && at < n; at += count) {
    float* recent = states[at]->tensors[2 * LAYERS + layer];
    count = run_length(states, at, n);
    const size_t row = (size_t)at * HIDDEN;
    status = CALL(convolve, I(count), P(s->h + row), P(s->g + row), P(w[5]), P(recent), P(s->x + row));
  }
  return status;
}
#endif

#if ADDRESS_BIAS /* the last weight of a block */
#define BIAS(w) P((w)[BLOCK_WEIGHTS - 1]),
#else
#define BIAS(w)
#endif

static int block(const ramnet_model* model, const void* const* w, int layer, ramnet_state* const* states, int n,
                 const scratch* s) {
  const layer_sizes of = layers[layer];
  const size_t accesses = (size_t)2 * of.heads * of.top_k, bytes = accesses * sizeof(float);
  int status = CALL_KIND(of.kind, address, I(n), P(s->x), P(w[0]), P(w[1]), P(w[2]), BIAS(w) P(w[3]), P(w[4]), P(s->slots),
                    P(s->address_weights), P(s->values), P(s->normed), P(s->logits), P(s->factors), P(s->rounded), P(s->steps));
  for (int at = 0, count; status == 0 && at < n; at += count) {
    ramnet_state* state = states[at];
    count = run_length(states, at, n);
    const size_t access = at * accesses, last = (at + count - 1) * accesses;
    const size_t row = (size_t)at * of.heads * of.value_dim;
    memcpy(state->slots[layer], s->slots + last, bytes);
    memcpy(state->weights[layer], s->address_weights + last, bytes);
    /* One token's work on its heads is less than waking threads costs. */
    run_on(count > 1 ? &model->executor : NULL);
    status = CALL_KIND(of.kind, memory, I(count), I(state->position), I(of.cape_heads), P(s->slots + access),
                       P(s->address_weights + access), P(s->values + row), P(state->tensors[layer]),
                       P(state->tensors[LAYERS + layer]), P(s->mixed + row));
    run_on(&model->executor);
  }
  if (status == 0)
    status = CALL_KIND(of.kind, mix, I(n), P(s->mixed), P(w[5]), P(w[6]), P(s->x), P(s->rounded), P(s->steps));
#if INNER
  if (status == 0)
    status = CALL(feed_forward, I(n), P(s->x), P(w[7]), P(w[8]), P(w[9]), P(w[10]), P(w[11]), P(w[12]), P(s->normed),
                  P(s->active), P(s->rounded), P(s->steps));
#endif
  return status;
}

/* Read n <= BLOCK tokens. Tokens of one sequence are consecutive. */
static int read_block(const ramnet_model* model, ramnet_state* const* states, const int32_t* ids, int n,
                      float* logits, int last) {
  const scratch* s = &states[0]->scratch;
  const void* const* w = model->weights;
  memcpy(s->ids, ids, (size_t)n * sizeof *ids);
  run_on(&model->executor);
  int status = CALL(embed, I(n), P(s->ids), P(w[0]), P(w[1]), P(s->x), P(s->rounded), P(s->steps));
  w += 2;
#if CONVS
  for (int i = 0; status == 0 && i < CONVS; i++, w += CONV_WEIGHTS) status = convolution(w, i, states, n, s);
#endif
  for (int i = 0; status == 0 && i < LAYERS; i++, w += BLOCK_WEIGHTS) status = block(model, w, i, states, n, s);
  if (status == 0 && last > 0)
    status = CALL(head, I(last), P(s->x + (size_t)(n - last) * HIDDEN), P(w[0]), P(w[1]), P(w[2]), P(w[3]), P(logits),
                  P(s->normed), P(s->rounded), P(s->steps));
  run_on(NULL);
  if (status == 0)
    for (int i = 0; i < n; i++) states[i]->last_read = states[i]->position++;
  return status;
}

static int check_ids(const int32_t* ids, int count) {
  for (int i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= VOCABULARY)
      return fail(RAMNET_BAD_ARGUMENT, "id %d is %d; it must be in 0..%d", i, (int)ids[i], VOCABULARY - 1);
  return RAMNET_OK;
}

int ramnet_token(const ramnet_model* model, ramnet_state* state, int32_t id, float* logits) {
  const int status = check_ids(&id, 1);
  return status ? status : read_block(model, &state, &id, 1, logits, logits != NULL);
}

int ramnet_tokens(const ramnet_model* model, ramnet_state* state, const int32_t* ids, int count, float* logits,
                  int last) {
  ramnet_state* states[BLOCK];
  for (int i = 0; i < BLOCK; i++) states[i] = state;
  if (count < 0) return fail(RAMNET_BAD_ARGUMENT, "count is %d; it must be at least 0", count);
  if (last < 0 || last > count)
    return fail(RAMNET_BAD_ARGUMENT, "last is %d; it must be in 0..%d, the count", last, count);
  int status = check_ids(ids, count);
  for (int at = 0; status == 0 && at < count; at += BLOCK) {
    const int n = count - at < BLOCK ? count - at : BLOCK;
    const int before = count - last - at; /* tokens of this block whose logits are not wanted */
    const int wanted = before <= 0 ? n : before < n ? n - before : 0;
    status = read_block(model, states, ids + at, n, logits, wanted);
    if (wanted) logits += (size_t)wanted * VOCABULARY;
  }
  return status;
}

int ramnet_step(const ramnet_model* model, ramnet_state* const* states, const int32_t* ids, int count, float* logits) {
  if (count < 1 || count > BLOCK)
    return fail(RAMNET_BAD_ARGUMENT, "count is %d; it must be in 1..%d", count, BLOCK);
  for (int i = 0; i < count; i++)
    for (int j = 0; j < i; j++)
      if (states[i] == states[j]) return fail(RAMNET_BAD_ARGUMENT, "states %d and %d are the same", j, i);
  const int status = check_ids(ids, count);
  return status ? status : read_block(model, states, ids, count, logits, count);
}

int ramnet_state_accesses(const ramnet_state* state, int layer, int32_t* slots, float* weights) {
  if (layer < 0 || layer >= LAYERS)
    return fail(RAMNET_BAD_ARGUMENT, "layer is %d; it must be in 0..%d", layer, LAYERS - 1);
  if (state->last_read < 0) return fail(RAMNET_BAD_ARGUMENT, "the state has read no token yet");
  const layer_sizes of = layers[layer];
  const int shift = (int)(state->last_read % of.slots), accesses = 2 * of.heads * of.top_k;
  for (int i = 0; i < accesses; i++) {
    const int moved = state->slots[layer][i] - shift, head = i / of.top_k % of.heads;
    slots[i] = head >= of.cape_heads ? state->slots[layer][i] : moved < 0 ? moved + of.slots : moved;
  }
  memcpy(weights, state->weights[layer], accesses * sizeof *weights);
  return RAMNET_OK;
}

/* The products of a block's matrices with one token. */
static int64_t products(const layer_sizes* of) {
  return (int64_t)HIDDEN * (2 * of->heads * (int64_t)(of->address + of->value_dim) + 3 * INNER);
}

/* More products take longer than waking threads. */
static const int64_t worth_waking = 1 << 20;

int ramnet_block(const ramnet_model* model, ramnet_state* const* states, int count, int layer,
                 const void* const* weights, float* memory, float* mass, const int64_t* positions, float* x) {
  if (count < 1 || count > BLOCK)
    return fail(RAMNET_BAD_ARGUMENT, "count is %d; it must be in 1..%d", count, BLOCK);
  if (layer < 0 || layer >= LAYERS)
    return fail(RAMNET_BAD_ARGUMENT, "layer is %d; it must be in 0..%d", layer, LAYERS - 1);
  const scratch* s = &states[0]->scratch;
  const layer_sizes* of = &layers[layer];
  const size_t bytes = (size_t)count * HIDDEN * sizeof *x, slots = (size_t)of->heads * of->slots;
  for (int i = 0; i < count; i++) {
    states[i]->tensors[layer] = memory + i * slots * of->value_dim;
    states[i]->tensors[LAYERS + layer] = mass + i * slots;
    states[i]->position = positions[i];
    states[i]->last_read = -1;
  }
  memcpy(s->x, x, bytes);
  run_on(count * products(of) < worth_waking ? NULL : &model->executor);
  const int status = block(model, weights, layer, states, count, s);
  run_on(NULL);
  pool_rest(model->pool); /* what follows is computed on the host's threads */
  memcpy(x, s->x, bytes);
  return status;
}
