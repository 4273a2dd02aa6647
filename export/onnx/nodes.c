/* The node "memory" of the domain "ramnet" for ONNX Runtime, over the kernels of one model's layers: a RAM-Net layer
 * between its projections (paper, steps 1 to 6).
 *
 *   output, memory, mass, slots = memory(projected, scale, position, memory, mass)
 *
 * of projected [B, T, 2·H·U·P + H·D], the logits of reads and of writes, then the values; scale [2, H], their factors;
 * position int64 [B]; memory [B, H, M, D] and mass [B, H, M]. The output is [B, T, H·D]; slots, int32 [B, T, 2, H, K],
 * are before CAPE. If a session binds memory and mass to the same buffers as input and as output, they are updated in
 * place; else they are copied first. Parallel work runs on the session's threads. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "kernels.h"
#include "ort.h"

/* The sizes of a kind of layer. */
typedef struct {
  int kind; /* of its kernels */
  int heads, value_dim, order, sub_dim, top_k, slots;
  int many_rows; /* addresses that are worth a thread */
  int scratch;
  int address;  /* logits of an address */
  int rows;     /* the addresses of a token: of its reads, then of its writes */
  int accesses; /* of a token */
  int width;
} layer_sizes;

static const layer_sizes kinds[KIND_COUNT] = KIND_TABLE;

static const OrtApi* api;

#define TRY(call)                        \
  do {                                   \
    OrtStatus* failed_ = (call);         \
    if (failed_ != NULL) return failed_; \
  } while (0)

static OrtStatus* refuse(const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return api->CreateStatus(ORT_INVALID_ARGUMENT, text);
}

enum { PROJECTED, SCALE, POSITION, MEMORY, MASS, INPUTS };
enum { OUTPUT, NEW_MEMORY, NEW_MASS, SLOTS_OF_TOKENS, OUTPUTS };

/* What a node keeps. */
typedef struct {
  const layer_sizes* sizes;
  int64_t cape_heads;
} layer;

typedef struct {
  const layer_sizes* sizes;
  int64_t batch, tokens, cape_heads;
  const float *projected, *scale, *old_memory, *old_mass;
  const int64_t* position;
  float *output, *memory, *mass;
  int32_t* slots;
  /* Scratch memory. */
  float *logits, *weights, *scan;
  int32_t* shifted; /* slots after CAPE */
  size_t tasks;
  int failed;
} work;

/* The first item of a task, of count items divided among tasks. */
static int64_t first_of(int64_t count, size_t task, size_t tasks) {
  return (int64_t)((uint64_t)count * task / tasks);
}

/* Step 4: slot j of token t is (j - t) mod M in the first heads. */
static void shift(const work* of, int64_t token) {
  const layer_sizes m = *of->sizes;
  const int64_t at = (of->position[token / of->tokens] + token % of->tokens) % m.slots;
  const int32_t back = (int32_t)(at < 0 ? at + m.slots : at), moved = (int32_t)of->cape_heads * m.top_k;
  const int32_t* slots = of->slots + token * m.accesses;
  int32_t* shifted = of->shifted + token * m.accesses;
  for (int side = 0; side < 2; side++, slots += m.heads * m.top_k, shifted += m.heads * m.top_k)
    for (int32_t i = 0; i < m.heads * m.top_k; i++) {
      const int32_t less = slots[i] - (i < moved ? back : 0);
      shifted[i] = less < 0 ? less + m.slots : less;
    }
}

/* Find the addresses of a task's tokens. */
static void decode(void* data, size_t task) {
  work* of = data;
  const layer_sizes m = *of->sizes;
  const int64_t all = of->batch * of->tokens, first = first_of(all, task, of->tasks);
  const int64_t end = first_of(all, task + 1, of->tasks), rows = (end - first) * m.rows;
  float* logits = of->logits + first * m.rows * m.address;
  for (int64_t token = first; token < end; token++)
    for (int row = 0; row < m.rows; row++) {
      const float *from = of->projected + token * m.width + row * m.address, factor = of->scale[row];
      float* to = of->logits + (token * m.rows + row) * m.address;
      for (int i = 0; i < m.address; i++) to[i] = from[i] * factor;
    }
  int32_t* slots = of->slots + first * m.accesses;
  float* weights = of->weights + first * m.accesses;
  const int status = rows < m.many_rows
                         ? CALL_KIND(m.kind, address_decode, I(rows), P(logits), P(slots), P(weights))
                         : CALL_KIND(m.kind, address_decode_many, I(rows), P(logits), P(slots), P(weights));
  if (status != 0) of->failed = 1;
  for (int64_t token = first; token < end; token++) shift(of, token);
}

/* Copy the state of some heads, unless it is updated where it is. */
static void copy_state(const work* of, int64_t head, int64_t heads) {
  const layer_sizes m = *of->sizes;
  const size_t mass = (size_t)heads * m.slots * sizeof(float), memory = mass * m.value_dim;
  const int64_t at = head * m.slots;
  if (of->memory != of->old_memory) memcpy(of->memory + at * m.value_dim, of->old_memory + at * m.value_dim, memory);
  if (of->mass != of->old_mass) memcpy(of->mass + at, of->old_mass + at, mass);
}

/* Write and read the memory of one head. */
static void scan(void* data, size_t n) {
  work* of = data;
  const layer_sizes m = *of->sizes;
  const int64_t head = (int64_t)n, b = head / m.heads, h = head % m.heads, first = b * of->tokens;
  const int64_t read = first * m.accesses + h * m.top_k, write = read + m.heads * m.top_k;
  const float* values = of->projected + first * m.width + m.rows * m.address + h * m.value_dim;
  float* output = of->output + (first * m.heads + h) * m.value_dim;
  float* scratch = of->scan + 2 * m.scratch * head;
  copy_state(of, head, 1);
  if (CALL_KIND(m.kind, memory_scan, I(of->tokens), I(m.accesses), I(m.width), I(m.heads * m.value_dim),
                P(of->shifted + write), P(of->weights + write), P(of->shifted + read), P(of->weights + read), P(values),
                P(of->memory + head * m.slots * m.value_dim), P(of->mass + head * m.slots), P(output), P(scratch),
                P(scratch + m.scratch)) != 0)
    of->failed = 1;
}

/* Read one token of each of a task's sequences. */
static void step(void* data, size_t task) {
  work* of = data;
  const layer_sizes m = *of->sizes;
  for (int64_t b = first_of(of->batch, task, of->tasks); b < first_of(of->batch, task + 1, of->tasks); b++) {
    const int64_t head = b * m.heads, read = b * m.accesses, write = read + m.heads * m.top_k;
    copy_state(of, head, m.heads);
    if (CALL_KIND(m.kind, memory_step, I(m.heads), P(of->shifted + write), P(of->weights + write),
                  P(of->shifted + read), P(of->weights + read), P(of->projected + b * m.width + m.rows * m.address),
                  P(of->memory + head * m.slots * m.value_dim), P(of->mass + head * m.slots),
                  P(of->output + head * m.value_dim)) != 0)
      of->failed = 1;
  }
}

static OrtStatus* spread(const OrtKernelContext* context, void (*task)(void* data, size_t i), int64_t tasks, work* of) {
  of->tasks = (size_t)(tasks < 1 ? 1 : tasks);
  if (of->tasks > 1) return api->KernelContext_ParallelFor(context, task, of->tasks, 0, of);
  task(of, 0);
  return NULL;
}

/* How many tokens are worth a thread, if it takes so many rows and a token has so many. */
static int64_t at_least(int rows, int of_token) { return (rows + of_token - 1) / of_token; }

static OrtStatus* run(OrtKernelContext* context, work* of) {
  const layer_sizes m = *of->sizes;
  const int64_t tokens = of->batch * of->tokens, heads = of->batch * m.heads;
  TRY(spread(context, decode, tokens / at_least(m.many_rows, m.rows), of));
  if (of->tokens == 1) TRY(spread(context, step, of->batch / at_least(32, m.heads), of));
  else TRY(spread(context, scan, heads, of));
  return of->failed ? api->CreateStatus(ORT_FAIL, "a kernel of ramnet.memory failed") : NULL;
}

/* Get the elements of an input and check its sizes; -1 is any size, which is stored in ``sizes``. */
static OrtStatus* input(const OrtKernelContext* context, size_t index, size_t axes, int64_t* sizes, const void* data) {
  static const char* const names[] = {"projected", "scale", "position", "memory", "mass"};
  const OrtValue* value;
  OrtShapeInfo* info;
  int64_t found[4];
  size_t count;
  TRY(api->KernelContext_GetInput(context, index, &value));
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api->GetDimensionsCount(info, &count);
  if (status == NULL && count != axes)
    status = refuse("%s of ramnet.memory has %zu axes; it must have %zu", names[index], count, axes);
  if (status == NULL) status = api->GetDimensions(info, found, axes);
  api->ReleaseTensorTypeAndShapeInfo(info);
  for (size_t i = 0; status == NULL && i < axes; i++) {
    if (sizes[i] < 0) sizes[i] = found[i];
    if (sizes[i] != found[i])
      status = refuse("axis %zu of %s of ramnet.memory is %lld; it must be %lld", i, names[index], (long long)found[i],
                      (long long)sizes[i]);
  }
  return status != NULL ? status : api->GetTensorMutableData((OrtValue*)value, (void**)data);
}

static OrtStatus* output(OrtKernelContext* context, size_t index, size_t axes, const int64_t* sizes, void* data) {
  OrtValue* value;
  TRY(api->KernelContext_GetOutput(context, index, sizes, axes, &value));
  return api->GetTensorMutableData(value, data);
}

static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const layer* node = kernel;
  const layer_sizes m = *node->sizes;
  work of = {.sizes = node->sizes, .cape_heads = node->cape_heads};
  int64_t projected[] = {-1, -1, m.width};
  TRY(input(context, PROJECTED, 3, projected, &of.projected));
  const int64_t batch = of.batch = projected[0], tokens = of.tokens = projected[1];
  int64_t memory[] = {batch, m.heads, m.slots, m.value_dim};
  TRY(input(context, SCALE, 2, (int64_t[]){2, m.heads}, &of.scale));
  TRY(input(context, POSITION, 1, (int64_t[]){batch}, &of.position));
  TRY(input(context, MEMORY, 4, memory, &of.old_memory));
  TRY(input(context, MASS, 3, memory, &of.old_mass));
  TRY(output(context, OUTPUT, 3, (int64_t[]){batch, tokens, m.heads * m.value_dim}, &of.output));
  TRY(output(context, NEW_MEMORY, 4, memory, &of.memory));
  TRY(output(context, NEW_MASS, 3, memory, &of.mass));
  TRY(output(context, SLOTS_OF_TOKENS, 5, (int64_t[]){batch, tokens, 2, m.heads, m.top_k}, &of.slots));
  if (batch == 0) return NULL;
  if (tokens == 0) return copy_state(&of, 0, batch * m.heads), NULL;
  const size_t rows = (size_t)(batch * tokens) * m.rows, scans = tokens == 1 ? 0 : (size_t)(batch * m.heads) * 2 * m.scratch;
  float* scratch = malloc((rows * (m.address + 2 * m.top_k) + scans) * sizeof(float));
  if (scratch == NULL) return api->CreateStatus(ORT_FAIL, "there is no memory for ramnet.memory");
  of.logits = scratch;
  of.weights = of.logits + rows * m.address;
  of.shifted = (int32_t*)(of.weights + rows * m.top_k);
  of.scan = (float*)(of.shifted + rows * m.top_k);
  OrtStatus* status = run(context, &of);
  free(scratch);
  return status;
}

/* Find the kind of layer of which a node is; one of another model has none. */
static OrtStatus* create(const OrtCustomOp* op, const OrtApi* of, const OrtKernelInfo* info, void** kernel) {
  static const struct { const char* name; float value; } constants[] = {{"decay_power", DECAY_POWER}, {"eps", EPS}};
  static const char* const names[] = {"num_heads", "value_dim", "order", "sub_dim", "top_k"};
  int64_t found[5], cape_heads;
  const layer_sizes* m = NULL;
  (void)op, (void)of;
  for (int i = 0; i < 5; i++) TRY(api->KernelInfoGetAttribute_int64(info, names[i], &found[i]));
  for (int i = 0; i < KIND_COUNT; i++) {
    const int sizes[] = {kinds[i].heads, kinds[i].value_dim, kinds[i].order, kinds[i].sub_dim, kinds[i].top_k};
    int same = 0;
    while (same < 5 && found[same] == sizes[same]) same++;
    if (same == 5) m = &kinds[i];
  }
  if (m == NULL)
    return refuse("a node has num_heads %lld, value_dim %lld, order %lld, sub_dim %lld and top_k %lld; this library is"
                  " built for other layers", (long long)found[0], (long long)found[1], (long long)found[2],
                  (long long)found[3], (long long)found[4]);
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) {
    float constant;
    TRY(api->KernelInfoGetAttribute_float(info, constants[i].name, &constant));
    if (constant != constants[i].value)
      return refuse("a node has %s %g; this library is built for %g", constants[i].name, constant, constants[i].value);
  }
  TRY(api->KernelInfoGetAttribute_int64(info, "cape_heads", &cape_heads));
  if (cape_heads < 0 || cape_heads > m->heads)
    return refuse("a node has cape_heads %lld; it must be in 0..%d", (long long)cape_heads, m->heads);
  layer* node = malloc(sizeof *node);
  if (node == NULL) return api->CreateStatus(ORT_FAIL, "there is no memory for ramnet.memory");
  *node = (layer){m, cape_heads};
  *kernel = node;
  return NULL;
}

static const char* name(const OrtCustomOp* op) { return (void)op, "memory"; }
static const char* provider(const OrtCustomOp* op) { return (void)op, NULL; }
static size_t inputs(const OrtCustomOp* op) { return (void)op, INPUTS; }
static size_t outputs(const OrtCustomOp* op) { return (void)op, OUTPUTS; }
static int of_input(const OrtCustomOp* op, size_t i) { return (void)op, i == POSITION ? ORT_INT64 : ORT_FLOAT; }
static int of_output(const OrtCustomOp* op, size_t i) { return (void)op, i == SLOTS_OF_TOKENS ? ORT_INT32 : ORT_FLOAT; }
static int zero(const OrtCustomOp* op, size_t i) { return (void)op, (void)i, 0; }
static int one(const OrtCustomOp* op) { return (void)op, 1; }

static const OrtCustomOp memory_node = {
    .version = ORT_VERSION, .GetName = name, .GetExecutionProviderType = provider,
    .GetInputType = of_input, .GetInputTypeCount = inputs, .GetOutputType = of_output, .GetOutputTypeCount = outputs,
    .GetInputCharacteristic = zero, .GetOutputCharacteristic = zero, .GetInputMemoryType = zero,
    .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one, .GetVariadicOutputMinArity = one,
    .GetVariadicOutputHomogeneity = one, .GetStartVersion = one, .GetEndVersion = one,
    .CreateKernelV2 = create, .KernelComputeV2 = compute, .KernelDestroy = free,
};

RAMNET_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  api = base->GetApi(ORT_VERSION);
  if (api == NULL) return base->GetApi(1)->CreateStatus(ORT_FAIL, "ramnet's nodes need ONNX Runtime 1.17 or later");
  if (choose_kernels()) return refuse("%s", ramnet_message());
  OrtDomain* domain; /* is never released, as sessions refer to it */
  TRY(api->CreateCustomOpDomain("ramnet", &domain));
  TRY(api->CustomOpDomain_Add(domain, &memory_node));
  return api->AddCustomOpDomain(options, domain);
}
